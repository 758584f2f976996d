"""What the op tests share: a small case of each op, and how close is close enough."""

from __future__ import annotations

import torch

from loki_kernels.ops import _dispatch


def example(op):
    """The inputs of the op's self-check, in float32 on the device under test."""
    inputs, _ = _dispatch.example(op, torch.get_default_device(), torch.float32)
    return inputs


def relative(got, want):
    """The error against a float64 answer, as a share of its norm."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


def assert_as_close(got, same, best, floor):
    """Ours no further from float64 than twice what plain torch in the same dtype is."""
    for g, s, e in zip(got, same, best, strict=True):
        assert g.shape == e.shape
        assert g.dtype == s.dtype
        assert relative(g, e) < 2 * relative(s, e) + floor
