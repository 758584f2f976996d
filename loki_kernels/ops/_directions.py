"""Protected directions: what an update leaves alone of a layer's inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._check import without_autocast
from ._products import STEP


def padded_count(directions: int) -> int:
    """How many columns `padded` gives so many."""
    return directions + -directions % STEP


def padded(directions: Tensor) -> Tensor:
    """U with columns of zeros up to the next multiple of 16, which leave nothing out.

    Tensor cores take other widths by slower kernels (`_products.STEP`); a fourteenth of the
    features is one of 14,336 and of few others: 878 at 12,288, 586 at 8,192.
    """
    missing = padded_count(directions.shape[-1]) - directions.shape[-1]
    return functional.pad(directions, (0, missing)) if missing else directions


def leave_out(delta: Tensor, directions: Tensor | None) -> Tensor:
    """``delta (I - U U^T)`` for delta ``[..., in_features]`` and U ``[in_features, r]``.

    For delta ``[E, k, in_features]`` of experts with U ``[E, in_features, r]`` each one's.

    The products are of U's dtype, the difference of delta's: a bfloat16 U leaves some .4 % of what
    is removed, 2e-5 of its energy. (Rows that are written into bfloat16 weights are rounded after,
    in every direction alike.) Of float16, in which small gradients are zero, they are of float32.
    """
    if directions is None:
        return delta
    if directions.dtype == torch.float16:
        directions = directions.float()
    with without_autocast(delta):
        held = delta.to(directions.dtype) @ directions
        removed = held @ directions.mT
        if torch.promote_types(delta.dtype, removed.dtype) != delta.dtype:
            removed = removed.to(delta.dtype)
        # of two dtypes: a copy in float32 would be read and written again, 30 GB a step at 8B
        return delta - removed


def acting_factors(
    a: Tensor, b: Tensor | None, directions: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The factors of an update ``a @ b`` (``a``) without the directions that it leaves alone."""
    return (leave_out(a, directions), None) if b is None else (a, leave_out(b, directions))


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Keep tensors for the backward pass, directions as the last of them, or None.

    What offloads activations sends all that is saved for it to the host and back but parameters,
    and so would the directions, once a layer and pass; a compiler sees what is saved alone.
    """
    *others, directions = tensors
    compiled = torch.compiler.is_compiling()
    ctx.directions = None if compiled else directions
    ctx.save_for_backward(*others, directions if compiled else None)


def kept(ctx: Any) -> list[Any]:
    """What `keep` has kept."""
    *others, directions = ctx.saved_tensors
    return [*others, ctx.directions if directions is None else directions]


class LeaveOutOfGradient(torch.autograd.Function):
    """Passes an update on as it is, and its gradient without the protected directions.

    For a product whose weight holds the protected update already.
    """

    @staticmethod
    def forward(ctx: Any, update: Tensor, directions: Tensor) -> Tensor:
        ctx.directions = directions  # not saved for backward, as in `keep`
        return update.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return leave_out(grad, ctx.directions), None
