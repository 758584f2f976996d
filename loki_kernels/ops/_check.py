"""What the ops check of their inputs, and how their kernels want them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor | None, *expected: int) -> None:
    """Raise ValueError unless ``tensor`` is None or has exactly this shape."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must be {list(expected)}; it is {list(tensor.shape)}.")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """(out_features, in_features), or ValueError if the three do not fit together."""
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "x [..., in_features] and weight [out_features, in_features] do not fit: "
            f"{list(x.shape)} and {list(weight.shape)}."
        )
    out_features, in_features = weight.shape
    check_shape("bias", bias, out_features)
    return out_features, in_features


def check_index(index: Tensor) -> int:
    """k, or ValueError if ``index`` is not ``[k]``."""
    if index.ndim != 1:
        raise ValueError(f"index must be [k]; it is {list(index.shape)}.")
    return index.shape[0]


def autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three as ``F.linear`` would take them: in the autocast dtype where autocast is on.

    Autocast leaves float64 as it is.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(x), cast(weight), None if bias is None else cast(bias)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast on x's device; entering torch's own context costs 5 us even where it is off."""
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported_dtype(*tensors: Tensor | None) -> str | None:
    """Why a kernel cannot take these floating-point tensors; None if it can."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return f"its kernels take float32, float16 and bfloat16, not {tensor.dtype}."
    return None


def unit_stride(tensor: Tensor) -> Tensor:
    """``tensor`` with elements of its last dimension side by side, copied only if need be."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def check_first_derivative() -> None:
    """Raise in a backward pass that is to be differentiated itself: its graph would be wrong."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "loki_kernels' ops have first derivatives only; differentiate without create_graph, or "
            "train the model unpatched for a second derivative."
        )
