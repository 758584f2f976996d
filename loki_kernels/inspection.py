"""What this library would do with a model, from its config alone: no weight is loaded."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Sequence
from typing import Any

import torch
import transformers

from .attribution.steering import why_no_staircase
from .discovery import Layer, examine
from .errors import UnsupportedModelError
from .memory import memory_of_quota, weights_size
from .sharding import full_shape
from .structure import is_plain_linear, text_config


def inspect_model(name: str | os.PathLike[str]) -> str:
    """A table: every decoder layer's FFN, its parameter and axis, what is refused and why; and the
    memory that training takes, by count.

    Args:
        name: folder or hub name; its ``config.json`` is read and the model built on the meta
            device, without weights.

    Raises:
        ValueError: if transformers knows no language model of this config.
        OSError: if there is no config.
    """
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    model = build_model(config, torch.device("meta"), dtype_of(config))
    kind = type(model).__name__
    try:
        decoder, _, layers = examine(model)
    except UnsupportedModelError as error:
        return f"{kind}: refused. {error}"
    reason = why_no_staircase(decoder)
    attribution = f"not by the staircase: {reason}" if reason else "by the staircase"
    lines = [
        f"{kind}: {len(layers)} decoder layers, hidden_size {text_config(model).hidden_size}",
        f"attribution: {attribution}, if it reproduces the model's logits when it first runs",
    ]
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = quantized if isinstance(quantized, dict) else vars(quantized)
        lines.append(
            f"quantized ({method.get('quant_method', 'of an unknown method')}): what follows is of "
            "the model without; patch wants it so, LokiConfig takes what PEFT can read"
        )
    lines += _memory(model, layers)
    numbered = enumerate(layers)
    for text, group in itertools.groupby(numbered, lambda item: _describe(*item)):
        numbers = [i for i, _ in group]
        span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        lines.append(f"layer {span:8} {text}")
    return "\n".join(lines)


def _memory(model: Any, layers: Sequence[Layer]) -> list[str]:
    """What training takes, in the dtype of the config."""
    found = [d for layer in layers if layer.ffn is not None for d in layer.ffn.projections]
    if not found or any(layer.reason is not None for layer in layers):
        return []
    width = text_config(model).hidden_size

    def of(quota: float, *, protected: bool) -> str:
        return str(memory_of_quota(found, width, quota, protected=protected))

    return [
        f"weights: {weights_size(model) / 1e9:.1f} GB in "
        f"{str(found[0].weight.dtype).removeprefix('torch.')}",
        f"training beside them and the activations, with AdamW: {of(100, protected=True)} for all "
        f"rows, protected; {of(10, protected=True)} with quota=10, protect=True; "
        f"{of(10, protected=False)} with quota=10",
    ]


def build_model(config: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A model of this config with random weights, or on the meta device without.

    Raises:
        ValueError: if transformers knows no language model of this config.
    """
    kinds = _classes_for(config)
    if not kinds:
        raise ValueError(f"transformers knows no language model of a {type(config).__name__}.")
    with device:
        return kinds[0].from_config(config, dtype=dtype)


def load_model(
    name: str | os.PathLike[str], dtype: str = "auto", holding: Collection[str] = ()
) -> Any:
    """A language model of a folder or hub name, by the first auto class that knows it.

    Of a model of images that is transformers' class for text, if there is one: its modules are then
    named otherwise than in the whole model. ``holding`` names modules that it must have, as those
    of an update, else the next class is tried.

    Raises:
        ValueError: for an unknown dtype, a config of which transformers knows no language model, or
            one whose language models lack what is to be held.
        OSError: if there is no such model.
    """
    # a model's own code is not run, and by default a terminal is asked for 15 s whether it may be
    options: Any = {
        "dtype": dtype if dtype == "auto" else dtype_named(dtype),
        "trust_remote_code": False,
    }
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError:  # an adapter's folder, whose base transformers finds
        return transformers.AutoModelForCausalLM.from_pretrained(name, **options)
    kinds = _classes_for(config) or [transformers.AutoModelForCausalLM]
    lacking: set[str] = set()
    for kind in kinds:
        lacking = _lacking(kind, config, holding)
        if not lacking:
            return kind.from_pretrained(name, **options)
    raise ValueError(
        f"a {kinds[-1].__name__} of {name} has no {min(lacking)}: this is another model's update. "
        "That of a classifier or a reward model is merged where the model is loaded by its own "
        "class: loki_kernels.load_adapter(model, FOLDER).merge()."
    )


def _classes_for(config: Any) -> list[Any]:
    """The auto classes that know a config."""
    names = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    classes = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    return [kind for kind in classes if type(config) in kind._model_mapping]


def _lacking(kind: Any, config: Any, names: Collection[str]) -> set[str]:
    """Those that are no modules of such a model."""
    if not names:
        return set()
    with torch.device("meta"):
        model = kind.from_config(config)
    return set(names) - {name for name, _ in model.named_modules()}


def dtype_of(config: Any) -> torch.dtype | None:
    """That of a checkpoint, which a config of several parts says once or in each; None if none."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return dtype_named(dtype) if isinstance(dtype, str) else dtype


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """torch's dtype of that name; ValueError if it has none."""
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is not a torch dtype, such as bfloat16.")
    return dtype


def _describe(number: int, layer: Layer) -> str:
    """One layer, its own number left out, so that equal layers read alike."""

    def general(text: str) -> str:
        return text.replace(f"{layer.name}.", "").replace(layer.name, "the layer")

    if layer.reason is not None:
        return f"refused: {general(layer.reason)}"
    if layer.ffn is None:
        return "no FFN: nothing is trained"
    parts = []
    for down in layer.ffn.projections:
        name = general(f"{down.name}.{down.parameter}")
        parts.append(f"{name} {list(full_shape(down.weight))}, rows along axis {down.axis}")
    lone = layer.ffn.lone
    text = "; ".join(parts)
    if lone is not None and not is_plain_linear(lone.module):
        return f"{text}: a {type(lone.module).__name__}"
    return text
