"""Fingerprints of weights: the same wherever they are made, and nothing is changed by one."""

from __future__ import annotations

import copy

import pytest
import torch

from loki_kernels.fingerprint import _bit_sums, model_fingerprint
from tests.models import build_model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_fingerprint_changes_nothing(dtype):
    """Of 64-bit numbers the bits are a view of the weights themselves."""
    model = build_model(dtype=dtype)
    model.register_buffer("kept", torch.tensor([3, 7, 9]))
    before = copy.deepcopy(model.state_dict())
    found = model_fingerprint(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model_fingerprint(model) == found
    model.kept[1] += 1
    assert model_fingerprint(model) != found


@pytest.mark.parametrize(
    ("dtype", "sums"),
    [
        (torch.float32, (650911420514312, 9183124353187856)),
        (torch.int64, (0, 6148927885385138178)),
        (torch.bfloat16, (9932120064, 92886882437873664)),
    ],
)
def test_the_sums_are_those_of_files_that_were_written(dtype, sums):
    """Over more than one part of 2**22 numbers, whose places go on."""
    values = torch.arange(2**22 + 3, dtype=torch.float64).sub(2**21 + 1).to(dtype)
    assert _bit_sums(values) == sums
