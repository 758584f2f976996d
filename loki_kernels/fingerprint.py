"""Hashes of weights, computed where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# The least normal number of float16: bfloat16 values from here on survive a stay in float16.
_FLOAT16_TINY = 2.0**-14


def model_fingerprint(model: nn.Module) -> str:
    """A hash of every weight, its name, shape and dtype.

    Each tensor enters as two wrap-around integer sums over its bits, plain and weighted by
    position, which any change alters and which run where the tensor lies, at memory speed.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel():
            digest.update(" ".join(map(str, _bit_sums(tensor.detach()))).encode())
    return digest.hexdigest()


def rows_fingerprint(layers: Iterable[Tensor]) -> str:
    """A hash of rows of each layer, ``[k, in_features]``.

    Of their bfloat16 values, leaving out the smallest, so that it does not depend on whether the
    model was loaded in float32, bfloat16 or (from a bfloat16 checkpoint) float16.
    """
    digest = hashlib.sha256()
    for rows in layers:
        digest.update(str(tuple(rows.shape)).encode())
        if rows.numel():
            coarse = rows.detach().to(torch.bfloat16)
            coarse = coarse.masked_fill(coarse.abs() < _FLOAT16_TINY, 0.0)
            digest.update(" ".join(map(str, _bit_sums(coarse))).encode())
    return digest.hexdigest()


def _bit_sums(tensor: Tensor) -> tuple[int, int]:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.contiguous().view(-1)
    if bits.dtype == torch.bool or bits.is_complex():
        bits = bits.view(torch.uint8)
    else:
        bits = bits.view(integers[bits.element_size()])
    plain = weighted = 0
    for start in range(0, bits.numel(), 1 << 22):  # the int64 copies stay at 64 MiB
        part = bits[start : start + (1 << 22)].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + part.numel(), device=part.device)
        plain += int(part.sum())
        weighted += int((part * place).sum())
    return plain, weighted
