"""Which of a module's linears ends it, where their shapes do not tell: by what its code does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .structure import DownProjection, linear_shape


def endings(linears: Sequence[DownProjection], hidden_size: int) -> list[DownProjection]:
    """Of several linears in one module the one that ends it; all of them where none is known to.

    ``gate_proj`` and ``up_proj`` have the shape of ``down_proj`` where intermediate_size is
    hidden_size.
    """
    held: dict[int, list[DownProjection]] = {}
    for linear in linears:
        held.setdefault(id(linear.parent), []).append(linear)
    found: list[DownProjection] = []
    for rivals in held.values():
        last = _last(rivals, hidden_size) if len(rivals) > 1 else None
        found += rivals if last is None else [last]
    return found


def _last(rivals: Sequence[DownProjection], hidden_size: int) -> DownProjection | None:
    """The one whose output is the output of the module that holds them.

    The class's own forward pass runs on a tensor without values, and what stands in for each linear
    gives another. So neither weights, which may be quantized, split or on a disk, nor hooks matter.
    """
    trained = [x for x in rivals if hasattr(x.module, "trained_parameters")]
    if len(trained) == 1:  # the model is patched
        return trained[0]
    module = rivals[0].parent
    given: dict[str, Tensor] = {}
    parts: dict[str, Any] = dict(module.named_children())
    state = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    for name, child in module.named_children():
        shape = linear_shape(child)
        if shape is not None:
            parts[name] = partial(_give, given, name, shape[1])
        elif isinstance(child, nn.Dropout):
            parts[name] = nn.Identity()
        else:
            state += [*child.parameters(), *child.buffers()]
    if state:  # which would meet a tensor without values
        return None
    alike = object.__new__(type(module))
    alike.__dict__.update(module.__dict__, _modules=parts, training=False)
    try:
        output = type(module).forward(alike, torch.empty(1, 1, hidden_size, device="meta"))
    except Exception:  # any code: it takes more than one tensor, or works on values
        return None
    return next((x for x in rivals if given.get(x.attribute) is output), None)


def _give(given: dict[str, Tensor], name: str, out_features: int, x: Tensor) -> Tensor:
    """Stands in for a linear, and keeps what it gave."""
    given[name] = x.new_empty(*x.shape[:-1], out_features)
    return given[name]


def is_down(linear: DownProjection, hidden_size: int, linears: list[DownProjection]) -> bool:
    """Whether a plain or gated up-projection feeds it, or one that fuses gate and up."""
    inner = linear.in_features
    return linear.out_features == hidden_size and any(
        other.out_features in (inner, 2 * inner) for other in linears if other is not linear
    )


def is_gated(down: DownProjection, linears: list[DownProjection]) -> bool:
    """Whether two linears beside it feed it, or one that fuses gate and up."""
    inner, path = down.in_features, down.name.rpartition(".")[0] + "."
    widths = [x.out_features for x in linears if x is not down and x.name.startswith(path)]
    return widths.count(inner) >= 2 or 2 * inner in widths
