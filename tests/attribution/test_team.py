"""Two gloo processes share an attribution. On the CPU, whatever --device says."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import loki_kernels as loki
from loki_kernels.attribution.plan import BatchLimits, Window
from loki_kernels.attribution.prompts import Tokens
from loki_kernels.team import Team
from tests.attribution.test_log import PROMPTS as TINY_PROMPTS
from tests.models import build_model
from tests.two_processes import run_worker


@pytest.fixture(scope="module")
def found(tmp_path_factory, base_folder):
    """The folder, and what each of the two processes says."""
    out = tmp_path_factory.mktemp("team")
    run_worker("tests.attribution.team_worker", out, base_folder)
    return out, [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("keep", ["scores", "counts"])
@pytest.mark.parametrize("where", ["memory", "file", "stream"])
def test_every_process_has_the_bits_that_one_gives(found, keep, where):
    said = [each[keep][where] for each in found[1]]
    assert [each["same"] for each in said] == [True, True]
    batches = [len(each["batches"]) for each in said]
    assert batches == [3, 3]  # of 11 prompts, 2 at a time
    members = [i for each in said for batch in each["batches"] for i in batch]
    assert sorted(members) == list(range(11))


@pytest.mark.parametrize("keep", ["scores", "counts"])
def test_the_file_and_fewer_batches_than_processes(found, keep):
    kind = loki.Attribution if keep == "scores" else loki.AttributionCounts
    assert len(kind.load(found[0] / f"{keep}.safetensors").targets) == 11
    assert [each[keep]["one batch"] for each in found[1]] == [1, 1]
    assert not list(found[0].glob("*.partial"))


@pytest.mark.parametrize("keep", ["scores", "counts"])
def test_what_ends_one_process_ends_both_and_is_continued(found, keep):
    first, second = (each[keep] for each in found[1])
    assert second["failed"] == "KeyError: 'killed'"
    assert "process 1, which shares this job, failed with KeyError" in first["failed"]
    for name in ("continued", "unseen"):  # in the second process, which the first one tells
        assert first[name]["same"]
        assert second[name]["same"]
        done = first[name]["before"] + second[name]["before"]
        assert second[name]["before"] == 2
        assert first[name]["after"] + second[name]["after"] == 6 - done


def test_what_is_not_one_job_is_refused_by_all(found):
    for case, message in (
        ("other prompts", "other prompts than"),
        ("other model", "another model"),
    ):
        said = [each[case] for each in found[1]]
        assert all(message in error for error in said), said
        assert any(error.startswith("ValueError") for error in said)
    assert [each["memory"].split(":")[0] for each in found[1]] == ["OutOfMemoryError"] * 2


def test_patch_shares_its_analysis(found):
    first, second = (each["patch"] for each in found[1])
    assert first["rows"] == second["rows"]
    assert first["batches"] == second["batches"] == 3
    assert [each["patch again"] for each in found[1]] == [0, 0]


def test_the_command_under_torchrun(found):
    assert [each["command"] for each in found[1]] == [0, 0]
    assert sum(each["command batches"] for each in found[1]) == 5
    assert len(loki.Attribution.load(found[0] / "command.safetensors").targets) == 20


def test_one_process_is_a_team():
    with Team() as team:
        team.meet()
        team.check()
        assert team.all(True)
        assert not team.all(False)
        assert team.tell("x") == ["x"]
        assert team.advance(3) == 3
        assert team.share([5, 1]) == [True, True]


def test_shares_are_of_equal_cost():
    team = Team()
    team.size, team._loads = 3, [0.0] * 3
    costs = [9, 8, 5, 5, 4, 3, 2]
    owners = []
    for team.rank in range(3):
        team._loads = [0.0] * 3
        owners.append(team.share(costs))
    assert [sum(each) for each in zip(*owners, strict=True)] == [1] * len(costs)
    for own in owners:
        assert sum(cost for cost, mine in zip(costs, own, strict=True) if mine) == 12


def test_few_prompts_are_batches_for_all():
    window = Window(0, [Tokens(np.arange(4))] * 10)
    for processes, want in ((1, [10]), (4, [3, 3, 3, 1]), (64, [1] * 10)):
        limits = BatchLimits.of(torch.device("cuda"), None, processes)
        assert [len(b.members) for b in window.batches(0, limits, 7)] == want
    limits = BatchLimits.of(torch.device("cuda"), 5, 64)
    assert [len(b.members) for b in window.batches(0, limits, 7)] == [5, 5]


def test_prompts_that_the_staircase_refuses_are_batches_of_decode(monkeypatch):
    monkeypatch.setattr("loki_kernels.attribution.plan._POINTS", 14)  # of two prompts
    long = Tokens(np.arange(4), answer=np.arange(2))
    window = Window(0, [long, Tokens(np.arange(3)), long, long, Tokens(np.arange(2))])
    limits = BatchLimits(None, tokens=100, points=100)
    planned = window.batches(0, limits.of_engine("staircase"), 7)
    assert [batch.members for batch in planned] == [[1, 4], [0, 2], [3]]
    planned = window.batches(0, limits, 7)
    assert [batch.members for batch in planned] == [[0, 2, 3, 1, 4]]


def test_a_process_on_the_cpu_makes_all_plan_as_a_cpu_does(monkeypatch):
    """Where one GPU has room for the model and another has not; else their batches would differ."""
    module = sys.modules["loki_kernels.attribution.attribute"]
    monkeypatch.setattr(module, "points_that_fit", lambda _, on: None if on.type == "cpu" else 9000)

    class Others:
        size = 2

        def __init__(self, other):
            self.other = other

        def tell(self, mine):
            return [mine, self.other]

    def limits(device, other):
        structure = SimpleNamespace(device=torch.device(device), causal_lm=build_model())
        return module._limits(structure, None, Others(other))

    want = BatchLimits.of(torch.device("cpu"), None, 2)
    assert limits("cpu", "cuda 9000") == limits("cuda", "cpu 0") == want
    assert limits("cuda", "cuda 8000") == BatchLimits.of(torch.device("cuda"), None, 2, 8000)


def test_a_process_without_a_group_shares_nothing():
    want = loki.attribute(build_model(), TINY_PROMPTS, steps=1)
    got = loki.attribute(build_model(), TINY_PROMPTS, steps=1, share=False)
    assert torch.equal(got.scores, want.scores)
