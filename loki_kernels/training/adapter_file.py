"""The format of trained rows on disk: tensors named as PEFT names them, files, fingerprints."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import atomic_path, read_safetensors, write_safetensors
from ..fingerprint import rows_fingerprint
from ..sharding import full_shape, full_values, shard_like
from .linear import TRAINED, LokiLinear

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
# Beside a merged checkpoint that cannot hold the trained rows exactly. Not `ADAPTER_FILE`: together
# with a config transformers would load that by itself.
SIDE_FILE = "loki_rows.safetensors"

_KEY = re.compile(rf"base_model\.model\.(.+)\.loki_(index|{'|'.join(TRAINED)})")

# The patched layers of a model by their names.
Layers = Mapping[str, LokiLinear]
# What is kept of a layer: "index", and "rows" or "delta_a" and "delta_b".
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class AdapterConfig:
    """``adapter_config.json``, as far as it is ours.

    Attributes:
        base: name or path of the model the rows were trained on.
        rows: the rows of each layer.
        rank: of LoKI*, or None.
        fingerprint: of the rows that were replaced.
    """

    base: str | None
    rows: list[list[int]]
    rank: int | None
    fingerprint: str | None

    @classmethod
    def load(cls, folder: Path) -> AdapterConfig:
        """Read it from an adapter's folder.

        Raises:
            FileNotFoundError: if the folder has none.
            ValueError: if it is damaged, or of another PEFT method.
        """
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not an adapter: it has no {CONFIG_FILE}.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            method = content["peft_type"]
            if method != "LOKI":
                raise ValueError(f"{path} is an adapter of type {method}; load it with PEFT.")
            return cls(
                content.get("base_model_name_or_path"),
                content["rows"],
                content.get("rank"),
                content.get("fingerprint"),
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not an adapter's config: {error!r}.") from error

    def content(self) -> dict[str, Any]:
        """What `load` reads."""
        return {
            "peft_type": "LOKI",
            "base_model_name_or_path": self.base,
            "rows": self.rows,
            "rank": self.rank,
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True)
class SavedRows:
    """What `ADAPTER_FILE` or `SIDE_FILE` holds.

    Attributes:
        layers: layer name -> its parts.
        fingerprint: of the rows that were replaced, in a side file; an adapter has it in its
            config.
    """

    layers: dict[str, Parts]
    fingerprint: str | None


def layer_parts(layer: LokiLinear) -> Parts:
    """What is kept of a layer; sharded parameters as they are."""
    return {"index": layer.index, **dict(layer.trained_parameters())}


def parts_of(layers: Layers) -> dict[str, Parts]:
    """What is kept of each layer."""
    return {name: layer_parts(layer) for name, layer in layers.items()}


def adapter_tensors(parts_by_layer: Mapping[str, Parts]) -> dict[str, Tensor]:
    """The tensors of a file, on the host; with sharded parameters every process has to ask."""
    return {
        f"base_model.model.{name}.loki_{part}": full_values(tensor).cpu()
        for name, parts in parts_by_layer.items()
        for part, tensor in parts.items()
    }


def write_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write tensors as PEFT reads them."""
    write_safetensors(path, tensors, {"format": "pt", **metadata})


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write the two files of an adapter for PEFT, of this method or another."""
    folder.mkdir(exist_ok=True)
    write_tensors(folder / ADAPTER_FILE, tensors)
    content = config | {"task_type": "CAUSAL_LM", "inference_mode": True}
    with atomic_path(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_side_file(
    folder: str | os.PathLike[str], layers: Layers, parts_by_layer: Mapping[str, Parts]
) -> Path:
    """Write `SIDE_FILE`: these parts of the layers, and what they are an update of."""
    path = Path(folder) / SIDE_FILE
    fingerprint = base_fingerprint(layers)
    write_tensors(path, adapter_tensors(parts_by_layer), fingerprint=fingerprint)
    return path


def read_rows(path: str | os.PathLike[str]) -> SavedRows:
    """Read `ADAPTER_FILE` or `SIDE_FILE`.

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


def load_rows(layers: Layers, saved: SavedRows) -> str | None:
    """Copy what was saved into layers of the same rows; else change nothing and say why not."""
    if saved.layers.keys() != layers.keys():
        return "it has rows of other layers"
    for name, layer in layers.items():
        held, parts = layer_parts(layer), saved.layers[name]
        if not torch.equal(parts["index"], layer.index.cpu()):
            return f"{name} has other rows there"
        if held.keys() != parts.keys() or any(
            tuple(parts[part].shape) != full_shape(held[part]) for part in held
        ):
            return f"{name} has another rank or width there"
    # rows are the same on any base; an update would be added to a checkpoint that has it already
    low_rank = saved.fingerprint is not None and any(x.rank is not None for x in layers.values())
    if low_rank and saved.fingerprint != base_fingerprint(layers):
        return (
            "its low-rank update is of other weights; load the model that was patched, not the "
            "checkpoint beside the file, which holds the update"
        )
    with torch.no_grad():
        for name, layer in layers.items():
            for part, parameter in layer.trained_parameters():
                parameter.copy_(shard_like(saved.layers[name][part].to(parameter.dtype), parameter))
    return None


def base_fingerprint(layers: Layers) -> str:
    """Of the rows that the layers replaced."""
    return rows_fingerprint(layer.original_rows for layer in layers.values())


def check_fingerprint(
    wanted: str | None, found: str, trained_on: str | None, loading: str | None
) -> None:
    """Raise ValueError if rows would replace others than those they were trained to replace."""
    if wanted is None or wanted == found:
        return
    raise ValueError(
        f"the adapter was trained on another base ({trained_on or 'a model without a name'}): the "
        f"rows it replaces have other values in this one ({loading or 'without a name'}). Load the "
        "base it was trained on, with its revision, dtype and quantization."
    )
