"""The m points of an integration path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import check_baseline
from .._dispatch import Backend, check_backend, register, register_autograd


def expand_path(
    z: Tensor,
    alphas: Tensor,
    baseline: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """``baseline + alpha_k * (z - baseline)`` for every k.

    Args:
        z: ``[B, D]``, the path's end.
        alphas: ``[m]`` floats.
        baseline: ``[B, D]`` or ``[D]``, the path's start; zero by default.
        backend: one of `BACKENDS`; None chooses (`loki_kernels.backends`).

    Returns:
        ``[B, m, D]`` in z's dtype, differentiable in z and baseline.

    Raises:
        ValueError: for shapes that do not fit, or an unknown backend.
        RuntimeError: if a backend asked for by name cannot run.
    """
    check_backend(backend)
    if z.ndim != 2 or alphas.ndim != 1:
        raise ValueError(
            f"z must be [B, D] and alphas [m]; they are {tuple(z.shape)} and {tuple(alphas.shape)}."
        )
    check_baseline(baseline, *z.shape)
    return torch.ops.loki_kernels.expand_path(z, alphas, baseline, backend)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, alphas, baseline, _ = inputs
    ctx.save_for_backward(alphas)
    ctx.shared_baseline = baseline is not None and baseline.ndim == 1


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (alphas,) = ctx.saved_tensors
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    step = alphas.to(device=grad.device, dtype=wide)[:, None]
    grad_z = grad_baseline = None
    if ctx.needs_input_grad[0]:
        grad_z = (step * grad.to(wide)).sum(1).to(grad.dtype)
    if ctx.needs_input_grad[2]:
        grad_baseline = ((1 - step) * grad.to(wide)).sum(1)
        grad_baseline = grad_baseline.sum(0) if ctx.shared_baseline else grad_baseline
    return grad_z, None, grad_baseline, None


register(
    "expand_path",
    "(Tensor z, Tensor alphas, Tensor? baseline) -> Tensor",
    lambda z, alphas, _: z.new_empty(z.shape[0], alphas.shape[0], z.shape[1]),
)
register_autograd("expand_path", _setup_context, _backward)
