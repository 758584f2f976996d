"""Trained rows on disk: the tensors of an adapter, named as PEFT names them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from .files import atomic_path, read_safetensors
from .linear import TRAINED, LoKILinear
from .sharding import full_shape, shard_like, whole

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
# Beside a merged checkpoint that cannot hold the trained rows exactly. Not `ADAPTER_FILE`: together
# with a config transformers would load that by itself.
SIDE_FILE = "loki_rows.safetensors"

_KEY = re.compile(rf"base_model\.model\.(.+)\.loki_(index|{'|'.join(TRAINED)})")

# Of one layer: "index", and "rows" or "delta_a" and "delta_b".
Parts = dict[str, Tensor]


def parts_of(layer: LoKILinear) -> Parts:
    """What is kept of a layer; sharded parameters as they are."""
    return {"index": layer.index, **dict(layer.trained_parameters())}


def named(layers: Mapping[str, Parts]) -> dict[str, Tensor]:
    """An adapter's tensors, on the host; with sharded parameters every process has to ask."""
    return {
        f"base_model.model.{name}.loki_{part}": whole(tensor).cpu().contiguous()
        for name, parts in layers.items()
        for part, tensor in parts.items()
    }


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors atomically."""
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})


def read(path: str | os.PathLike[str]) -> dict[str, Parts]:
    """Layer name -> its parts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds anything but trained rows.
    """
    tensors, _ = read_safetensors(path, "pt")
    layers: dict[str, Parts] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{path} is not a LoKI adapter: it holds {key}.")
        layers.setdefault(match[1], {})[match[2]] = tensor
    for name, parts in layers.items():
        if set(parts) not in ({"index", "rows"}, {"index", "delta_a", "delta_b"}):
            raise ValueError(f"{path} is not whole: of {name} it has {', '.join(sorted(parts))}.")
    return layers


def copy_into(layers: Sequence[tuple[str, LoKILinear]], saved: dict[str, Parts]) -> str | None:
    """Copy what was saved into layers of the same rows; else change nothing and say why not."""
    if saved.keys() != {name for name, _ in layers}:
        return "it has rows of other layers"
    for name, layer in layers:
        own, parts = parts_of(layer), saved[name]
        if not torch.equal(parts["index"], layer.index.cpu()):
            return f"{name} has other rows there"
        if own.keys() != parts.keys() or any(
            tuple(parts[p].shape) != full_shape(own[p]) for p in own
        ):
            return f"{name} has another rank or width there"
    with torch.no_grad():
        for name, layer in layers:
            for part, parameter in layer.trained_parameters():
                parameter.copy_(shard_like(saved[name][part].to(parameter.dtype), parameter))
    return None
