from __future__ import annotations

import json
import math

import pytest
import torch

import loki_kernels as loki
from loki_kernels.demo import main as demo
from loki_kernels.demo.evaluation import Examination
from loki_kernels.demo.frontier import at_equal_loss, plot_frontier
from loki_kernels.demo.function_calls import SYSTEM, best_constant, generate_examples
from loki_kernels.demo.methods import FULL, LOKI, LORA, Update, trainable
from loki_kernels.demo.training import collate
from loki_kernels.questions import Question
from tests.models import build_model
from tests.tiny_tokenizers import word_tokenizer
from tests.tiny_training import logits, protection_of, train


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


def test_the_best_constant_call():
    _, test = generate_examples(1, 36)
    calls = [example.call for example in test]
    assert best_constant(test) == max(map(calls.count, calls)) / 36
    assert best_constant(test[:1]) == 1


def records(lengths=(3, 9, 5)):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(1, 97, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in drawn]


def examination(model, task):
    questions = [Question(f"w8 w{i} w{2 * i}", ("w1", "w2", "w3", "w4"), i) for i in range(3)]
    return Examination(model, word_tokenizer(), task, records((30, 30)), questions)


def test_an_examination_of_known_distributions():
    """A head that knows nothing gives the vocabulary's size as perplexity, and no exact match."""
    model, base = build_model(), build_model()
    exam = examination(base, [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
        {"input_ids": [5, 6], "labels": [-100, 6]},
        {"input_ids": [5, 0], "labels": [-100, 0]},  # token 0 wins the tie
    ])  # fmt: skip
    same = exam.evaluate(model)
    assert same.kl == same.text_kl == same.questions_kl == 0
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = exam.evaluate(model)
    assert result.loss == pytest.approx(math.log(97), rel=1e-5)
    assert result.text_perplexity == pytest.approx(97, rel=1e-5)
    assert result.questions_perplexity == pytest.approx(97, rel=1e-5)
    assert result.exact == pytest.approx(1 / 3)
    assert min(result.text_kl, result.questions_kl) <= result.kl
    assert result.kl <= max(result.text_kl, result.questions_kl)
    ids = torch.tensor([record["input_ids"] for record in records((30, 30))], device=base.device)
    log_p = base(input_ids=ids).logits.detach().double().log_softmax(-1)
    kl = (log_p.exp() * (log_p + math.log(97))).sum(-1).mean()
    assert result.text_kl == pytest.approx(float(kl), rel=1e-4)


def test_the_task_s_loss_ignores_padding():
    model, task = build_model(), records()
    together = examination(model, task).evaluate(model)
    losses = []
    for record in task:
        batch = {name: tensor.to(model.device) for name, tensor in collate([record]).items()}
        losses.append(float(model(**batch).loss.detach()) * (len(record["input_ids"]) - 1))
    tokens = sum(len(record["input_ids"]) - 1 for record in task)
    assert together.loss == pytest.approx(sum(losses) / tokens, rel=1e-5)


@pytest.mark.parametrize("method", [FULL, LORA, LOKI])
def test_every_method_trains_and_gives_the_base_back(method):
    base = build_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    protection = protection_of(base)
    with trainable(method, base, protection) as model:
        untouched = logits(model)
        update = Update(model)
        train(model, lr=0.01)
        trained = logits(model)
        update.keep(0.0)
        torch.testing.assert_close(logits(model), untouched)
        update.keep(0.5)
        half = logits(model)
        update.keep(1.0)
        torch.testing.assert_close(logits(model), trained)
        if method == LOKI:
            state = model.state_dict()
            for name, directions in protection.directions.items():
                change = (state[f"{name}.weight"] - before[f"{name}.weight"]).cpu()
                assert change.abs().max() > 1e-4
                assert (change @ directions).abs().max() < 1e-5
        assert 0 < (half - untouched).norm() < (trained - untouched).norm()
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_methods_are_compared_where_all_of_them_got():
    """Half the KL at every loss; and one that only got where another one never was."""
    points = [(0.1, 0.8), (0.2, 0.2), (0.4, 0.05)]
    methods = {"a": points, "b": [(loss, kl / 2) for loss, kl in points], "c": [(0.2, 0.6)]}
    losses, kl = at_equal_loss(methods)
    assert losses == (0.2, 0.2)
    assert kl == pytest.approx({"a": 0.2, "b": 0.1, "c": 0.6})
    losses, kl = at_equal_loss({"a": points[1:], "c": [(0.3, 0.6)], "d": [(0.05, 0.5)]})
    assert losses == (0.3, 0.3)
    assert kl == pytest.approx({"a": 0.1, "c": 0.6})
    losses, kl = at_equal_loss({"a": points, "b": [(0.2, 0.8), (0.3, 0.8), (0.35, 0.7)]})
    assert losses == (0.2, 0.35)
    assert kl["a"] == pytest.approx(0.2 / 2**0.75)  # halved within .1, on the way to .35
    assert "2.0 times as much after LoRA" in demo._sentence((0.2, 0.3), {LOKI: 0.1, LORA: 0.2})
    assert "no loss on the calls" in demo._sentence((0.2, 0.2), {LORA: 0.2})


def test_the_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    plot_frontier(tmp_path / "frontier.png", {"a": [(0.1, 0.2), (0.2, 0.1)]}, 1.7)
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_that_is_not_what_was_trained_is_an_error(tmp_path):
    model = build_model(device="cpu")
    hashes = demo._row_hashes(model)
    loki.patch(model, quota=100)
    arguments = model, word_tokenizer(), hashes, [5, 7, 9], tmp_path
    with pytest.raises(RuntimeError, match="'trained_rows_changed': 0"):
        demo._save_and_check(*arguments)
    train(model)
    assert demo._save_and_check(*arguments)["trained_rows_changed"] == 3 * 48
    hashes["model.embed_tokens.weight"][3] = "another"
    with pytest.raises(RuntimeError, match="'other_rows_changed': 1"):
        demo._save_and_check(*arguments)


def test_the_whole_demo_on_a_tiny_model(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "load_smollm2", lambda: (build_model(device="cpu"), word_tokenizer()))
    samples = torch.randint(3, 97, (8, 40), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr(demo, "load_samples", lambda: samples)
    monkeypatch.setattr(demo, "QUICK_SIZE", demo.Size(4, 2, 8, 4, 2, 2, (1.0, 0.5)))
    demo.run_demo(tmp_path, quick=True)
    report = json.loads((tmp_path / "report.json").read_text())
    check = report["checkpoint"]
    assert not check["loki_kernels_imported"]
    assert check["trained_rows_changed"] == check["trained_rows"] > 0
    assert check["other_rows_changed"] == 0
    assert all(shares["1.0"]["kl"] > shares["0.5"]["kl"] for shares in report["results"].values())
    table = (tmp_path / "table.md").read_text()
    assert all(method in table for method in (FULL, LORA, LOKI))
    assert (tmp_path / "frontier.png").is_file()
