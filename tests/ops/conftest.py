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
    """Chosen for every call; new tensors are on the GPU where the backend needs one."""
    monkeypatch.setenv("LOKI_KERNELS_BACKEND", request.param)
    with torch.device("cuda" if request.param == "triton" and not _INTERPRETED else "cpu"):
        yield request.param


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """What ``torch.empty`` returns is filled with NaN, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
