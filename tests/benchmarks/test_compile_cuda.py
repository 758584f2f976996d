"""Every CUDA kernel compiles for A100, H100 and B200.

How: `benchmarks.ops.compile_cuda`. What the kernels compute is tested with their ops.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.ops import compile_cuda
from loki_kernels.ops import _dispatch
from tests import cuda_emulator

ROOT = Path(__file__).parents[2]

LOG = """\
ptxas info    : Compiling entry function '_ZN4loki1fEv' for 'sm_90a'
ptxas info    : Function properties for _ZN4loki1fEv
    16 bytes stack frame, {spill} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, {shared} bytes smem, 424 bytes cmem[0]
"""


def test_every_kernel_has_an_op():
    assert compile_cuda.ops() == sorted(o for o in _dispatch._ops if _dispatch._exists(o, "cuda"))


def test_the_committed_table_is_of_these_kernels():
    """Run ``python -m benchmarks.ops.compile_cuda`` after a change to a kernel."""
    header, *results = map(json.loads, compile_cuda.FILE.read_text(encoding="utf-8").splitlines())
    assert header["sources"] == compile_cuda.source_hash()
    assert [result for result in results if result["failures"]] == []
    assert {result["op"] for result in results} == set(compile_cuda.ops())
    assert {result["arch"] for result in results} == {80, 90, 100}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_every_kernel_compiles():
    command = [sys.executable, "-m", "benchmarks.ops.compile_cuda", "--no-write"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert " 0 failed" in run.stdout


@pytest.mark.skipif(
    not (cuda_emulator.INCLUDE / "cuda_runtime_api.h").is_file(), reason="no CUDA headers"
)
def test_bindings_compile_against_this_torch():
    headers = Path(torch.__file__).parent / "include"
    includes = [f"-I{folder}" for folder in (headers, cuda_emulator.INCLUDE, cuda_emulator.CSRC)]
    flags = ["-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Werror"]
    source = cuda_emulator.CSRC / "cuda_bindings.cpp"
    run = subprocess.run(
        ["g++", "-fsyntax-only", *flags, *includes, source], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize(
    ("spill", "shared", "message"),
    [(0, 232448, None), (8, 0, "spills 8 bytes"), (0, 232449, "232449 bytes of shared memory")],
)
def test_what_counts_as_a_failure(spill, shared, message):
    (result,) = compile_cuda.parse("sync_rows", LOG.format(spill=spill, shared=shared))
    assert (result["arch"], result["registers"], result["shared"]) == (90, 40, shared)
    assert len(result["failures"]) == (message is not None)
    assert message is None or message in result["failures"][0]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreting process")
@pytest.mark.skipif(cuda_emulator.why_not() is not None, reason=str(cuda_emulator.why_not()))
def test_emulator_reports_a_barrier_that_some_never_reach(tmp_path):
    source = tmp_path / "divergent.cpp"
    source.write_text(
        "#include <cuda_runtime.h>\n"
        "void kernel(int) { if (threadIdx.x == 0) __syncthreads(); else __ballot_sync(~0u, 1); }\n"
        "int main() {\n"
        "  cudaLaunchConfig_t config{};\n"
        "  config.gridDim = 1; config.blockDim = 64;\n"
        "  cudaLaunchKernelEx(&config, kernel, 0);\n"
        "}\n"
    )
    program = tmp_path / "divergent"
    includes = [f"-I{folder}" for folder in (cuda_emulator.HERE, cuda_emulator.INCLUDE)]
    sources = [source, cuda_emulator.HERE / "emulator.cpp"]
    subprocess.run(["g++", "-std=c++20", *includes, *sources, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode != 0
    assert "waits at a barrier that others never reach" in run.stderr
