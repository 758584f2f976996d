"""Every Triton kernel compiles for A100, H100 and B200 without spilling.

How: `benchmarks.ops.compile_triton`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ops import compile_triton
from loki_kernels.ops import _dispatch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

SOUND = {
    "arch": 90,
    "tile": [64, 64],
    "warps": 4,
    "spilled": 0,
    "shared": 1024,
    "tensor_memory": 0,
    "tf32": 0,
    "tensor_cores": True,
    "products": {"wgmma": 4},
}


def test_every_op_with_kernels_is_found():
    triton = {op for op in _dispatch._ops if _dispatch._exists(op, "triton")}
    assert set(compile_triton.kernel_ops()) == triton


def test_the_committed_table_is_of_these_kernels():
    """Run ``python -m benchmarks.ops.compile_triton`` after a change to a kernel."""
    header, *results = map(json.loads, compile_triton.FILE.read_text(encoding="utf-8").splitlines())
    assert header["sources"] == compile_triton.source_hash()
    assert [result for result in results if result["failures"]] == []
    assert {result["op"] for result in results} == set(compile_triton.kernel_ops())
    assert {result["arch"] for result in results} == {80, 90, 100}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreting process")
def test_one_config_a_kernel_compiles():
    command = [sys.executable, "-m", "benchmarks.ops.compile_triton", "--quick"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "wgmma" in run.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"spilled": 8}, "spills 8 bytes"),
        ({"shared": 227 * 1024 + 1}, "bytes of shared memory"),
        ({"arch": 80, "shared": 163 * 1024 + 1, "products": {"mma.sync": 1}}, "of shared memory"),
        ({"arch": 80, "shared": 163 * 1024, "products": {"mma.sync": 1}}, None),
        ({"arch": 100, "products": {"tcgen05": 1}, "tensor_memory": 513}, "tensor memory"),
        ({"tf32": 2}, "tf32"),
        ({"products": {}}, "no tensor-core instruction"),
        ({"products": {"mma.sync": 4}}, "no wgmma"),
        ({"products": {"mma.sync": 4}, "tile": [16, 64]}, None),
        ({"products": {}, "tensor_cores": False}, None),
    ],
)
def test_what_counts_as_a_failure(change, message):
    found = compile_triton.failures(SOUND | change)
    assert len(found) == (message is not None)
    assert message is None or message in found[0]
