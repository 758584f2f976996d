"""Updated rows written into the weights they belong to, all layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._check import check_index, check_shape
from .._dispatch import Backend, check_backend, register


def sync_rows(
    weights: Sequence[Tensor],
    base: Sequence[Tensor],
    updates: Sequence[Tensor],
    indices: Sequence[Tensor],
    *,
    backend: Backend | None = None,
) -> list[Tensor]:
    """``weights[l][indices[l]] = base[l] + updates[l]`` for every layer l, in place.

    Args:
        weights: ``[out_features, in_features]`` each, on one device, of one dtype; changed. Pass
            ``.data``: autograd takes no notice.
        base: ``[k, in_features]`` each, of the weights' dtype.
        updates: ``[k, in_features]`` each, of one dtype. The sum is made in float32 (float64 where
            one of both is that) and rounded to the nearest of the weights'.
        indices: ``[k]`` int64 each, in [0, out_features), distinct; also over layers, where several
            are one weight.
        backend: one of `BACKENDS`; None chooses (`loki_kernels.backends`).

    Returns:
        The weights.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an unknown backend.
        RuntimeError: if a backend asked for by name cannot run.
    """
    check_backend(backend)
    counts = [len(tensors) for tensors in (weights, base, updates, indices)]
    if len(set(counts)) > 1:
        raise ValueError(
            f"weights, base, updates and indices must be equally many; they are {counts}."
        )
    for weight, own, update, index in zip(weights, base, updates, indices, strict=True):
        if weight.ndim != 2:
            raise ValueError(
                f"a weight must be [out_features, in_features]; it is {list(weight.shape)}."
            )
        check_shape("base", own, check_index(index), weight.shape[1])
        check_shape("update", update, check_index(index), weight.shape[1])
    for name, tensors in (("weights and base", [*weights, *base]), ("updates", updates)):
        kinds = {(x.device, x.dtype) for x in tensors}
        if len(kinds) > 1:
            raise ValueError(f"{name} must share a device and a dtype; they have {kinds}.")
    if weights:
        updates = [update.detach() for update in updates]
        torch.ops.loki_kernels.sync_rows(list(weights), list(base), updates, list(indices), backend)
    return list(weights)


register(
    "sync_rows",
    "(Tensor(a!)[] weights, Tensor[] base, Tensor[] updates, Tensor[] indices) -> ()",
    lambda *_: None,
)
