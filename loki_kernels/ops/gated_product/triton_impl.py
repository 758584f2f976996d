"""One pass forward (two reads, a write), one backward (three reads, three writes)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._check import unsupported_dtype
from .._triton import DTYPES, Compilation, empty, narrow

_CONFIG = triton.Config({"BLOCK": 1024}, num_warps=4, num_stages=1)


def unsupported(*inputs: Tensor | str) -> str | None:
    return unsupported_dtype(*(x for x in inputs if isinstance(x, Tensor)))


@triton.jit
def _switch(gate, SILU: tl.constexpr):
    """(s, c): act(g) = g * s, act'(g) = s * (1 + g * (1 - s) * c)."""
    if SILU:
        return tl.sigmoid(gate), gate * 0 + 1
    # 0.5 (1 + tanh u) = sigmoid(2u), u = sqrt(2/pi) (g + 0.044715 g^3)
    factor: tl.constexpr = 1.5957691216057308
    square = gate * gate
    return tl.sigmoid(factor * gate * (1 + 0.044715 * square)), factor * (1 + 0.134145 * square)


@triton.jit
def forward_kernel(gate, up, out, elements, SILU: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < elements
    g = tl.load(gate + i, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=mask, other=0.0).to(tl.float32)
    s, _ = _switch(g, SILU)
    tl.store(out + i, narrow(g * s * u, out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad, gate, up, grad_gate, grad_up, product, elements, SILU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < elements
    dh = tl.load(grad + i, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + i, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=mask, other=0.0).to(tl.float32)
    s, c = _switch(g, SILU)
    dtype = product.dtype.element_ty
    tl.store(grad_gate + i, narrow(dh * u * s * (1 + g * (1 - s) * c), dtype), mask=mask)
    tl.store(grad_up + i, narrow(dh * g * s, dtype), mask=mask)
    tl.store(product + i, narrow(g * s * u, dtype), mask=mask)


def _launch(kernel, tensors: tuple[Tensor, ...], activation: str) -> None:
    elements = tensors[0].numel()
    if elements:
        grid = (triton.cdiv(elements, _CONFIG.kwargs["BLOCK"]),)
        with torch.cuda.device_of(tensors[0]):
            kernel[grid](*tensors, elements, SILU=activation == "silu", **_CONFIG.all_kwargs())


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    out = empty(gate)
    _launch(forward_kernel, (gate.contiguous(), up.contiguous(), out), activation)
    return out


def backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    results = empty(gate), empty(gate), empty(gate)
    inputs = (x.contiguous() for x in (grad, gate, up))
    _launch(backward_kernel, (*inputs, *results), activation)
    return results


def compilations() -> Iterator[Compilation]:
    for name in DTYPES.values():
        for kernel in (forward_kernel, backward_kernel):
            for silu in (True, False):
                types = {n: f"*{name}" for n in kernel.arg_names if n.islower()}
                types["elements"] = "i32"
                yield Compilation(kernel, types, {"SILU": silu}, (_CONFIG,), name)
