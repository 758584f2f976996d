"""Hashes of weights, computed where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .sharding import full_values

# The least normal number of float16: bfloat16 values from here on survive a stay in float16.
_FLOAT16_TINY = 2.0**-14


def model_fingerprint(model: nn.Module) -> str:
    """A hash of every weight, its name, shape and dtype.

    Each tensor enters as two integer sums over its bits, plain and weighted by position, which run
    where the tensor lies, at memory speed: not for security, but no training leaves both alike.
    One that is offloaded enters as the name of its checkpoint; of one that is sharded all processes
    have to ask.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.is_meta:
            digest.update(str(getattr(model, "name_or_path", "")).encode())
            continue
        for part in _plain_parts(full_values(tensor)):
            digest.update(" ".join(map(str, _bit_sums(part))).encode())
    return digest.hexdigest()


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a tensor's numbers: of a quantized one its integers and scales."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_parts(getattr(tensor, name))
    elif tensor.numel():
        yield tensor


@dataclass(frozen=True)
class BaseRows:
    """What is kept of the rows that an update is added to, to know them again.

    Attributes:
        fingerprint: of their bfloat16 values, leaving out the smallest, so that it does not depend
            on whether the model was loaded in float32, bfloat16 or (from a bfloat16 checkpoint)
            float16.
        dtype: ``"float32"``, ``"bfloat16"``, ...; ``"quantized"``.
        sketch: of each layer's rows, four sums of all numbers with fixed signs. Those of two copies
            differ in relative size as much as the rows do.
    """

    fingerprint: str
    dtype: str
    sketch: list[list[float]]

    @classmethod
    def of(cls, layers: Sequence[Tensor], *, quantized: bool = False) -> BaseRows:
        """Of rows ``[k, in_features]`` of each layer; of dequantized ones with ``quantized``."""
        dtype = "quantized" if quantized else str(layers[0].dtype).removeprefix("torch.")
        return cls(tensors_fingerprint(layers), dtype, [_sketch(rows.detach()) for rows in layers])

    def why_other(self, present: BaseRows) -> str | None:
        """Why ``present`` are not these rows, nor a copy of them in another dtype."""
        if self.fingerprint == present.fingerprint:
            return None
        # Two quantizations of one model are two roundings of it. Copies in these have one
        # fingerprint: else a base that another task has moved by less than 1 % would be taken.
        dtypes = {self.dtype, present.dtype}
        if len(dtypes - {"quantized"}) == 1 == len(dtypes) or dtypes <= _OF_ONE_FINGERPRINT:
            return "the rows that the update is added to have other values in this model"
        ours, theirs = torch.tensor(self.sketch), torch.tensor(present.sketch)
        if ours.shape != theirs.shape:
            return "the update is of other layers"
        difference = float((ours - theirs).norm() / ours.norm().clamp_min(1e-30))
        allowed = _QUANTIZED if "quantized" in dtypes else _ROUNDED
        if difference <= allowed:
            return None
        return (
            f"the rows that the update is added to were {self.dtype} and are {present.dtype} in "
            f"this model, and differ by {difference:.0%}; copies of one model differ by less than "
            f"{allowed:.0%}"
        )

    def why_merged(self, present: BaseRows, update: Iterable[Tensor]) -> str | None:
        """Why the update ``[..., k, in_features]`` of each layer may not be added to ``present``.

        Over a quantized base that is merged, or in other dtypes where an update is below 1 %,
        `why_other` takes rows that hold the update already for a copy. Sketches are sums, so what
        was added to these rows is the difference of two; it is the update where it stands out from
        what is beside it, roundings, by six times their size in one direction.
        """
        if self.fingerprint == present.fingerprint or len(self.sketch) < _LEAST_LAYERS:
            return None
        added = torch.tensor([_sketch(rows.detach().flatten(0, -2)) for rows in update])
        moved = torch.tensor(present.sketch) - torch.tensor(self.sketch)
        length = float(added.norm().clamp_min(1e-30))
        share = float((moved * added).sum()) / length**2
        beside = float((moved - share * added).norm()) / (moved.numel() - 1) ** 0.5
        if not 0.5 < share < 1.5 or share * length < 6 * beside:
            return None
        return (
            "the rows that the update is added to hold it already; load the model it was trained "
            "on, not a merged one"
        )


# Twelve sums: of chance alone four in 100,000 would stand out by six times their size.
_LEAST_LAYERS = 3

# Of whose values bfloat16 is a rounding of one step; of copies through another dtype it is of two.
_OF_ONE_FINGERPRINT = {"float32", "bfloat16"}

# How far other copies of one model may be apart: 4-bit types are off by 8 to 13 % (nf4, int4),
# float16 by under .5 %; rows of two models by over 100 %.
_QUANTIZED = 0.25
_ROUNDED = 0.01


def tensors_fingerprint(layers: Iterable[Tensor]) -> str:
    """Of bfloat16 values, leaving out the smallest, so that it is the same in other dtypes."""
    digest = hashlib.sha256()
    for rows in layers:
        digest.update(str(tuple(rows.shape)).encode())
        if rows.numel():
            coarse = rows.detach().to(torch.bfloat16)
            coarse = coarse.masked_fill(coarse.abs() < _FLOAT16_TINY, 0.0)
            digest.update(" ".join(map(str, _bit_sums(coarse))).encode())
    return digest.hexdigest()


def _sketch(rows: Tensor) -> list[float]:
    k, width = rows.shape
    sums = rows.float() @ _signs(width, rows.device)
    return [float(x) for x in (sums * _signs(k, rows.device)).sum(0)]


def _signs(count: int, device: torch.device) -> Tensor:
    """``[count, 4]`` of 1 and -1, the same everywhere: bits of a multiplicative hash."""
    places = torch.arange(1, count + 1, device=device)
    hashed = (places * 2654435761) % 2**32
    bits = torch.stack([(hashed >> shift) & 1 for shift in (13, 17, 21, 25)], dim=1)
    return (2 * bits - 1).float()


def _bit_sums(tensor: Tensor) -> tuple[int, int]:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.contiguous().view(-1)
    if bits.dtype == torch.bool or bits.is_complex():
        bits = bits.view(torch.uint8)
    else:
        bits = bits.view(integers[bits.element_size()])
    plain = weighted = 0
    size = min(1 << 22, bits.numel())  # the int64 copies stay at 64 MiB
    place = torch.arange(1, size + 1, device=bits.device)
    for start in range(0, bits.numel(), 1 << 22):
        part = bits[start : start + size].to(torch.int64, copy=True)  # int64 is a view otherwise
        plain += int(part.sum())
        weighted += int(part.mul_(place[: part.numel()]).sum())
        place += size
    return plain, weighted
