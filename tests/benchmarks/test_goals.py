"""The figures that a GPU is to reach, rehearsed on a tiny model."""

import re

import pytest

from benchmarks import goals


@pytest.mark.parametrize(
    ("value", "goal", "more", "verdict"),
    [(3, 4, False, "reached"), (5, 4, False, "missed"), (5, 4, True, "reached"), (3, None, 0, "")],
)
def test_verdicts(value, goal, more, verdict):
    assert goals.Measured("a figure", value, goal, "ms", more).verdict == verdict


def test_a_rehearsal_measures_every_goal_and_keeps_nothing(capsys, monkeypatch):
    monkeypatch.setattr(goals, "append_record", lambda *_: pytest.fail("a rehearsal was kept"))
    goals.main(["--dry-run"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert all(re.search(r"\| [\d.e+-]+ (%|ms|s|GiB)", line) for line in lines)
    judged = [line for line in lines if line.endswith(("reached |", "missed |"))]
    # the analysis of a large model and of a small one, first calls, steps
    assert len(judged) == 6 + 1 + 2 + 5
