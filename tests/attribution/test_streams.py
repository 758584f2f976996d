"""Prompts that are never all in memory."""

from __future__ import annotations

import json
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from loki_kernels import PromptStream, attribute
from loki_kernels.attribution import job, log
from loki_kernels.cli import main
from loki_kernels.questions import Question
from tests.attribution.results import assert_same
from tests.attribution.test_log import PROMPTS, Killer
from tests.models import build_model

QUESTION = {"question": "Is it?", "choices": ["a", "b", "c", "d"], "answer": 1}
OPTIONS = {"batch_size": 2, "steps": 1}
own = sys.modules["loki_kernels.attribution.attribute"]  # the name is the function's too


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "result.safetensors"


@pytest.fixture
def windows_of_three(monkeypatch):
    monkeypatch.setattr(own, "WINDOW", 3)


@pytest.mark.parametrize("keep", ["scores", "counts"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_stream_gives_what_a_list_gives_in_its_order(keep, on_disk, model, out, windows_of_three):
    want = attribute(model, PROMPTS, keep=keep, batch_size=1, steps=1)
    to = {"out": out} if on_disk else {}
    got = attribute(model, iter(PROMPTS), keep=keep, batch_size=1, steps=1, **to)
    assert_same(got, want)


def test_no_more_than_a_window_is_read_ahead(model, windows_of_three, monkeypatch):
    """And in it the longest prompts come first."""
    read, lengths = [], []

    def prompts():
        for prompt in PROMPTS:
            read.append(prompt)
            yield prompt

    compute = job.attribute_batch

    def looking(engine, batch):
        assert len(read) <= 3 * (len(lengths) // 2 + 1)
        lengths.append(batch.lengths.tolist())
        return compute(engine, batch)

    monkeypatch.setattr(job, "attribute_batch", looking)
    attribute(model, prompts(), **OPTIONS)
    # of 2, 3, 4, 5, 2, 3, 4 and 5 tokens
    assert lengths == [[4, 3], [2], [5, 3], [2], [5, 4]]


@pytest.mark.parametrize("keep", ["scores", "counts"])
def test_memory_does_not_grow_with_a_stream(keep, model, out, monkeypatch):
    """Of 1,024 prompts, with 590 kB of scores and 37 kB of what is kept beside them."""
    monkeypatch.setattr(own, "WINDOW", 64)
    arrays = []

    def prompts():
        for i in range(1024):
            if i % 64 == 0:
                held = tracemalloc.take_snapshot().filter_traces([
                    tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
                ])  # fmt: skip
                arrays.append(sum(trace.size for trace in held.traces))
            yield {"input_ids": [1 + i % 90, 2]}

    tracemalloc.start()
    attribute(model, prompts(), keep=keep, out=out, batch_size=64, steps=1)
    tracemalloc.stop()
    assert max(arrays) < 10_000


@pytest.mark.parametrize("keep", ["scores", "counts"])
def test_a_killed_stream_goes_on(keep, model, out, windows_of_three, monkeypatch):
    monkeypatch.setattr(log, "_SECONDS_BETWEEN_COUNTS", 0)
    want = attribute(model, iter(PROMPTS), keep=keep, **OPTIONS)
    killer = Killer(monkeypatch, out)
    killer.kill(lambda: attribute(model, iter(PROMPTS), keep=keep, out=out, **OPTIONS), 30, 0.5)
    for other in (PROMPTS[:2], [{"input_ids": [9, 9]}, *PROMPTS[1:]]):
        with pytest.raises(ValueError, match="differs in: prompts"):
            attribute(model, iter(other), keep=keep, out=out, **OPTIONS)
    assert_same(attribute(model, iter(PROMPTS), keep=keep, out=out, **OPTIONS), want)


def test_targets_of_a_stream(model, windows_of_three):
    targets = list(range(10, 18))
    want = attribute(model, PROMPTS, target=targets, **OPTIONS)
    got = attribute(model, iter(PROMPTS), target=targets, **OPTIONS)
    torch.testing.assert_close(got.scores, want.scores)
    with pytest.raises(ValueError, match=r"each of the 5 or more prompts.* has 4"):
        attribute(model, iter(PROMPTS), target=targets[:4], **OPTIONS)
    with pytest.raises(ValueError, match=r"each of the 8 prompts.* has 9"):
        attribute(model, iter(PROMPTS), target=[*targets, 3], **OPTIONS)


RECORDS = [
    QUESTION,
    {"text": "w1 w2"},
    {"prompt": "w3"},
    {"prompt": [{"role": "user", "content": "w4"}]},
    {"messages": [{"role": "user", "content": "w5"}]},
]


def test_records_of_a_file_and_a_folder(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    stream = PromptStream.of_file(path)
    want = [Question("Is it?", ("a", "b", "c", "d"), 1), *RECORDS[1:]]
    assert len(stream) == 5
    assert list(stream) == list(stream) == want
    path.write_text(json.dumps({"text": "w1"}) + "\n" + json.dumps({"answer": "A"}) + "\n")
    with pytest.raises(ValueError, match=r"test\.jsonl, line 2 has no question"):
        PromptStream.of_file(path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no"):
        PromptStream.of_file(path)


def test_parquet_and_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "test.parquet"
    datasets.Dataset.from_list([QUESTION | {"answer": i} for i in range(4)]).to_parquet(path)
    for stream in (PromptStream.of_file(path), PromptStream.of_dataset(str(tmp_path / "data"))):
        assert len(stream) == 4
        assert [question.answer for question in stream] == [0, 1, 2, 3]
    with pytest.raises(FileNotFoundError):
        PromptStream.of_file(tmp_path / "other.parquet")


def test_the_command_reads_a_stream_and_finds_what_is_wrong_first(base_folder, tmp_path, capsys):
    path, out = tmp_path / "mine.jsonl", tmp_path / "counts.safetensors"
    path.write_text("".join(json.dumps({"text": f"w{i} w7"}) + "\n" for i in range(5)))
    command = [
        "attribute",
        str(base_folder),
        str(out),
        "--keep",
        "counts",
        "--questions",
        str(path),
    ]
    assert main(command) == 0
    assert "5 samples" in capsys.readouterr().out
    path.write_text(path.read_text() + '{"answer": 1}')
    assert main(["attribute", "no/model", *command[2:]]) == 1
    assert "mine.jsonl, line 6 has no question" in capsys.readouterr().err
