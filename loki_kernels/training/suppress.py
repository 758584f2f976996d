"""`suppress`: rows set to zero, to see what they carry."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from ..discovery import find_structure
from .targets import Rows, as_selection, assign_rows, check_patchable


@contextlib.contextmanager
def suppress(model: nn.Module, rows: Rows) -> Iterator[nn.Module]:
    """Zero rows of every down-projection inside the block (the paper's ablation, Table 5a).

    A row's bias is zeroed too, so that its node is silent. The weights come back bit for bit.

    Raises:
        ValueError: for rows that do not fit the model.
        UnsupportedModelError: if its down-projections are not plain linears.
    """
    structure = find_structure(model)
    check_patchable(structure)
    by_layer = assign_rows(structure, as_selection(rows))
    saved: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for down_proj, layer_rows in by_layer:
            for parameter in (down_proj.weight, getattr(down_proj.module, "bias", None)):
                if parameter is None:
                    continue
                index = layer_rows.to(parameter.device)
                saved.append((parameter.data, index, parameter.data[index].clone()))
                parameter.data.index_fill_(0, index, 0)
        yield model
    finally:
        for data, index, values in saved:
            data.index_copy_(0, index, values)
