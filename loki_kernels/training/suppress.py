"""`suppress`: rows set to zero, to see what they carry."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from ..discovery import find_structure
from ..structure import DownProjection
from .arithmetic import tell_autograd
from .targets import Rows, as_selection, assign_rows, check_patchable


@contextlib.contextmanager
def suppress(model: nn.Module, rows: Rows) -> Iterator[nn.Module]:
    """Zero rows of every down-projection inside the block (the paper's ablation, Table 5a).

    A row's bias is zeroed too, so that its node is silent. The weights come back bit for bit. A
    backward pass belongs on the side of the block's edge where its forward pass ran; elsewhere it
    raises torch's RuntimeError (modified by an inplace operation).

    Raises:
        ValueError: for rows that do not fit the model.
        UnsupportedModelError: if its down-projections cannot be patched.
    """
    structure = find_structure(model)
    check_patchable(structure)
    by_layer = assign_rows(structure, as_selection(rows))
    saved: list[tuple[Tensor, int, Tensor, Tensor]] = []
    try:
        for down_proj, layer_rows in by_layer:
            for parameter, axis in ((down_proj.weight, down_proj.axis), *_biases(down_proj)):
                data, index = parameter.data, layer_rows.to(parameter.device)
                saved.append((parameter, axis, index, data.index_select(axis, index)))
                data.index_fill_(axis, index, 0)
                tell_autograd(parameter)
        yield model
    finally:
        for parameter, axis, index, values in saved:
            parameter.data.index_copy_(axis, index, values)
            tell_autograd(parameter)


def _biases(down_proj: DownProjection) -> Iterator[tuple[Tensor, int]]:
    """What is added to the product, and the axis of its rows."""
    holders = [(down_proj.module, "bias"), (down_proj.module, f"{down_proj.parameter}_bias")]
    if down_proj.of_experts:
        holders.append((down_proj.parent, "bias"))  # of the sum over experts (JetMoe)
    for module, name in holders:
        bias = getattr(module, name, None)
        if isinstance(bias, Tensor) and bias.shape[-1] == down_proj.weight.shape[down_proj.axis]:
            yield bias, bias.ndim - 1
