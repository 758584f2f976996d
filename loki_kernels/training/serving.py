"""Weights for an inference server that answers while a patched model trains."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..sharding import full_values
from ..structure import plain_name
from .adapter_file import Layers
from .rows import TRAINED


def merged_parameters(model: nn.Module, layers: Layers) -> Iterator[tuple[str, Tensor]]:
    """What `Patch.merged_parameters` gives."""
    updates = {f"{name}.{part}" for name in layers for part in TRAINED}
    merged = {f"{name}.{layer.parameter}": layer for name, layer in layers.items()}
    for wrapped, parameter in model.named_parameters():
        name = plain_name(wrapped)
        if name in merged:
            yield name, full_values(merged[name].merged_weight())
        elif name not in updates:
            yield name, full_values(parameter)
