"""One pass forward (two reads, a write), one backward (three reads, three writes)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._check import unit_stride, unsupported_dtype
from .._products import as_matrix
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
def _place(width, BLOCK: tl.constexpr):
    """(token, column) of this program's elements."""
    blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    return program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def forward_kernel(
    gate, up, out, gate_token, up_token, width, SILU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token, column = _place(width, BLOCK)
    mask = column < width
    g = tl.load(gate + token * gate_token + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + token * up_token + column, mask=mask, other=0.0).to(tl.float32)
    s, _ = _switch(g, SILU)
    i = token * width + column
    tl.store(out + i, narrow(g * s * u, out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad, gate, up, grad_gate, grad_up, product, grad_token, gate_token, up_token, width,
    SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, column = _place(width, BLOCK)
    mask = column < width
    dh = tl.load(grad + token * grad_token + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + token * gate_token + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + token * up_token + column, mask=mask, other=0.0).to(tl.float32)
    i = token * width + column
    s, c = _switch(g, SILU)
    dtype = product.dtype.element_ty
    tl.store(grad_gate + i, narrow(dh * u * s * (1 + g * (1 - s) * c), dtype), mask=mask)
    tl.store(grad_up + i, narrow(dh * g * s, dtype), mask=mask)
    tl.store(product + i, narrow(g * s * u, dtype), mask=mask)


def _launch(
    kernel, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], activation: str
) -> None:
    if not outputs[0].numel():
        return
    if all(x.is_contiguous() for x in inputs):
        inputs = tuple(x.view(1, -1) for x in inputs)  # no block with an end of a token in it
    else:
        inputs = tuple(as_matrix(unit_stride(x)) for x in inputs)  # no copy of a tensor's halves
    tokens, width = inputs[0].shape
    grid = (tokens * -(-width // _CONFIG.kwargs["BLOCK"]),)  # triton.cdiv takes the host 9 us
    strides = (x.stride(0) for x in inputs)
    with torch.cuda.device_of(outputs[0]):
        kernel[grid](
            *inputs, *outputs, *strides, width, SILU=activation == "silu", **_CONFIG.all_kwargs()
        )


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    out = empty(gate)
    _launch(forward_kernel, (gate, up), (out,), activation)
    return out


def backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    results = empty(gate), empty(gate), empty(gate)
    _launch(backward_kernel, (grad, gate, up), results, activation)
    return results


def compilations() -> Iterator[Compilation]:
    for name in DTYPES.values():
        for kernel in (forward_kernel, backward_kernel):
            for silu in (True, False):
                names = [n for n in kernel.arg_names if n.islower()]
                types = {n: "i32" if n.endswith(("_token", "width")) else f"*{name}" for n in names}
                yield Compilation(kernel, types, {"SILU": silu}, (_CONFIG,), name)
