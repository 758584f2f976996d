"""Trained rows on disk: the tensors of an adapter, named as PEFT names them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files import read_safetensors, write_safetensors
from ..fingerprint import rows_fingerprint
from ..sharding import full_shape, full_values, shard_like
from .linear import TRAINED, LokiLinear

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
# Beside a merged checkpoint that cannot hold the trained rows exactly. Not `ADAPTER_FILE`: together
# with a config transformers would load that by itself.
SIDE_FILE = "loki_rows.safetensors"

_KEY = re.compile(rf"base_model\.model\.(.+)\.loki_(index|{'|'.join(TRAINED)})")

# Of one layer: "index", and "rows" or "delta_a" and "delta_b".
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class SavedRows:
    """What a file holds.

    Attributes:
        layers: layer name -> its parts.
        fingerprint: of the rows that were replaced, in a side file; an adapter has it in its
            config.
    """

    layers: dict[str, Parts]
    fingerprint: str | None


def trained_parts(layer: LokiLinear) -> Parts:
    """What is kept of a layer; sharded parameters as they are."""
    return {"index": layer.index, **dict(layer.trained_parameters())}


def adapter_tensors(layers: Mapping[str, Parts]) -> dict[str, Tensor]:
    """An adapter's tensors, on the host; with sharded parameters every process has to ask."""
    return {
        f"base_model.model.{name}.loki_{part}": full_values(tensor).cpu()
        for name, parts in layers.items()
        for part, tensor in parts.items()
    }


def write_adapter(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write an adapter's tensors."""
    write_safetensors(path, tensors, {"format": "pt", **metadata})


def write_side_file(
    folder: str | os.PathLike[str],
    layers: Sequence[tuple[str, LokiLinear]],
    parts: Mapping[str, Parts],
) -> Path:
    """Write `SIDE_FILE`: ``parts`` of the layers, and what they are an update of."""
    path = Path(folder) / SIDE_FILE
    write_adapter(path, adapter_tensors(parts), fingerprint=base_fingerprint(layers))
    return path


def base_fingerprint(layers: Sequence[tuple[str, LokiLinear]]) -> str:
    """Of the rows that the layers replaced."""
    return rows_fingerprint(layer.original_rows for _, layer in layers)


def read_adapter(path: str | os.PathLike[str]) -> SavedRows:
    """Read an adapter's tensors, or a side file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds anything but trained rows.
    """
    tensors, metadata = read_safetensors(path, "pt")
    layers: dict[str, Parts] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{path} is not a LoKI adapter: it holds {key}.")
        layers.setdefault(match[1], {})[match[2]] = tensor
    for name, parts in layers.items():
        if set(parts) not in ({"index", "rows"}, {"index", "delta_a", "delta_b"}):
            raise ValueError(f"{path} is not whole: of {name} it has {', '.join(sorted(parts))}.")
    return SavedRows(layers, metadata.get("fingerprint"))


def load_rows(layers: Sequence[tuple[str, LokiLinear]], saved: SavedRows) -> str | None:
    """Copy what was saved into layers of the same rows; else change nothing and say why not."""
    if saved.layers.keys() != {name for name, _ in layers}:
        return "it has rows of other layers"
    for name, layer in layers:
        own, parts = trained_parts(layer), saved.layers[name]
        if not torch.equal(parts["index"], layer.index.cpu()):
            return f"{name} has other rows there"
        if own.keys() != parts.keys() or any(
            tuple(parts[p].shape) != full_shape(own[p]) for p in own
        ):
            return f"{name} has another rank or width there"
    # rows are the same on any base; an update would be added to a checkpoint that has it already
    low_rank = saved.fingerprint is not None and any(layer.rank is not None for _, layer in layers)
    if low_rank and saved.fingerprint != base_fingerprint(layers):
        return (
            "its low-rank update is of other weights; load the model that was patched, not the "
            "checkpoint beside the file, which holds the update"
        )
    with torch.no_grad():
        for name, layer in layers:
            for part, parameter in layer.trained_parameters():
                parameter.copy_(shard_like(saved.layers[name][part].to(parameter.dtype), parameter))
    return None
