"""Two gloo processes on the CPU: which rows an adapter has in each."""

from __future__ import annotations

import json

import pytest

from tests.two_processes import run_worker


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "out.json"
    run_worker("tests.peft.ranks_worker", out)
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
