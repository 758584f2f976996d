"""``benchmarks/gpu.sh`` rehearsed without a GPU: a first real call must not fail on a typo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import SUITES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
UNNAMED = [suite for suite in SUITES if suite != "peers"]


def rehearse(out, *arguments, **environment):
    # none of the variables by which an outer pytest speaks to its own workers
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        ["bash", SCRIPT, "--dry-run", *arguments],
        env=outer | {"OUT": str(out), "PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
    )
    return run, run.stdout + run.stderr


def stand_in(folder, script=""):
    """A shell script in the place of Python, which imports for seconds before it measures."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return str(python)


def sections(out, run):
    summary = (out / f"gpu-{run}-summary.txt").read_text().splitlines()
    assert summary[0] == "no GPU, a dry run"
    found = re.findall(r"^(\w+): (passed|FAILED|out of its)", "\n".join(summary[1:]), re.MULTILINE)
    return dict(found)


def test_check_passes(tmp_path):
    libraries = {path: path.stat().st_mtime_ns for path in ROOT.glob("loki_kernels/_*.*")}
    run, output = rehearse(tmp_path, "check")
    assert run.returncode == 0, output + (tmp_path / "gpu-check.log").read_text()
    names = [
        "build",
        "environment",
        "self_check",
        "tests",
        "library",
        "memcheck",
        "racecheck",
    ]
    assert sections(tmp_path, "check") == dict.fromkeys(names, "passed")
    assert list(sections(tmp_path, "check")) == names
    log = (tmp_path / "gpu-check.log").read_text()
    assert re.search(r"^loki_kernels ", log, re.MULTILINE)  # the environment
    for tool in ("memcheck", "racecheck"):
        watched = log.partition(f"== {tool}: compute-sanitizer")[2].partition("\n== ")[0]
        assert re.search(r"^gated_product +torch +bfloat16 +agrees", watched, re.MULTILINE)
    assert {path: path.stat().st_mtime_ns for path in libraries} == libraries


def test_study_adds_to_the_results(tmp_path):
    run, output = rehearse(tmp_path, "study", "600")
    assert run.returncode == 0, output + (tmp_path / "gpu-study.log").read_text()
    assert sections(tmp_path, "study") == dict.fromkeys(["arms", "study"], "passed")
    committed = (ROOT / "benchmarks" / "results" / "frontier" / "trainings.jsonl").read_text()
    found = (tmp_path / "frontier" / "trainings.jsonl").read_text()
    assert found.startswith(committed)
    assert found.removeprefix(committed).count("\n") == 1


def test_a_study_that_cannot_read_its_model_does_not_start(tmp_path):
    """Which transformers does by gguf, a package that machines may lack."""
    python = stand_in(tmp_path, 'case "$*" in *gguf) echo "no gguf" >&2; exit 1;; esac')
    (tmp_path / "texts").write_text("")
    environment = {"OUT": str(tmp_path), "PYTHON": python}
    run = subprocess.run(
        ["bash", SCRIPT, "study", "60"],
        env=os.environ | environment | {"FRONTIER_DATA": str(tmp_path / "texts")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "study: FAILED, it needs" in run.stdout
    assert "no gguf" in (tmp_path / "gpu-study.log").read_text()
    assert not (tmp_path / "frontier").exists()


def test_a_copy_without_a_history_asks_for_its_revision(tmp_path):
    python = stand_in(tmp_path)
    for revision, said in (("", True), ("1.0-3-g12345", False)):
        environment = {"GIT_DIR": str(tmp_path / "nowhere"), "REVISION": revision}
        run, _ = rehearse(tmp_path, "goals", PYTHON=python, **environment)
        assert run.returncode == 0
        assert ("$REVISION is unset" in run.stdout) == said


def test_what_tests_are_left_out_of_is_there():
    ignored = re.findall(r"--ignore=(\S+?)\)?\s", SCRIPT.read_text())
    assert len(ignored) > 5
    assert all((ROOT / path).is_file() for path in ignored)


def test_bench_runs_every_suite(tmp_path):
    """By a stand-in for Python; `test_benchmarks` runs the suites themselves."""
    run, output = rehearse(tmp_path, "bench", PYTHON=stand_in(tmp_path, 'echo "$@"'))
    assert run.returncode == 0, output + (tmp_path / "gpu-bench.log").read_text()
    assert sections(tmp_path, "bench") == dict.fromkeys(UNNAMED, "passed")
    log = (tmp_path / "gpu-bench.log").read_text().splitlines()
    assert [x for x in log if x.startswith("-m")] == [
        f"-m benchmarks {s} --dry-run" for s in UNNAMED
    ]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [(["goals"], "benchmarks.goals --dry-run"), (["bench", "peers"], "benchmarks peers --dry-run")],
)
def test_a_run_of_its_own(arguments, command, tmp_path):
    run, output = rehearse(tmp_path, *arguments, PYTHON=stand_in(tmp_path, 'echo "$@"'))
    assert run.returncode == 0, output
    assert sections(tmp_path, arguments[0]) == {arguments[-1]: "passed"}
    assert f"-m {command}\n" in (tmp_path / f"gpu-{arguments[0]}.log").read_text()


def test_a_failing_section_does_not_stop_the_rest(tmp_path):
    python = stand_in(tmp_path, 'case "$3" in no_*) echo "unknown suite $3" >&2; exit 2;; esac')
    run, output = rehearse(tmp_path, "bench", "no_such_suite", "selection", PYTHON=python)
    assert run.returncode == 1
    assert sections(tmp_path, "bench") == {"no_such_suite": "FAILED", "selection": "passed"}
    assert "unknown suite no_such_suite" in output


def test_a_run_takes_less_than_350_seconds():
    text = SCRIPT.read_text()
    build, environment, self_check, tests, library, sanitizer = (
        int(re.search(rf"section {name} (\d+)", text)[1])
        for name in ("build", "environment", "self_check", "tests", "library", '"\\$tool"')
    )
    assert build + environment + self_check + tests + library + 2 * sanitizer <= 360
    limits = {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", text)}
    assert limits.keys() == SUITES.keys()
    for seconds in (limits.pop("peers"), sum(limits.values())):
        assert build + seconds <= 350
    assert build + int(re.search(r"section goals (\d+)", text)[1]) <= 350


@pytest.mark.parametrize("arguments", [(), ("tests",)])
def test_another_run_is_refused(tmp_path, arguments):
    run, output = rehearse(tmp_path, *arguments)
    assert run.returncode == 2
    assert "usage" in output
