"""Rows of a weight and their updates as tensors: taking, forming, writing, comparing, checking."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..ops._check import without_autocast
from ..ops._products import rounded_sum
from ..placement import free_bytes
from ..sharding import is_sharded

HOST = torch.device("cpu")
# Copies of a weight that a device has to have free for one: itself, and what forming the next
# layer's rows takes meanwhile, by count four of all rows of bfloat16, protected.
_ROOM = 6


def check_rank(rank: object) -> None:
    """Raise ValueError unless ``rank`` is None or a positive integer."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a positive integer or None; it is {rank!r}.")


def sorted_index(rows: Tensor, out_features: int) -> Tensor:
    """Row numbers, int64 ``[k]``, sorted; ValueError if one is out of range or twice there."""
    rows = torch.as_tensor(rows)
    if rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(f"rows must be integers [k]; they are {rows.dtype} {tuple(rows.shape)}.")
    index = rows.to(torch.int64).sort().values
    if len(index) and (int(index[0]) < 0 or int(index[-1]) >= out_features):
        bad = index[0] if int(index[0]) < 0 else index[-1]
        raise ValueError(f"row {int(bad)} is out of range for a weight of {out_features} rows.")
    if (index[1:] == index[:-1]).any():
        raise ValueError(f"row {int(index[1:][index[1:] == index[:-1]][0])} is given twice.")
    return index


def initial_factors(shape: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
    """Of LoKI*, for rows ``[..., k, in_features]``: zeros ``[..., k, r]``, and
    ``[..., r, in_features]`` normal with variance 1 / in_features."""
    *experts, count, in_features = shape
    return (
        torch.zeros(*experts, count, rank, dtype=torch.float32),
        torch.randn(*experts, rank, in_features, dtype=torch.float32) / math.sqrt(in_features),
    )


def moved_index(index: Tensor, device: torch.device) -> Tensor:
    """An index elsewhere, of which a training pass can keep what inference mode has moved."""
    with torch.inference_mode(False):
        return index.to(device)


def take_rows(weight: Tensor, index: Tensor, axis: int) -> Tensor:
    """Rows ``[..., k, in_features]`` of a weight that numbers them along ``axis``."""
    return weight.index_select(axis, index).movedim(axis, -2)


def where_it_fits(weight: Tensor) -> Tensor:
    """A weight that is to be copied, on the host where its device has not room for the copy."""
    free = None if weight.is_meta else free_bytes(weight.device)
    return weight if free is None or _ROOM * weight.nbytes <= free else weight.to(HOST)


def write_into(weight: Tensor, rows: Tensor, index: Tensor, axis: int) -> None:
    """The inverse of `take_rows`, in place; rounded where the weight is coarser."""
    weight.index_copy_(axis, index, rows.movedim(-2, axis).to(weight.dtype))


def whole_update(a: Tensor, b: Tensor | None = None) -> Tensor:
    """``[..., k, in_features]``: ``a``, or of LoKI* the product of its factors.

    Under autocast too in their dtype: in 16 bits what is below half a rounding of the base would do
    nothing in training and act once it is merged.
    """
    if b is None:
        return a
    with without_autocast(a):
        return a @ b


@torch.no_grad()
def updated_rows(base: Tensor, delta_a: Tensor, delta_b: Tensor | None = None) -> Tensor:
    """``base + delta_a @ delta_b`` (``base + delta_a`` without a second factor), rounded once.

    In the base's dtype, where the base lies.
    """
    if delta_b is not None:
        wide = torch.promote_types(torch.promote_types(base.dtype, delta_a.dtype), torch.float32)
        with without_autocast(delta_a):  # which forms the product in 16 bits
            delta_a = delta_a.to(wide) @ delta_b.to(delta_a.device, wide)
    return rounded_sum(base, delta_a.to(base.device), base.dtype)


def same_rows(
    got: Tensor,
    want: Tensor,
    *,
    within: float = 1.0,
    dtype: torch.dtype = torch.float32,
    besides: float = 0.0,
) -> bool:
    """Whether rows are the same but for a rounding, or ``within`` one, to the coarser dtype.

    ``dtype`` is one that either has been in before; ``besides`` is the norm of what else may
    differ.
    """
    eps = max(torch.finfo(x).eps for x in (got.dtype, want.dtype, dtype))
    difference = got.float() - want.to(got.device).float()
    return float(difference.norm()) <= within * eps * float(want.float().norm()) + besides


def of_products(read: Sequence[Tensor], formed: Sequence[Tensor]) -> float:
    """The norm of what another device's products may move of an update's rows.

    For its factors as they are trained and as they act: products in TF32, whose operands have 11
    bits, differ by some 2**-11 of what a protection removes, or of LoKI*'s ``a @ b``.
    """
    whole = whole_update(*read).float()
    removed = whole - formed[0].float() if len(formed) == 1 else whole
    return 2**-9 * float(removed.norm())


def coarse_dtype(parameters: Iterable[Tensor]) -> str | None:
    """The dtype of updates that a trainer has rounded; None where small steps are kept.

    DeepSpeed rounds too and keeps a float32 copy, and FSDP2 rounds for a product alone.
    """
    for p in parameters:
        if p.requires_grad and p.element_size() < 4 and not is_sharded(p):
            return None if hasattr(p, "_hp_mapping") else str(p.dtype).removeprefix("torch.")
    return None


def check_gradients(
    parameters: Iterable[nn.Parameter], check: Callable[[], None]
) -> list[RemovableHandle]:
    """Call ``check`` where a gradient of one is made; of those that are not checked yet.

    Parameters that copying or loading made anew have no hooks, so this is asked before every pass.
    """

    def called(_gradient: Tensor) -> None:
        check()

    return [
        parameter.register_hook(called)
        for parameter in parameters
        if parameter.requires_grad and not parameter._backward_hooks
    ]


def tell_autograd(weight: Tensor) -> None:
    """Have a backward pass that is to come raise, whose rows were changed past autograd."""
    if not weight.is_inference():
        torch.autograd.graph.increment_version(weight)


def version_of(tensor: Tensor) -> int | None:
    """How often autograd saw its values change; None of one that inference mode made."""
    return None if tensor.is_inference() else tensor._version


def place_of(tensor: Tensor) -> int:
    """Where its values lie, by which others that stand in for a while are told; 0 where sharded.

    A backward pass that is to come keeps the memory of those it was begun with.
    """
    return 0 if is_sharded(tensor) else tensor.data_ptr()


def digest_of(fingerprint: str) -> Tensor:
    """A fingerprint as a state dict holds it."""
    return torch.tensor(list(bytes.fromhex(fingerprint)), dtype=torch.uint8)
