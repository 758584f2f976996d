"""The settings that are proposed to PEFT, and the copy of its benchmark that runs on a CPU."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("peft")

from peft import PeftConfig

from benchmarks.upstream.__main__ import (
    CHANGES,
    HERE,
    OURS,
    copy_experiment,
    prepare,
    texts,
)
from loki_kernels.peft import LokiConfig

BENCHMARK = Path("method_comparison") / "MetaMathQA"


@pytest.fixture
def checkout(tmp_path):
    """As much of PEFT's repository as is copied."""
    folder = tmp_path / "peft" / BENCHMARK
    (folder / "experiments" / "lora" / "rank").mkdir(parents=True)
    (folder / "experiments" / "lora" / "rank" / "adapter_config.json").write_text("{}")
    for name in ("run.py", "utils.py", "data.py", "default_training_params.json"):
        (folder / name).write_text("\n".join(old for file, old, _ in CHANGES if file == name))
    return tmp_path / "peft"


@pytest.mark.parametrize("name", OURS)
def test_settings_are_ones_that_peft_reads(name):
    config = PeftConfig.from_pretrained(HERE / "experiments" / name)
    assert isinstance(config, LokiConfig)
    assert config.rank is None
    assert (config.protect is None) == ("protected" not in name)
    text = (HERE / "experiments" / name / "training_params.json").read_text()
    assert json.loads(text)["optimizer_kwargs"]["weight_decay"] == 0


def test_the_copy_differs_where_it_says(checkout, tmp_path):
    prepare(checkout, tmp_path)
    for name, old, new in CHANGES:
        text = (tmp_path / name).read_text()
        assert new in text
        assert old not in text
    (checkout / BENCHMARK / "run.py").write_text("assert True")
    with pytest.raises(SystemExit, match=r"run\.py of this PEFT no longer says"):
        prepare(checkout, tmp_path)
    with pytest.raises(SystemExit, match="is no checkout of PEFT"):
        prepare(tmp_path / "elsewhere", tmp_path)


def test_settings_keep_what_they_say_at_another_scale(checkout, tmp_path):
    training = {"max_steps": 3, "optimizer_kwargs": {"lr": 1.0}}
    for name, changed in (("lora/rank", True), (OURS[0], False)):
        path = tmp_path / copy_experiment(checkout, tmp_path, name, training, hidden_size=576)
        params = json.loads((path / "training_params.json").read_text())
        assert params["max_steps"] == 3
        assert (params["optimizer_kwargs"]["lr"] == 1.0) == changed
    adapter = json.loads((path / "adapter_config.json").read_text())
    assert int(adapter["quota"] / 100 * 576) == 40


def test_texts_of_training_and_testing_are_different(shared_data):
    made = texts(shared_data, 4)
    assert [len(made[part]) for part in ("valid", "test", "wiki")] == [4, 4, 4]
    held_out = {record["question"] for record in made["valid"] + made["test"]}
    assert len(held_out) == 8
    assert held_out.isdisjoint(record["query"] for record in made["train"])
    assert all(re.search(r"The answer is: \S+$", record["response"]) for record in made["train"])
