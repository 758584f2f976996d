"""What the op tests share: a small case of each op, gradients, and how close is close enough."""

from __future__ import annotations

import torch

from loki_kernels.ops import _dispatch


def example(op):
    """The inputs of the op's self-check, in float32 on the device under test."""
    inputs, _ = _dispatch.example(op, torch.get_default_device(), torch.float32)
    return inputs


def in_float64(inputs):
    """The same numbers; whole ones, and what is no tensor, stay."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    return inputs | {name: x.double() for name, x in tensors.items() if x.is_floating_point()}


def exact(inputs):
    """The same numbers in float64, the rows as the weight holds them."""
    return in_float64(inputs | {"rows": inputs["rows"].to(inputs["weight"].dtype)})


def output_and_gradients(op, inputs, upstream, wanted, **options):
    """What ``op`` gives, and the gradients of what is ``wanted`` and there."""
    inputs = {n: x if x is None else x.detach() for n, x in inputs.items()}
    leaves = [inputs[n].requires_grad_() for n in wanted if inputs[n] is not None]
    y = op(**inputs, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def relative(got, want):
    """The error against a float64 answer, as a share of its norm."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


def assert_as_close(got, same, best, floor):
    """Ours no further from float64 than twice what plain torch in the same dtype is."""
    for g, s, e in zip(got, same, best, strict=True):
        assert g.shape == e.shape
        assert g.dtype == s.dtype
        assert relative(g, e) < 2 * relative(s, e) + floor
