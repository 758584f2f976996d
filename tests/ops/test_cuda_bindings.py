"""What the CUDA kernels' bindings refuse, and a launch that fails."""

from __future__ import annotations

import re

import pytest
import torch

from loki_kernels import _native
from loki_kernels.ops import _dispatch
from tests import cuda_emulator


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("count_lowest", lambda x, i: (x, 1, i, False), r"scores must be \[N, L, D\]"),
        ("count_lowest", lambda x, i: (x[None], 1, i, False), "counts has the wrong shape"),
        ("count_lowest", lambda x, i: (x[None], 1, x, False), "counts has the wrong dtype"),
        ("count_lowest", lambda x, i: (x.mT[None], 1, i, False), "scores must be contiguous"),
        ("count_lowest", lambda x, i: (x[None], 9, i[:3, :8], False), r"k must lie in \[1, 8\]"),
        ("count_lowest", lambda x, i: (x.double()[None], 1, i[:3, :8], False), "must be float32"),
        ("sync_rows", lambda x, i: ([x], [x], [], []), "as many bases, updates and indices"),
        ("sync_rows", lambda x, i: ([x], [x], [x], [i[0]]), "base has the wrong shape"),
    ],
)
def test_bindings_refuse_what_does_not_fit(op, arguments, message):
    device = "cpu"
    if _native.why_not("cuda") is None:
        if not torch.cuda.is_available():
            pytest.skip("the kernels are compiled, but there is no GPU")
        device = "cuda"
    elif cuda_emulator.why_not() is None:
        cuda_emulator.load()
    else:
        pytest.skip(str(cuda_emulator.why_not()))
    module = _dispatch._module(op, "cuda")  # defines the schema
    x = torch.zeros(3, 8, device=device)
    index = torch.zeros(3, 9, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match=f"{op}: .*{message}"):
        getattr(module, f"_{op}")(*arguments(x, index))
    # what the binary does: an exception from it ended the process on torch 2.11 with a GPU
    returned = getattr(torch.ops.loki_kernels_cuda, op)(*arguments(x, index))
    assert re.match(f"{op}: .*{message}", returned)


@pytest.mark.skipif(cuda_emulator.why_not() is not None, reason=str(cuda_emulator.why_not()))
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("count_lowest", lambda x, i: (x[None], 1, i, False)),
        ("sync_rows", lambda x, i: ([x], [x[:1]], [x[:1]], [i[0, :1]])),
    ],
)
def test_a_launch_that_fails_raises(op, arguments):
    emulator = cuda_emulator.load()
    call = getattr(_dispatch._module(op, "cuda"), f"_{op}")
    x, index = torch.zeros(3, 8), torch.zeros(3, 8, dtype=torch.int64)
    emulator.emulator_refuses_launches(True)
    try:
        with pytest.raises(RuntimeError, match=f"^{op}: the emulator refused the launch$"):
            call(*arguments(x, index))
    finally:
        emulator.emulator_refuses_launches(False)
    call(*arguments(x, index))
