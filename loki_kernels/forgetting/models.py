"""The two models of a comparison: loaded when they are needed, and left as they were."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import import_extra
from ..inspection import load_model
from ..placement import device_to_use
from ..sharding import is_partitioned, is_sharded, reshard, settle
from ..structure import text_config, unwrap
from ..tokenizing import load_tokenizer, writes_chats
from ..training import load_adapter
from ..training.adapter_file import ADAPTER_FILE, PREFIX, read_saved
from ..training.loading import check_there
from ..training.rows import LokiRows
from ..training.targets import trained_whole

logger = logging.getLogger(__name__)

# A folder's or the hub's name, or a model in memory.
Model = str | os.PathLike[str] | nn.Module


def is_name(model: object) -> bool:
    return isinstance(model, (str, os.PathLike))


def name_of(model: Any) -> str:
    """What a result calls a model."""
    if is_name(model):
        return str(os.fspath(model))
    return getattr(model, "name_or_path", "") or type(model).__name__


def check_pair(base: Model, tuned: Model | None) -> Path | None:
    """The config of the adapter that ``tuned`` names, or None, before any weight is read.

    Raises:
        FileNotFoundError: if a folder that is named does not exist.
        ValueError: for two models that cannot be compared.
    """
    if _find_adapter(base) is not None:
        raise ValueError(f"{base} is an adapter; the base is the model that it was trained on.")
    if tuned is None:
        if is_name(base):
            raise ValueError(
                "name a second model; only a model in memory that is patched or PEFT's has a base "
                "of its own."
            )
        return None
    if not is_name(base) and not is_name(tuned) and unwrap(base) is unwrap(tuned):
        raise ValueError(
            "base and tuned are one model in memory; drift(model) compares a patched or PEFT's "
            "model with its own base."
        )
    adapter = _find_adapter(tuned)
    if adapter is not None:
        return adapter
    sizes = [_vocab_size(model) for model in (base, tuned)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{name_of(base)} has a vocabulary of {sizes[0]} tokens and {name_of(tuned)} one of "
            f"{sizes[1]}; only models of one vocabulary can be compared."
        )
    return None


def _find_adapter(model: Any) -> Path | None:
    if not is_name(model):
        return None
    path = Path(os.fspath(model))
    if not path.is_dir() and (path.is_absolute() or len(path.parts) > 2):  # no hub name
        raise FileNotFoundError(f"the folder {path} does not exist.")
    found = find_adapter_config_file(os.fspath(model))
    return None if found is None else Path(found)


def _vocab_size(model: Any) -> int | None:
    if is_name(model):
        whole = AutoConfig.from_pretrained(os.fspath(model), trust_remote_code=False)
        config: Any = whole.get_text_config()
    else:
        config = text_config(unwrap(model))
    size: int | None = getattr(config, "vocab_size", None)
    return size


def tokenizer_of_pair(base: Model, tuned: Model | None, tokenizer: Any) -> Any:
    """The user's, or that of the models that are named; None if there is none.

    Raises:
        ValueError: if the two models' tokenizers number a token differently.
    """
    found = [find_own_tokenizer(model) for model in (base, tuned) if is_name(model)]
    known = [each for each in found if each is not None]
    if len(known) == 2:
        first, second = (each.get_vocab() for each in known)
        if any(second.get(token, number) != number for token, number in first.items()):
            raise ValueError(
                f"the tokenizers of {base} and {tuned} number tokens differently; only models of "
                "one vocabulary can be compared."
            )
    if tokenizer is not None:
        return tokenizer
    # the base of a chat model has seldom a template
    with_template = (t for t in known if writes_chats(t))
    return next(with_template, next(iter(known), None))


def find_own_tokenizer(name: Any) -> Any:
    """The tokenizer that lies beside a model or an adapter; None if there is none."""
    try:
        return load_tokenizer(name)
    except (ImportError, KeyError, OSError, ValueError):  # an adapter's folder often has none
        return None


def open_model(
    model: Any, dtype: str, device: str | None, holding: Collection[str] = ()
) -> nn.Module:
    """A model that is given stays where it is; one that is named goes to ``device``.

    ``holding`` names modules that it must have.
    """
    if isinstance(model, nn.Module):
        return model
    loaded = load_model(os.fspath(model), dtype, holding)
    loaded.to(device_to_use(device))
    return loaded  # type: ignore[no-any-return]


def modules_of_adapter(name: Any, adapter: Path) -> set[str]:
    """Modules that the base must have for this library's adapter; of another method nobody says.

    Raises:
        ValueError: if it is damaged.
    """
    if not _is_ours(adapter):
        return set()
    return read_saved(name).modules


def _is_ours(adapter: Path) -> bool:
    return bool(json.loads(adapter.read_text(encoding="utf-8")).get("peft_type") == "LOKI")


@contextlib.contextmanager
def with_adapter(model: nn.Module, name: Any, adapter: Path, *, keeps: bool) -> Iterator[nn.Module]:
    """A base with an adapter of any method, of this name and config, which is taken off again.

    ``keeps``: whether the base is used afterwards.

    Raises:
        ValueError: if the adapter does not fit, or does not leave a base that is kept as it was.
        ImportError: if it is one of PEFT's, which is not installed.
    """
    if _is_ours(adapter):
        with _random_numbers_kept(model):
            handle = load_adapter(model, os.fspath(name))
        with handle:
            yield handle.model
        return
    peft = import_extra("peft", "peft", f"{name} is an adapter of PEFT's")
    config = peft.PeftConfig.from_pretrained(str(adapter.parent))
    meant, own = Path(config.base_model_name_or_path or "").name, getattr(model, "name_or_path", "")
    if meant and own and meant != Path(own).name:
        logger.warning("%s was trained on %s, and is measured on %s.", name, meant, own)
    written = (_writes_to_base(config) or _values_of_base(name, config, model)) if keeps else None
    if written is not None:
        raise ValueError(
            f"{name} changes values of its base when it is put on ({written}); name the base too, "
            "so that it is loaded for this alone."
        )
    # PEFT's own unload() leaves modules that were trained whole, and some methods have none
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = [(module, dict(module._modules), module.training) for module in model.modules()]
    known = "peft_config" in model.__dict__
    try:
        try:
            with warnings.catch_warnings(), _random_numbers_kept(model):
                # what is missing stays as it was drawn: no update
                warnings.filterwarnings("error", message=".*missing adapter keys")
                around = peft.PeftModel.from_pretrained(model, os.fspath(name))
        except (RuntimeError, UserWarning) as error:  # PEFT puts its layers in before it reads
            raise ValueError(f"{name} does not fit {name_of(model)}: {error}") from error
        yield around
    finally:
        for module, children, training in modules:
            module._modules.clear()
            module._modules.update(children)
            module.training = training
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        if not known:
            model.__dict__.pop("peft_config", None)


def _values_of_base(name: Any, config: Any, model: nn.Module) -> str | None:
    """A parameter of which an adapter's file holds other values than the base has.

    PEFT saves embeddings that were resized, or have an adapter of their own, and writes them into
    the base.
    """
    held: Any = cached_file
    file = held(os.fspath(name), ADAPTER_FILE, _raise_exceptions_for_missing_entries=False)
    if file is None:  # another format
        return None
    own = dict(model.named_parameters(remove_duplicate=False))
    copied = tuple(getattr(config, "modules_to_save", None) or ())
    with safe_open(file, framework="pt") as tensors:
        for key in map(str, tensors.keys()):
            known = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            if known not in own or known.rpartition(".")[0].endswith(copied):
                continue
            value = tensors.get_tensor(key).to(own[known])
            # one of another shape does not fit, as PEFT says
            if value.shape == own[known].shape and not torch.equal(value, own[known]):
                return known
    return None


def _random_numbers_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Generators go on as they would have: an adapter's factors are drawn before they are read."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    kept: AbstractContextManager[None] = torch.random.fork_rng(sorted(devices, key=str))
    return kept


def _writes_to_base(config: Any) -> str | None:
    """What of an adapter's config makes PEFT change the base itself; None if nothing does."""
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _HARMLESS_STARTS:
        return f"init_lora_weights={start!r}"
    for name in ("kasa_config", "layer_replication"):
        if getattr(config, name, None):
            return name
    bias = getattr(config, "bias", "none")
    return None if bias in (None, "none") else f"bias={bias!r}"


# Of LoRA's starts those that draw its own factors and leave the base's weights.
_HARMLESS_STARTS = ("gaussian", "orthogonal", "eva", "mica")


@contextlib.contextmanager
def without_update(model: Any) -> Iterator[None]:
    """A patched or PEFT's model as its base.

    Raises:
        ValueError: if it is neither, an adapter is merged, or weights of the base are trained
            beside it or the rows.
    """
    if hasattr(model, "disable_adapter"):
        written = next(filter(None, map(_writes_to_base, model.peft_config.values())), None)
        if written is not None:
            raise ValueError(
                f"with its adapters off this model is not its base ({written}). Name a second "
                "model."
            )
        if any(getattr(module, "merged", False) is True for module in model.modules()):
            # which PEFT would take out, by a rounding not as it was, and leave so
            raise ValueError(
                "an adapter is merged into the base (merge_adapter); call unmerge_adapter() first."
            )
        beside = next(_trained_of_base(model), None)
        if beside is not None:
            raise ValueError(
                f"{beside} is trained beside the adapter and its base is not kept. Name a second "
                "model."
            )
        settle(model)  # FSDP2 asks once which weights are trained, and none is for a moment
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            with model.disable_adapter():
                yield
        finally:  # PEFT enables all of an active adapter, also what was frozen of it
            for parameter, flag in trained:
                parameter.requires_grad_(flag)
        return
    try:
        keep = scaler_of(layers_to_scale(model))
    except ValueError as error:
        raise ValueError(f"{error} Name a second model.") from error
    try:
        keep(0.0)
        yield
    finally:
        keep(1.0)


def _trained_of_base(model: nn.Module, name: str = "", theirs: bool = False) -> Iterator[str]:
    """Names of the trained parameters of a PEFT's model that no adapter holds.

    ``theirs``: whether the module is part of one of PEFT's, in which its parameters are an
    adapter's, but for what such a module keeps of the model under these names.
    """
    # FSDP2 makes a class of its own, in torch, of each that it shards
    packages = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    theirs = theirs or not packages.isdisjoint(("peft", "loki_kernels"))
    if not theirs:
        for parameter, values in model.named_parameters(recurse=False):
            if values.requires_grad:
                yield f"{name}.{parameter}".lstrip(".")
    for child, module in model.named_children():
        of_base = child in ("base_model", "model", "base_layer", "original_module")
        yield from _trained_of_base(module, f"{name}.{child}", theirs and not of_base)


def layers_to_scale(model: nn.Module) -> list[LokiRows]:
    """The patched layers of a model whose whole update can be scaled.

    Raises:
        ValueError: if the model is not patched, trains modules whole beside the rows, or its update
            cannot be written here.
    """
    causal_lm = unwrap(model)
    reshard(causal_lm)
    layers = [module for module in causal_lm.modules() if isinstance(module, LokiRows)]
    if not layers:
        raise ValueError(
            "the model is not patched; loki_kernels.load_adapter patches with an adapter of rows."
        )
    for layer in layers:
        check_there(layer)
    whole = trained_whole(causal_lm)
    if whole:
        raise ValueError(f"{next(iter(whole))} is trained whole and its base is not kept.")
    if any(layer.held for layer in layers):
        raise ValueError("inside handle.inference() the rows stay as they are; leave it first.")
    if any(is_partitioned(_factor(layer)) for layer in layers):
        raise ValueError("ZeRO-3 keeps the update elsewhere.")
    return layers


def _factor(layer: LokiRows) -> nn.Parameter:
    """What a layer's update is proportional to: itself, or LoKI*'s ``delta_b``."""
    return layer.trained_parameters()[-1][1]


def scaler_of(layers: Sequence[LokiRows]) -> Callable[[float], None]:
    """What makes the layers' update a share of what it is now; 1 puts it back bit for bit.

    It keeps copies on the host, where there is room beside a training: of all rows 7.5 GB at 8B.
    Of sharded ones this process's part stays where it is.
    """
    factors = list(map(_factor, layers))  # FSDP2 has others in their place after a forward pass
    whole = [
        f.detach().clone() if is_sharded(f) else f.detach().to("cpu", copy=True) for f in factors
    ]
    read = [layer for layer in layers if layer.is_as_read()]

    @torch.no_grad()
    def keep(share: float) -> None:
        for factor, values in zip(factors, whole, strict=True):
            if share:
                factor.copy_(values).mul_(share)
            else:  # also of what has diverged
                factor.zero_()
        for layer in read if share == 1 else ():
            layer.note_as_read()

    return keep
