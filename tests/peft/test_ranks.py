"""Two gloo processes on the CPU: which rows an adapter has in each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "out.json"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*command, "--nproc-per-node", "2", "-m", "tests.peft.ranks_worker", str(out)],
        cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(out.read_text())


def test_one_analysis_reaches_all(said):
    (rows, own, held), (other_rows, others_own, other_held) = said["analysed"]
    assert own != others_own
    assert rows == other_rows == own
    assert held == other_held == own[0]


@pytest.mark.parametrize("case", ["given", "first step"])
def test_different_rows_are_an_error(said, case):
    """Of the process that is second."""
    (error,) = filter(None, said[case])
    assert "other rows than another one" in error


@pytest.mark.parametrize("case", ["protected, given", "protected, first step"])
def test_different_protections_are_an_error(said, case):
    (error,) = filter(None, said[case])
    assert "other directions than another one" in error


@pytest.mark.parametrize("case", ["same rows", "evaluated"])
def test_no_error_where_none_is_due(said, case):
    assert said[case] == [None, None]
