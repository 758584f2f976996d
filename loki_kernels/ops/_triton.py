"""What the Triton kernels share."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter runs kernels on CPU tensors with numpy, which has no bfloat16 arithmetic and
# no device to tune on.
interpreted: bool = triton.knobs.runtime.interpret
INTERPRETED = tl.constexpr(interpreted)

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def empty(like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the same shape, dtype and device."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


@triton.jit
def dot(a, b):
    """``a @ b`` in float32; float32 operands are multiplied exactly, not as tf32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 ``x`` rounded to ``dtype``; the interpreter by itself cuts bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """Within 2e-7 of x's tanh, relatively; the exponential form alone loses digits near 0."""
    square = x * x
    # Taylor to x^9: 1e-8 relative at |x| = 1/4
    small = x * (
        1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    )
    decay = tl.exp(-2 * tl.abs(x))
    large = (1 - decay) / (1 + decay)
    return tl.where(square < 0.0625, small, tl.where(x < 0, -large, large))


@dataclass(frozen=True)
class Compilation:
    """One way a kernel is compiled: what a launch specialises on, without the launch.

    ``benchmarks.ops.compile_triton`` compiles these ahead of time for each architecture.

    Attributes:
        kernel: the ``@triton.jit`` function.
        types: argument name -> Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``), no constants.
        constants: ``tl.constexpr`` argument name -> value.
        configs: every config the launch may use.
        dtype: of the data.
        tensor_cores: whether there is a product of two tiles.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    configs: tuple[triton.Config, ...]
    dtype: str
    tensor_cores: bool = False


def tuned(kernel: Any, configs: tuple[triton.Config, ...], key: tuple[str, ...]) -> Any:
    """``kernel``, launched with the fastest of ``configs`` for each value of the arguments ``key``.

    Tuning takes about 30 ms a config (unmeasured) and is kept on disk by triton. What it returns
    has chosen nothing yet, so whoever launches it keeps it.
    """
    if not interpreted:

        def tune() -> Any:
            tuner = triton.autotune(
                list(configs),
                key=list(key),
                do_bench=functools.partial(triton.testing.do_bench, warmup=5, rep=20),
                cache_results=True,
            )
            return tuner(kernel)

        return _Locked(tune)
    first = configs[0].all_kwargs()
    constants = {n: first[n] for n in first if n in kernel.arg_names}
    return _Fixed(kernel, constants)


@dataclass(frozen=True)
class _Locked:
    """A tuned kernel that threads launch one after the other, one of each device.

    Triton's tuner keeps the arguments of the launch it is busy with on itself, and what it has
    chosen by the arguments alone, which another kind of GPU may have no shared memory for.
    """

    tune: Callable[[], Any]
    tuned: dict[int, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            device = torch.cuda.current_device()
            with self.lock:
                if device not in self.tuned:
                    self.tuned[device] = self.tune()
                tuner = self.tuned[device]
                try:
                    tuner[grid](*arguments, **constants)
                finally:
                    # One that fails, as by full memory while it tunes, leaves the arguments there,
                    # and their graph: halving the batch would free nothing.
                    tuner.nargs = None

        return launch


@dataclass(frozen=True)
class _Fixed:
    """A kernel with one config, launched like a tuned one."""

    kernel: Any
    constants: Mapping[str, Any]

    def __getitem__(self, grid: Any) -> Any:
        return functools.partial(self.kernel[grid], **self.constants)
