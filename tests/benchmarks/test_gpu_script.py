"""``benchmarks/gpu.sh`` rehearsed without a GPU: a first real call must not fail on a typo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.__main__ import SUITES

ROOT = Path(__file__).parents[2]


def rehearse(out, *sections):
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--dry-run", *sections],
        cwd=ROOT,
        env=os.environ | {"OUT": str(out), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


def test_every_section_passes(tmp_path):
    run = rehearse(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    summary = (tmp_path / "gpu-summary.txt").read_text().splitlines()
    names = [line.split(":")[0] for line in summary if not line.startswith(" ")]
    assert names == ["build", "tests", "sanitizer", *(f"bench-{s}" for s in SUITES)]
    environment = (tmp_path / "gpu-environment.txt").read_text().splitlines()
    assert any(line.startswith("loki_kernels ") for line in environment)


def test_a_failing_section_does_not_stop_the_rest(tmp_path):
    run = rehearse(tmp_path, "bench", "no_such_suite", "selection")
    assert run.returncode != 0
    assert "bench-no_such_suite: FAILED" in run.stdout
    assert "bench-selection: passed" in run.stdout
    assert "tests:" not in run.stdout
