"""How ops are called where nothing traces them: past torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)

_steps: dict[str, Callable[..., Any]] = {}  # by the op's name in torch
_functions: dict[str, type[torch.autograd.Function]] = {}  # of the ops that have a gradient


def call(name: str, *args: Any) -> Any:
    """``torch.ops.loki_kernels.<name>(*args)``.

    Through the dispatcher and what torch makes of a registered gradient a call takes the host
    125 us, the kernel left out, through an autograd function 50, and the way back 20 us less; every
    layer of an attribution makes one. Whatever traces, transforms or dispatches ops, and tensors of
    other classes or without values, get the op itself. That makes a float of an integer where its
    schema has one, which the caller does here.
    """
    if (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and all(map(_has_values, args))
    ):
        if name in _functions:
            return _functions[name].apply(*args)
        if not torch.is_grad_enabled():
            return _steps[name](*args)
    return getattr(torch.ops.loki_kernels, name)(*args)


def _has_values(x: Any) -> bool:
    """Whether an argument is no tensor, or one that a kernel can read."""
    if not isinstance(x, Tensor):
        return True
    plain = type(x) in _PLAIN and not x.is_meta
    # the gradients of torch.autograd.grad(..., is_grads_batched=True)
    return plain and not torch._C._functorch.is_legacy_batchedtensor(x)


def add_step(name: str, run: Callable[..., Any]) -> None:
    """Let `call` run an op by a function."""
    _steps[name] = run


def add_gradient(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Let `call` differentiate an op, by what `register_autograd` of `_dispatch` hands to torch."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = _steps[name](*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    _functions[name] = Eager
