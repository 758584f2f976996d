"""Every op test runs on each backend that the op has and this process can run.

Triton's kernels run on a GPU, or on a CPU in a process with ``TRITON_INTERPRET=1`` (`make test`
starts one); the CUDA kernels on a GPU they were compiled for, or in `cuda_emulator`.
"""

from __future__ import annotations

import os

import pytest
import torch

from loki_kernels import _native, ops
from loki_kernels.ops import _dispatch
from tests import cuda_emulator

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_GPU = torch.cuda.is_available()
_CUDA_COMPILED = _GPU and _native.why_not("cuda") is None
# Of what several ops share, which has no backend: they run on every device.
_DEVICES = ["cpu", "cuda"] if _GPU else ["cpu"]
_OF_SEVERAL = ("test_grouped", "test_products")
# Of plain torch, or without a Triton kernel: the other process has run them.
_NOTHING_TO_INTERPRET = (
    "test_cuda_bindings.py", "test_grouped.py", "test_products.py", "test_row_delta_linear.py",
    "test_row_masked_linear.py", "test_sync_rows.py", "test_triton.py",
)  # fmt: skip
collect_ignore = list(_NOTHING_TO_INTERPRET) if _INTERPRETED else []


def _backends() -> list[str]:
    """Those that this process can run."""
    if _INTERPRETED:
        return ["triton"]
    can_run = {
        "torch": True,
        "cpp": _native.why_not("cpp") is None,
        "cuda": _CUDA_COMPILED or cuda_emulator.why_not() is None,
        "triton": _GPU,
    }
    return [name for name, can in can_run.items() if can]


def _implemented(op: str) -> set[str]:
    """The op's own backends; an op composed of others has torch's, and Triton's for a GPU."""
    own = {name for name in _dispatch.BACKENDS if _dispatch._exists(op, name)}
    return own or {"torch", "triton"}


def pytest_report_header() -> list[str]:
    notes = [f"op tests run on: {', '.join(_backends())}"]
    if "triton" not in _backends():
        notes.append("Triton's kernels: in a process of their own (TRITON_INTERPRET=1)")
    if _native.why_not("cpp") is not None:
        notes.append(f"C++ implementations: {_native.why_not('cpp')}")
    if not _CUDA_COMPILED:
        notes.append(f"CUDA kernels: {cuda_emulator.why_not() or 'emulated on the CPU'}")
    return notes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    module = metafunc.module.__name__.rpartition(".")[2]
    if module == "test_every_op":
        pairs = [(op, b) for op in _dispatch._ops for b in _backends() if b in _implemented(op)]
        metafunc.parametrize(("op", "backend"), pairs, indirect=["backend"])
        return
    if module in _OF_SEVERAL:
        metafunc.parametrize("backend", _DEVICES, indirect=True)
        return
    op = module.removeprefix("test_")
    if op not in ops.__all__:  # of the dispatcher, not of an op
        return
    metafunc.parametrize(
        "backend", [b for b in _backends() if b in _implemented(op)], indirect=True
    )


@pytest.fixture(autouse=True)
def backend(request, monkeypatch):
    """Chosen for every call; new tensors are on the GPU where the backend needs one."""
    name = getattr(request, "param", None)
    if name is None:
        yield None
        return
    if name in ("cpu", "cuda") and request.module.__name__.endswith(_OF_SEVERAL):
        with torch.device(name):
            yield name
        return
    monkeypatch.setenv("LOKI_KERNELS_BACKEND", name)
    on_gpu = _GPU and not _INTERPRETED and name in ("triton", "cuda")
    if name == "cuda" and not _CUDA_COMPILED:
        on_gpu = False
        cuda_emulator.load()
        real = _dispatch._backend_why_not
        monkeypatch.setattr(
            _dispatch,
            "_backend_why_not",
            lambda backend, device: None if backend == "cuda" else real(backend, device),
        )
    with torch.device("cuda" if on_gpu else "cpu"):
        yield name


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """What ``torch.empty`` returns is filled with NaN, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
