"""The gated activation of an FFN: act(gate) * up."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from ...errors import check_choice
from .._call import call
from .._check import check_shape
from .._dispatch import Backend, check_backend, register, register_autograd

Activation = Literal["silu", "gelu_tanh"]


def gated_product(
    gate: Tensor,
    up: Tensor,
    activation: Activation = "silu",
    *,
    backend: Backend | None = None,
) -> Tensor:
    """``act(gate) * up``, computed in float32 (float64 for float64) and rounded once.

    Args:
        gate: of any shape.
        up: of gate's shape and dtype.
        activation: ``"silu"`` (SwiGLU), or ``"gelu_tanh"`` (GeGLU with the tanh approximation).
        backend: one of `BACKENDS`; None chooses (`loki_kernels.backends`).

    Returns:
        A contiguous tensor of gate's shape and dtype, differentiable in gate and up.

    Raises:
        ValueError: for shapes or dtypes that do not fit, an unknown activation or backend.
        RuntimeError: if a backend asked for by name cannot run.
    """
    check_backend(backend)
    check_gated(gate, up, activation)
    return call("gated_product", gate, up, activation, backend)


def check_gated(gate: Tensor, up: Tensor, activation: str) -> None:
    """Raise ValueError unless these make a gated product."""
    check_choice("activation", activation, get_args(Activation))
    check_shape("up", up, *gate.shape)
    if up.dtype != gate.dtype:
        raise ValueError(f"gate and up must share a dtype; they are {gate.dtype} and {up.dtype}.")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_gate, grad_up, _ = call(
        "gated_product_backward", grad, *ctx.saved_tensors, ctx.activation, ctx.backend
    )
    return grad_gate, grad_up, None, None


register(
    "gated_product",
    "(Tensor gate, Tensor up, str activation) -> Tensor",
    lambda gate, *_: gate.new_empty(gate.shape),
)
# The third result is the product itself, recomputed on the way: the operand of the weight gradient.
register(
    "gated_product",
    "(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor, Tensor)",
    lambda _, gate, *__: tuple(gate.new_empty(gate.shape) for _ in range(3)),
    step="backward",
)
register_autograd("gated_product", _setup_context, _backward)
