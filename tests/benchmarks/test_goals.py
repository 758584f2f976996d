"""The figures that a GPU is to reach, rehearsed on a tiny model."""

import re
import subprocess

import pytest
import torch

from benchmarks import goals, measure


@pytest.mark.parametrize(
    ("value", "goal", "more", "verdict"),
    [(3, 4, False, "reached"), (5, 4, False, "missed"), (5, 4, True, "reached"), (3, None, 0, "")],
)
def test_verdicts(value, goal, more, verdict):
    assert goals.Measured("a figure", value, goal, "ms", more).verdict == verdict


def test_what_is_no_longer_compiled_is_not_timed_as_if(monkeypatch, capsys):
    """One function of torch's is compiled for all modules, and no more than eight times."""
    made = []

    def begin(method, *_):
        made.append(method)
        module = torch.nn.Identity()
        module.compile(backend="eager")
        if method == "restless":
            for i in range(9):
                module.number = i  # it is asked for, so each is a compilation
                module.forward = lambda x, module=module: x + module.number
                module(torch.ones(1))
        return lambda: module(torch.ones(1)), 0.0

    monkeypatch.setattr(goals, "begin", begin)
    monkeypatch.setattr(measure, "ceilings", lambda: measure.Ceilings(1e12, 1e10))
    methods = ("first", "restless", "ours_compiled")
    found = list(goals.compiled_training("tiny", None, 32, (1e9, None), methods))
    assert made == list(methods)
    titles = [figure.what.rpartition(": ")[2] for figure in found]
    assert titles == ["first", "ours_compiled", "ours_compiled"]
    assert "32 tokens: restless: FailOnRecompileLimitHit" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        measure.finish()


def test_a_part_that_fails_ends_no_other(monkeypatch, capsys):
    def parts(*_):
        raise RuntimeError("no room")
        yield

    for name in ("analyses", "training", "small_models", "first_calls", "compiled_training"):
        monkeypatch.setattr(goals, name, parts)
    with pytest.raises(SystemExit, match=r"^not measured: analyses; .*steps; first calls; "):
        goals.main(["--dry-run"])
    said = capsys.readouterr().out
    assert "not measured: steps: RuntimeError: no room" in said
    assert "| a protection, tiny" in said


def test_a_rehearsal_measures_every_goal_and_keeps_nothing(capsys, monkeypatch):
    monkeypatch.setattr(goals, "append_record", lambda *_: pytest.fail("a rehearsal was kept"))
    start, first = subprocess.run, {}

    def run(*given, **options):
        """Without a GPU there is no Triton cache: the second process would do as the first did."""
        command = str(given)
        if measure.DEVICE.type == "cuda" or "benchmarks.goals" not in command:
            return start(*given, **options)
        if command not in first:
            first[command] = start(*given, **options)
        return first[command]

    monkeypatch.setattr(subprocess, "run", run)
    goals.main(["--dry-run"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert all(re.search(r"\| [\d.e+-]+ (%|ms|s|GiB)", line) for line in lines)
    judged = [line for line in lines if line.endswith(("reached |", "missed |"))]
    # the analysis of a large model and of a small one, first calls, steps
    assert len(judged) == 6 + 1 + 2 + 4
