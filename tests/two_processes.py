"""Two gloo processes on the CPU, whatever --device says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_worker(module: str, *arguments: str | Path, **environment: str) -> None:
    """Run a module of the tests under torchrun; what its processes raised is the assertion's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*command, "--nproc-per-node", "2", "-m", module, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    errors = [line for line in result.stderr.splitlines() if line.startswith("[rank")]
    assert result.returncode == 0, "\n".join(errors[-30:]) or result.stderr[-4000:]
