"""How close is close enough: two references."""

from __future__ import annotations


def relative(got, want):
    """The error against a float64 answer, as a share of its norm."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


def assert_as_close(got, same, best, floor):
    """Ours no further from float64 than twice what plain torch in the same dtype is."""
    for g, s, e in zip(got, same, best, strict=True):
        assert g.shape == e.shape
        assert g.dtype == s.dtype
        assert relative(g, e) < 2 * relative(s, e) + floor
