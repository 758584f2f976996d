"""Two gloo processes attribute models that FSDP2 or tensor parallelism has split. On the CPU."""

from __future__ import annotations

import json

import pytest

from tests.two_processes import run_worker

OWN = [[3, 2], [4]], [[1, 0], [4]]  # the second process fills up with the last batch
ALL = [[3, 2], [1, 0], [4]]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes says."""
    out = tmp_path_factory.mktemp("sharded")
    run_worker("tests.attribution.sharded_worker", out)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


CASES = (
    "layers and root", "root", "layers", "groups", "put away at once", "mixed precision",
    "norms after", "sequence", "decode", "alone",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_one_process(found, case):
    engine = "decode" if case == "decode" else "staircase"
    for rank, said in enumerate(each["compared"][case] for each in found):
        # rotary embeddings are float32 under mixed precision, and bfloat16 in the other model
        assert said["distance"] <= (1e-2 if case == "mixed precision" else 1e-6)
        assert said["batches"] == (OWN[rank] if engine == "staircase" and case != "alone" else ALL)
        assert said["engine"] == engine
        assert said["as before"]
        assert said.get("trains", True)


def test_a_log_is_of_the_whole_model_and_all_end_after_one_batch(found):
    for said in (each["stopped"] for each in found):
        assert said["sharded"] == said["fingerprint"]
        assert said["ended"] == 128 + 15
        assert said["distance"] <= 1e-6
        assert (said["before"], said["after"]) == (1, 1)


def test_averages_and_a_model_within_another(found):
    assert all(each["averaged"] <= 1e-6 for each in found)
    assert all(each["within"] <= 1e-6 for each in found)


def test_tensor_parallelism(found):
    for said in (each["parallel"] for each in found):
        assert said["split"] == 112 // 2
        assert said["distance"] <= 1e-5
        assert said["batches"] == ALL
        of_patch, of_neurons = said["refused"]
        assert "patch does not support" in of_patch
        assert "site='down_proj'" in of_neurons


def test_all_cases_are_there(found):
    assert set(found[0]["compared"]) == set(CASES)
