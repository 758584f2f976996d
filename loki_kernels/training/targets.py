"""What a user names rows by, and whether those rows of this model can be trained."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import UnsupportedModelError
from ..selection import RowSelection
from ..structure import DownProjection, Structure, is_plain_linear
from .linear import LokiLinear

# What names rows: a selection, one list a layer, or the path of a row file.
Rows = RowSelection | Sequence[Sequence[int] | Tensor] | str | os.PathLike[str]


def as_selection(rows: Rows) -> RowSelection:
    """What a user named rows by.

    Raises:
        FileNotFoundError: if there is no such row file.
        ValueError: for unsound rows, or if they are no rows but FFN neurons.
    """
    if isinstance(rows, (str, os.PathLike)):
        rows = RowSelection.load(rows)
    selection = rows if isinstance(rows, RowSelection) else RowSelection(rows)
    if selection.info.get("site", "down_proj") != "down_proj":
        raise ValueError(
            "the selection names FFN neurons (site='ffn_neurons'), which are columns of "
            "down_proj.weight; only rows (site='down_proj') can be trained so far."
        )
    return selection


def check_patchable(structure: Structure) -> None:
    if any(isinstance(module, LokiLinear) for module in structure.causal_lm.modules()):
        raise ValueError(
            "the model is already patched; call unpatch() or merge() on its Patch handle first."
        )
    for _, down_proj in structure.trainable():
        if not is_plain_linear(down_proj.module):
            weight = getattr(down_proj.module, "weight", None)
            raise UnsupportedModelError(
                f"{down_proj.name} is a {type(down_proj.module).__name__} with a "
                f"{type(weight).__name__}, not a plain nn.Linear; patch the model before PEFT "
                "wraps it, and train rows over a quantized base with loki_kernels.peft.LokiConfig."
            )
        if isinstance(down_proj.module.weight, DTensor):
            raise UnsupportedModelError(
                f"the weight of {down_proj.name} is sharded; patch the model before fully_shard."
            )
        if down_proj.module.weight.is_meta:
            raise UnsupportedModelError(
                f"the weight of {down_proj.name} is not in memory (offloaded, or on the meta "
                "device); load the model without offloading."
            )


def assign_rows(
    structure: Structure, selection: RowSelection
) -> list[tuple[DownProjection, Tensor]]:
    """(down-projection, its rows, perhaps none) of every layer that has an FFN.

    Raises:
        ValueError: if the selection was made for another model.
    """
    if len(selection) != len(structure.layers):
        raise ValueError(
            f"the selection has {len(selection)} layers, the model {len(structure.layers)}."
        )
    if selection.info.get("width", structure.hidden_size) != structure.hidden_size:
        raise ValueError(
            f"the selection was made for hidden_size {selection.info['width']}; the model has "
            f"{structure.hidden_size}."
        )
    assigned: list[tuple[DownProjection, Tensor]] = []
    for layer, (rows, down_proj) in enumerate(zip(selection, structure.down_projs, strict=True)):
        if len(rows) and int(rows[-1]) >= structure.hidden_size:
            raise ValueError(
                f"row {int(rows[-1])} of layer {layer} is out of range: the model's hidden_size "
                f"is {structure.hidden_size}."
            )
        if down_proj is not None:
            assigned.append((down_proj, rows))
        elif len(rows):
            raise ValueError(f"the selection has rows of layer {layer}, which has no FFN.")
    return assigned
