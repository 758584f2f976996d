"""Triton's `integrate_path`, then its `count_lowest`, which passes over a sample with a NaN."""

from __future__ import annotations

from torch import Tensor

from .._check import unsupported_dtype
from ..count_lowest import triton_impl as count_lowest
from ..integrate_path import triton_impl as integrate_path
from .torch_impl import in_two_steps


def unsupported(
    gradients: Tensor, _weights: Tensor, z: Tensor | None, baseline: Tensor | None, *_: object
) -> str | None:
    return unsupported_dtype(gradients, z, baseline) or count_lowest.unsupported(gradients)


forward = in_two_steps(integrate_path.forward, count_lowest.forward)
