from __future__ import annotations

import json
import math

import pytest
import torch

import loki_kernels as loki
from loki_kernels.demo import main as demo
from loki_kernels.demo.evaluation import evaluate
from loki_kernels.demo.function_calls import SYSTEM, generate_examples
from loki_kernels.demo.training import collate
from tests.models import build_model
from tests.tiny_training import ROWS, train


def test_examples_are_seeded_and_functions_held_out():
    train, test = generate_examples(100, 40)
    assert (train, test) == generate_examples(100, 40)
    assert train != generate_examples(100, 40, seed=1)[0]

    def offered(examples):
        return {
            line.split("(")[0]
            for example in examples
            for line in example.system.removeprefix(SYSTEM).splitlines()
        }

    assert not offered(train) & offered(test)
    for example in train + test:
        call = json.loads(example.call)
        assert call["name"] == example.function
        assert f"{example.function}({', '.join(call['arguments'])})" in example.system
        for value in call["arguments"].values():
            assert str(value) in example.request


def test_evaluation_of_known_distribution():
    """A head that knows nothing gives the vocabulary's size as perplexity, and no exact match."""
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
        {"input_ids": [5, 6], "labels": [-100, 6]},
        {"input_ids": [5, 0], "labels": [-100, 0]},  # token 0 wins the tie
    ]
    result = evaluate(model, rows, rows, rows)
    assert result.task_loss == pytest.approx(math.log(97), rel=1e-5)
    assert result.perplexity == pytest.approx(97, rel=1e-5)
    assert result.answer_log_probability == pytest.approx(-math.log(97), rel=1e-5)
    assert result.task_exact == pytest.approx(1 / 3)


def test_evaluation_ignores_padding():
    model = build_model()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in (3, 9, 5):
        ids = torch.randint(1, 97, (n,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    together = evaluate(model, rows, rows, rows)
    losses = []
    for row in rows:
        batch = {name: tensor.to(model.device) for name, tensor in collate([row]).items()}
        losses.append(float(model(**batch).loss.detach()) * (len(row["input_ids"]) - 1))
    tokens = sum(len(row["input_ids"]) - 1 for row in rows)
    assert together.task_loss == pytest.approx(sum(losses) / tokens, rel=1e-5)


def test_the_checkpoint_is_checked_by_a_process_of_its_own(tmp_path):
    class Tokenizer:
        def save_pretrained(self, _folder):
            pass

    model = build_model(device="cpu")
    hashes = demo._row_hashes(model)
    handle = loki.patch(model, ROWS)
    train(model)
    check = demo._save_and_check(model, Tokenizer(), handle.rows, hashes, [5, 7, 9], tmp_path)
    assert check["selected_rows_trained"] == check["selected_rows"] == 6
    assert check["unselected_rows_changed"] == 0
    hashes["model.embed_tokens.weight"][3] = "another"
    with pytest.raises(RuntimeError, match="is not what was trained"):
        demo._save_and_check(model, Tokenizer(), handle.rows, hashes, [5, 7, 9], tmp_path)
