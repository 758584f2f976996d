"""Every op test runs on each backend this process can run.

Triton's kernels run on a GPU, and on a CPU in a process with ``TRITON_INTERPRET=1`` (`make test`
starts one).
"""

from __future__ import annotations

import os

import pytest
import torch

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TRITON_RUNS = _INTERPRETED or torch.cuda.is_available()


@pytest.fixture(
    autouse=True,
    params=[
        pytest.param(
            "torch",
            marks=pytest.mark.skipif(_INTERPRETED, reason="tested in the other process"),
        ),
        pytest.param(
            "triton",
            marks=pytest.mark.skipif(
                not _TRITON_RUNS, reason="no GPU, and not a TRITON_INTERPRET=1 process"
            ),
        ),
    ],
)
def backend(request, monkeypatch):
    monkeypatch.setenv("LOKI_KERNELS_BACKEND", request.param)
    return request.param


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch):
    """What ``torch.empty`` returns is filled with NaN, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
