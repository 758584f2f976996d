"""Hashes of weights, computed where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# The least normal number of float16: bfloat16 values from here on survive a stay in float16.
_FLOAT16_TINY = 2.0**-14


def model_fingerprint(model: nn.Module) -> str:
    """A hash of every weight, its name, shape and dtype.

    Each tensor enters as two integer sums over its bits, plain and weighted by position, which run
    where the tensor lies, at memory speed: not for security, but no training leaves both alike.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in _plain_parts(tensor.detach()):
            digest.update(" ".join(map(str, _bit_sums(part))).encode())
    return digest.hexdigest()


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a tensor's numbers: of a quantized one its integers and scales."""
    if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_parts(getattr(tensor, name))
    elif tensor.numel():
        yield tensor


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
