"""Every op has first derivatives only, and says so where a second one is asked for."""

from __future__ import annotations

import pytest
import torch

from loki_kernels import ops

INDEX = torch.tensor([2, 0])


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CASES = {
    "row_masked_linear": lambda x: ops.row_masked_linear(x, normal(5, 4), normal(2, 4), INDEX),
    "row_delta_linear": lambda x: ops.row_delta_linear(x, normal(5, 4), normal(2, 4), None, INDEX),
    "swiglu_row_masked_linear": lambda x: ops.swiglu_row_masked_linear(
        x, normal(3, 4), normal(5, 4), normal(2, 4), INDEX
    ),
    "gated_product": lambda x: ops.gated_product(x, normal(3, 4), "silu"),
    "target_probability": lambda x: (
        ops.target_probability(x, normal(5, 4), torch.tensor([1, 0, 4])).probability
    ),
    "shared_prefix_attention": lambda x: ops.shared_prefix_attention(
        *[x.view(1, 1, 3, 4)] * 3, normal(1, 1, 2, 4), normal(1, 1, 2, 4)
    ),
}


@pytest.mark.parametrize("op", CASES)
def test_is_refused(op):
    x = normal(3, 4).requires_grad_()
    y = CASES[op](x).square().sum()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(y, x, create_graph=True)
    assert torch.autograd.grad(CASES[op](x).square().sum(), x)[0].isfinite().all()
