"""torch's `integrate_path`, then the C++ `count_lowest`."""

from __future__ import annotations

from torch import Tensor

from ..count_lowest import cpp_impl as count_lowest
from ..integrate_path import torch_impl as integrate_path
from .torch_impl import in_two_steps, passing_over_nan


def unsupported(
    gradients: Tensor, _weights: Tensor, z: Tensor | None, baseline: Tensor | None, *_: object
) -> str | None:
    return count_lowest.unsupported(gradients)


forward = in_two_steps(integrate_path.forward, passing_over_nan(count_lowest.forward))
