"""Ops that are none any more: their names work for one release, or say what to use instead."""

from __future__ import annotations

import pytest
import torch

from loki_kernels import ops


def test_expand_path():
    z = torch.randn(2, 5)
    with pytest.warns(DeprecationWarning, match=r"attribution\.path\.path_points now"):
        points = ops.expand_path(z, torch.tensor([0.0, 1.0]))
    assert torch.equal(points, torch.stack([0 * z, z], dim=1))


@pytest.mark.parametrize(
    ("name", "instead"),
    [("count_lowest_integrated", "integrate_path"), ("gather_columns", r"x\.index_select")],
)
def test_what_is_gone(name, instead):
    with pytest.raises(AttributeError, match=f"is gone; use {instead}"):
        getattr(ops, name)
