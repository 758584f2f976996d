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


def test_gather_columns():
    x, index = torch.randn(3, 9), torch.tensor([7, 0, 4])
    with pytest.warns(DeprecationWarning, match="selected_columns now"):
        assert torch.equal(ops.gather_columns(x, index), x[:, index])


def test_count_lowest_integrated():
    with pytest.raises(AttributeError, match="is gone; use integrate_path"):
        ops.count_lowest_integrated  # noqa: B018
