"""What the tests of results share: whether two have the same bits."""

from __future__ import annotations

import torch

# beside the scores, or the counts
BESIDE = ("targets", "value", "completeness", "change")


def same_bits(a, b) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def differing(got, want) -> list[str]:
    """The names of the tensors in which two results differ."""
    assert type(got) is type(want)
    names = (*BESIDE, "counts" if hasattr(want, "counts") else "scores")
    return [name for name in names if not same_bits(getattr(got, name), getattr(want, name))]


def assert_same(got, want) -> None:
    assert not differing(got, want)
