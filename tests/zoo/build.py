"""A tiny random model of every generation class that the installed transformers names."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .sizes import OTHER, OVERRIDES, TEXT

MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)
MOST_PARAMETERS = 6_000_000
VOCABULARY = 97
FIRST_SPECIAL_TOKEN = 80  # ids of images, audio and the like are from here on

_TEXT_PARTS = ("text", "language", "decoder", "llm", "thinker", "vlm")


def class_names() -> dict[str, list[str]]:
    """The classes that each mapping names, sorted."""
    return {mapping: sorted(_names(getattr(modeling_auto, mapping))) for mapping in MAPPINGS}


def _names(mapping: dict[str, Any]) -> set[str]:
    values = mapping.values()
    return {name for value in values for name in ([value] if isinstance(value, str) else value)}


def config_class(name: str) -> type:
    """The config class of a model class."""
    found = getattr(transformers, name).config_class
    if found is not None:
        return found
    for mapping in MAPPINGS:
        for model_type, value in getattr(modeling_auto, mapping).items():
            if value == name:
                return CONFIG_MAPPING[model_type]
    raise LookupError(f"{name} has no config class")


def tiny_config(kind: type, values: dict[str, Any] | None = None, *, text: bool = True) -> Any:
    """A config of small values; ``values`` come first, dicts go to the parts of that name."""
    values = copy.deepcopy(values or {})  # configs write into what they are given
    if dataclasses.is_dataclass(kind):
        names = {field.name for field in dataclasses.fields(kind)}
    else:  # transformers 5.0
        names = set(inspect.signature(kind).parameters)
    parts = dict(getattr(kind, "sub_configs", None) or {})
    table = TEXT if text else OTHER
    chosen = {key: value for key, value in table.items() if key in names}
    if parts:
        default = kind()
        for part in parts:
            inner = getattr(default, part, None)
            is_text = any(word in part for word in _TEXT_PARTS) and part != "depth_decoder_config"
            if is_text:  # the sizes are that part's
                for key in ("hidden_size", "intermediate_size", "num_hidden_layers"):
                    chosen.pop(key, None)
            if inner is not None:
                chosen[part] = tiny_config(type(inner), values.pop(part, None), text=is_text)
    if "kv_lora_rank" in names:  # latent attention has no grouped heads
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    tokens = [key for key in sorted(names) if key.endswith(("_token_id", "_token_index"))]
    tokens = [key for key in tokens if key not in TEXT and not key.startswith("decoder_start")]
    for offset, key in enumerate(tokens):
        chosen[key] = FIRST_SPECIAL_TOKEN + offset % (VOCABULARY - FIRST_SPECIAL_TOKEN)
    return kind(**(chosen | values))


def build(
    name: str, seed: int = 0, device: torch.device | str = "cpu"
) -> transformers.PreTrainedModel:
    """A tiny model of the class in float32, in evaluation mode; or what prevents it.

    It is the same on any device.
    """
    kind = getattr(transformers, name)
    config = tiny_config(config_class(name), OVERRIDES.get(name))
    torch.manual_seed(seed)
    with torch.device("meta"):
        sizes = {key: p.numel() for key, p in kind(config).named_parameters()}
    if sum(sizes.values()) > MOST_PARAMETERS:
        largest = max(sizes, key=sizes.__getitem__)
        raise ValueError(
            f"{sum(sizes.values()):,} parameters, {sizes[largest]:,} of them in {largest}"
        )
    torch.manual_seed(seed)
    model = kind(config).float().eval()
    redraw(model)
    return model.to(device)


def redraw(model: nn.Module) -> None:
    """Take every parameter off its default: no zeros, no norm of ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim >= 2 and not float(parameter.std()) > 0.1:
                parameter.normal_(0.0, 0.2)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
