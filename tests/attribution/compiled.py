"""The staircase under torch.compile, without a graph break."""

from __future__ import annotations

import contextlib

import pytest
import torch

from loki_kernels.attribution.definitions import PathIntegral
from loki_kernels.attribution.prefill import Batch, run_prefill
from loki_kernels.attribution.staircase import Staircase
from loki_kernels.attribution.steering import borrowed
from loki_kernels.discovery import find_structure
from tests.models import to_device


def check_compiled(model, steps, within=contextlib.nullcontext):
    """The points of a model of three layers, compiled whole, give what they give otherwise.

    ``within`` makes of the structure what both are run in.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("torch 2.11 cannot trace requires_grad_; 2.12 was not tried")
    torch._dynamo.reset()
    structure = find_structure(model)
    integral = PathIntegral.resolve("published", {}, steps)
    batch = Batch(*to_device([torch.arange(18).view(2, 9), torch.tensor([9, 5])]))
    with borrowed(structure), within(structure):
        prefill = run_prefill(structure, batch, integral)
        staircase = Staircase(structure, batch, prefill, integral)
        want = staircase.run(range(3), prefill.prefix)
        staircase._differentiate = torch.compile(
            staircase._differentiate, fullgraph=True, backend="aot_eager"
        )
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            got = staircase.run(range(3), prefill.prefix)
    torch.testing.assert_close(got.scores, want.scores)
    torch.testing.assert_close(got.change, want.change)
