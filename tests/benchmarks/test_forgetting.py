"""The study's numbers, from known answers; and a small piece of each kind, end to end."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from benchmarks.forgetting import compare, constants, methods, metrics, tasks, workshop
from benchmarks.forgetting.__main__ import HERE
from benchmarks.forgetting.pieces import best_rate, pieces, run
from benchmarks.forgetting.report import write_study_report
from benchmarks.forgetting.results import Results
from benchmarks.forgetting.retention import ACCURACIES, Choices, choice_log_probabilities
from benchmarks.forgetting.study import Study, Training
from benchmarks.forgetting.training import train_steps
from loki_kernels import Attribution
from loki_kernels.demo.evaluation import token_log_probabilities
from tests.models import build_model
from tests.tiny_tokenizers import word_tokenizer

TINY = LlamaConfig(
    vocab_size=50, hidden_size=40, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip


def test_token_loss_and_perplexity():
    log_p = [torch.tensor([0.5, 0.25]).log(), torch.tensor([0.125]).log()]
    assert metrics.token_loss(log_p) == pytest.approx(2 * math.log(2))
    assert metrics.perplexity(log_p) == pytest.approx(4.0)


def test_exact_match():
    right, wrong = torch.tensor([True, True]), torch.tensor([True, False])
    assert metrics.exact_match([right, wrong, right, right]) == 0.75


def test_choice_accuracy_is_by_mean_log_probability():
    # the first question's right choice is longer, and better by token
    log_p = [
        [torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-2.0])],
        [torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([-0.5])],
    ]
    assert metrics.choice_accuracy(log_p, [0, 2]) == 1.0
    assert metrics.choice_accuracy(log_p, [1, 2]) == 0.5


def test_choices_in_one_row_are_read_apart():
    torch.manual_seed(0)
    model = LlamaForCausalLM(TINY).double().eval()
    questions = [
        Choices([1, 2, 3], [[4], [5, 6, 7]]),
        Choices([8, 9, 10, 11, 12, 13], [[14, 15], [16], [17, 18, 19, 20]]),
        Choices([21, 22], [[23], [24]]),
    ]
    for length in (1, 20, 512):  # a question a sequence, some, all in one
        found = choice_log_probabilities(model, questions, length)
        for question, log_p in zip(questions, found, strict=True):
            for choice, ours in zip(question.choices, log_p, strict=True):
                prompt = question.context
                record = {"input_ids": prompt + choice, "labels": [-100] * len(prompt) + choice}
                ((want, _),) = token_log_probabilities(model, [record], 1)
                torch.testing.assert_close(ours, want, atol=1e-5, rtol=0)


def test_ndcg():
    assert metrics.ndcg([3.0, 2.0, 1.0], [1, 1, 0], 10) == 1.0
    # the one relevant document third: 1 / log2(4) of an ideal 1
    assert metrics.ndcg([3.0, 2.0, 1.0], [0, 0, 1], 10) == pytest.approx(0.5)
    assert metrics.ndcg([3.0, 2.0, 1.0], [0, 0, 1], 2) == 0.0
    # graded: gains 2^r - 1
    want = (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))
    assert metrics.ndcg([2.0, 1.0], [1, 2], 10) == pytest.approx(want)
    # a model that says the same of all gains nothing by the order of the candidates
    assert metrics.ndcg([1.0, 1.0, 1.0], [1, 0, 0], 10) == pytest.approx(0.5)
    assert metrics.ndcg([1.0], [0], 10) == 1.0


def test_candidates_are_ranked_by_the_mean_of_the_digits():
    class Judge(torch.nn.Module):
        """Says digit a, sometimes b: a record is [a, b, the right answer]."""

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, logits_to_keep, **_):
            logits = torch.full((*input_ids.shape, 10), -30.0)
            a, b = input_ids[:, 0], input_ids[:, 1]
            logits[torch.arange(len(a)), 1, b] = math.log(0.25)
            logits[torch.arange(len(a)), 1, a] = math.log(0.75)
            return CausalLMOutput(logits=logits[:, logits_to_keep])

    def record(a, b, answer):
        return {"input_ids": [a, b, answer], "labels": [-100, -100, answer]}

    # means of 5.75, 5.5 and 1.25, although the second one's most likely digit is the highest
    records = [record(6, 5, 6), record(7, 1, 1), record(1, 2, 1)]
    for relevance, ndcg in (([1, 0, 0], 1.0), ([0, 1, 0], 1 / math.log2(3)), ([0, 0, 1], 0.5)):
        found = tasks._score_rankings(
            Judge(), [tasks.Ranking(records, relevance, list(range(1, 8)))]
        )
        assert found["ndcg@10"] == pytest.approx(ndcg)
        assert found["loss"] == pytest.approx(-math.log(0.75 * 0.25 * 0.75) / 3)


def test_the_best_constant_answers():
    records = [{"input_ids": [], "labels": [-100, *answer]} for answer in ([3, 4], [3], [3, 4])]
    assert constants.of_calls(records) == pytest.approx(2 / 3)
    rankings = [tasks.Ranking([], [0, 0, 0, 1], []), tasks.Ranking([], [0, 1, 0, 0], [])]
    loss, ndcg = constants.of_rankings(rankings)
    assert loss == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    # ties are broken against the order: the relevant one is first, and third
    assert ndcg == pytest.approx((1 + 1 / math.log2(4)) / 2)


def test_average_change():
    before, after = {"a": 0.5, "b": 0.4}, {"a": 0.45, "b": 0.42}
    assert metrics.average_change(before, after) == pytest.approx(-2.5)
    assert metrics.average_change({"a": 0.5, "c": 0.0}, {"a": 0.4, "c": 0.1}) == pytest.approx(-20)


def test_standard_error():
    assert metrics.standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))


def test_differences_are_paired_and_noise_is_called_noise():
    ours, other = {0: 1.0, 1: 2.0, 2: 3.0}, {2: 2.0, 1: 1.0, 0: 0.0, 3: 9.0}
    found = compare.difference(ours, other)
    assert (found.mean, found.half, found.is_noise) == (1.0, 0.0, False)
    # scipy.stats.t.interval(.95, 2, loc=1, scale=3 ** -.5): 1 -/+ 2.484
    found = compare.estimate([0.0, 1.0, 2.0])
    assert (found.mean, found.half) == pytest.approx((1.0, 4.3027 / math.sqrt(3)), rel=1e-4)
    assert found.is_noise
    assert str(found) == "+1.000 ± 2.484 (noise)"
    assert compare.difference(ours, {2: 1.0}) is None


def test_perplexity_at_equal_loss():
    curve = [(3.0, 10.0), (1.0, 40.0), (0.5, 80.0)]
    assert compare.perplexity_at(curve, 3.0) == pytest.approx(10.0)
    assert compare.perplexity_at(curve, 2.0) == pytest.approx(20.0)
    assert compare.perplexity_at(curve, 0.5) == pytest.approx(80.0)
    assert math.isnan(compare.perplexity_at(curve, 0.4))

    def run(*points):
        return {"curve": [{"loss": loss, "perplexity": p} for loss, p in points]}

    runs = {"a": {0: run((1.0, 40.0), (0.5, 80.0))}, "b": {0: run((2.0, 11.0), (1.0, 12.0))}}
    before = {0: 3.0, 1: 3.0}
    common = compare.common_loss(runs, before)
    assert common == {0: 1.0}
    found = compare.at_equal_loss(runs, before, 10.0, common)
    assert found == {"a": {0: pytest.approx(40.0)}, "b": {0: pytest.approx(12.0)}}


def test_folds_keep_groups_together():
    groups = [[0, 1, 2], [3], [4, 5], [6], [7], [8]]
    folds = tasks.make_folds(groups, 3)
    assert sorted(i for fold in folds for i in fold) == list(range(9))
    assert [len(fold) for fold in folds] == [3, 3, 3]
    assert any({0, 1, 2} <= set(fold) for fold in folds)


def test_batches_of_similar_length():
    records = [{"input_ids": list(range(n)), "labels": [n]} for n in torch.randperm(100).tolist()]
    ordered = tasks.group_by_length(records, 4, seed=0)
    assert sorted(record["labels"][0] for record in ordered) == list(range(100))

    def padding(records):
        lengths = [len(record["input_ids"]) for record in records]
        return sum(4 * max(lengths[i : i + 4]) for i in range(0, 100, 4)) - sum(lengths)

    assert padding(ordered) < 0.4 * padding(records)
    assert ordered == tasks.group_by_length(records, 4, seed=0)


def test_first_accepted_values():
    accepted = {"a": [1, 2], "b": ["", 3], "c": [], "d": [{"x": [5], "y": ["", 1]}]}
    assert tasks._first_values(accepted) == {"a": 1, "d": {"x": 5}}


def test_held_out_functions_never_occur_in_training(shared_data):
    class Words:
        eos_token = ""

        def apply_chat_template(self, messages, **_):
            return {"input_ids": [message["content"] for message in messages]}

        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": [text]}

    splits = [tasks.load_task("function_calling", shared_data, Words(), s, 100) for s in range(3)]
    for task in splits:
        assert len(task.test) == len(task.validation) == 100
        held_out = task.test + task.validation
        called = [json.loads(record["input_ids"][-1])["name"] for record in held_out]
        for record in task.train:
            offered = [json.loads(line)["name"] for line in record["input_ids"][0].split("\n")[1:]]
            assert not set(offered) & set(called)
            assert json.loads(record["input_ids"][-1])["name"] in offered
    tests = [{record["input_ids"][1] for record in task.test} for task in splits]
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(tests, 2))


def test_likeness_does_not_give_the_relevant_candidates_away(shared_data):
    """Neither many words in common nor few rank them well: something is left to learn."""
    documents, queries, judged = tasks.read_cranfield(shared_data)
    candidates = tasks.choose_candidates(queries, documents)
    relevance = [
        [judged[i].get(number, 0) for number in numbers] for i, numbers in enumerate(candidates)
    ]
    relevance = [grades for grades in relevance if any(grades)]
    assert len(relevance) == 188
    for sign, low, high in ((1, 0.4, 0.6), (-1, 0.1, 0.3)):
        gains = [metrics.ndcg([-sign * i for i in range(20)], r, 10) for r in relevance]
        assert low < sum(gains) / len(gains) < high


def test_cranfield_judgements_belong_to_their_queries(shared_data):
    documents, queries, judged = tasks.read_cranfield(shared_data)
    assert (len(documents), len(queries)) == (1400, 225)
    assert queries[0].startswith("what similarity laws must be obeyed")
    assert sum(grade for query in judged for grade in query.values()) > 1500
    # a query shares more words with what was judged relevant than with a document at random
    shared = [
        len(set(queries[i].split()) & set(documents[number].split()))
        - len(set(queries[i].split()) & set(documents[1 + (number * 7) % 1400].split()))
        for i in range(225)
        for number, grade in judged[i].items()
        if grade
    ]
    assert sum(shared) / len(shared) > 0.5


@pytest.mark.parametrize("name", ["study", "smoke"])
def test_study_files_and_their_report(name, tmp_path):
    """Every piece has a name of its own, and what has run is reported, whatever is missing."""
    study = Study.load(HERE / f"{name}.toml")
    results = Results(tmp_path / f"{name}.jsonl")
    accuracies = dict.fromkeys(ACCURACIES, 0.5)
    generator = random.Random(0)
    done = []
    for piece in pieces(study, results):
        done.append(piece.name)
        if piece.name in ("ranks/lora/seed-1", "calls/lora/seed-0", "before/reranking/0"):
            continue
        figures = {}
        if piece.name.startswith("before"):
            test = {"loss": 1.0, "exact": 0.0, "ndcg@10": 0.5}
            figures = accuracies | {"perplexity": 20.0, "test": test}
        elif "lessons" in piece.spec:
            loss = generator.random() / 2
            point = {"step": 40, "loss": loss, "exact": 0.5, "ndcg@10": 0.6, "perplexity": 21.0}
            retention = accuracies | {"perplexity": 21.0}
            earlier = {"function_calling": {"loss": 0.2, "exact": 0.1}}
            validation = {"loss": loss, "ndcg@10": loss}
            figures = {"validation": validation, "curve": [point], "retention": retention}
            figures["earlier"] = earlier if len(piece.spec["lessons"]) > 1 else {}
        elif piece.name.startswith("suppress"):
            figures = {"random": {f"{quota:g}": 30.0 for quota in study.quotas}}
        elif piece.name.startswith("stability/block"):
            continue
        else:
            figures = {"7": {"signed": 0.9}}
        record = {"piece": piece.name, "spec": piece.spec, "figures": figures}
        results.add(record | {"device": "here", "torch": "2"})
    assert len(set(done)) == len(done)
    for stage in study.stages:
        for seed in study.evaluation.seeds:
            assert {f"{stage.name}/{m}/seed-{seed}" for m in stage.methods} <= set(done)
    write_study_report(study, results)
    text = results.path.with_suffix(".md").read_text()
    assert all(f"## {stage.name}" in text for stage in study.stages)
    if name == "study":
        assert "| signed | 3 |" in text
        assert "| lora | 2 |" in text
        assert "minus full" in text
        assert "function_calling exact, change" in text
        assert "| -0.400 |" in text  # 0.1 after the second task, 0.5 before
        assert "nan" not in text


def test_study_files_with_a_mistake_are_refused(tmp_path):
    text = (HERE / "smoke.toml").read_text()
    path = tmp_path / "study.toml"
    path.write_text(text.replace('"full", "lora"', '"fulll", "lora"'))
    with pytest.raises(ValueError, match="method='fulll' is unknown"):
        Study.load(path)
    path.write_text(text.replace("batch_size", "batch"))
    with pytest.raises(ValueError, match="batch"):
        Study.load(path)
    path.write_text(text.replace('learning_rate = "calls"\n', ""))
    with pytest.raises(ValueError, match="calls-then-ranks: a stage after another needs a"):
        Study.load(path)
    path.write_text(
        text.replace('learning_rate = "calls"', "learning_rate = 1e-3\nrate_factor = 2.0")
    )
    with pytest.raises(ValueError, match="rate_factor is for another stage's learning_rate"):
        Study.load(path)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("calls", 1), ("ranks", 0)],  # the lowest loss, the highest nDCG
)
def test_the_best_on_validation_is_chosen(name, chosen, tmp_path):
    study = Study.load(HERE / "study.toml")
    stage, method = study.stage(name), study.methods["full"]
    results = Results(tmp_path / "results.jsonl")
    figures = dict(zip(method.learning_rates, (0.3, 0.1, 0.2), strict=True))
    swept = {f"{name}/full/lr-{rate:g}": figure for rate, figure in figures.items()}

    def record(piece, figure):
        validation = {"loss": figure, "ndcg@10": figure}
        return {"piece": piece.name, "spec": piece.spec, "figures": {"validation": validation}}

    for piece in pieces(study, results):
        if piece.name in swept:
            assert best_rate(study, stage, "full", results) is None
            assert not results.claim(piece)
            results.add(record(piece, swept[piece.name]))
        last = piece
        if piece.name == f"{name}/full/seed-0":
            break
    assert last.spec["lessons"][0]["learning_rate"] == best_rate(study, stage, "full", results)
    assert last.spec["lessons"][0]["learning_rate"] == method.learning_rates[chosen]


def test_of_a_piece_run_twice_the_last_row_counts(tmp_path):
    study = Study.load(HERE / "study.toml")
    results = Results(tmp_path / "results.jsonl")
    first, second, *_ = pieces(study, results)

    def record(piece, figure):
        return {"piece": piece.name, "spec": piece.spec, "figures": figure}

    for piece, figure in ((first, 1), (second, 2), (second, 3)):
        results.add(record(piece, figure))
    results.add(record(first, 4) | {"spec": first.spec | {"seed": 1}})  # another study's
    again = Results(results.path)
    claimed = {piece.name for piece in pieces(study, again) if again.claim(piece)}
    assert claimed == {first.name, second.name}
    assert again.find(first.name)["figures"] == 1
    assert again.find(second.name)["figures"] == 3


def test_a_training_that_two_stages_ask_for_runs_once(tmp_path):
    text = (HERE / "smoke.toml").read_text()
    path = tmp_path / "study.toml"
    same = """
[[stage]]
name = "calls-then-ranks-same"
after = "calls"
task = "reranking"
learning_rate = 1e-3
methods = ["lora", "magnitude"]
"""
    path.write_text(text + same)
    study, results = Study.load(path), Results(tmp_path / "study.jsonl")
    rerun = []
    for piece in pieces(study, results):
        if results.claim(piece):
            rerun.append(piece.name)
            continue
        figures = {"validation": {"loss": 0.1}}
        results.add({"piece": piece.name, "spec": piece.spec, "figures": figures})
    assert rerun == ["calls-then-ranks-same/magnitude/seed-0"]
    assert results.find(rerun[0]) == results.find("calls-then-ranks/magnitude/seed-0")
    assert results.count() == len(results.records) - 1


_STUDY = Study.load(HERE / "study.toml")


@pytest.mark.parametrize("name", list(_STUDY.methods))
def test_every_method_trains_what_it_says(name):
    method = _STUDY.methods[name]
    torch.manual_seed(0)
    model = LlamaForCausalLM(TINY)
    ids = torch.tensor([[1, 2, 3, 4]])
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = model(ids).logits.detach()
    scores = torch.randn(5, TINY.num_hidden_layers, TINY.hidden_size)
    attribution = Attribution(scores, torch.zeros(5, dtype=torch.long), torch.zeros(5))
    model, parameters = methods.prepare(model, method, attribution, seed=0)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)

    records = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}]
    list(train_steps(model, parameters, records, Training(2, 1, (2,)), 0.1))
    with torch.no_grad():
        after = model(ids).logits
    assert not torch.allclose(after, before, atol=1e-3)
    if method.kind == "rows":
        changed = {
            name: (p != original[name]).any(1).sum().item()
            for name, p in model.state_dict().items()
            if name in original and not torch.equal(p, original[name])
        }
        assert all("down_proj" in name for name in changed)
        wanted = TINY.hidden_size * TINY.num_hidden_layers * method.quota / 100
        assert sum(changed.values()) == pytest.approx(wanted, abs=TINY.num_hidden_layers)
    elif method.kind in ("full", "down_proj"):
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, original[n])]
        assert set(changed) == {n for n in original if method.kind == "full" or "down_proj" in n}
    else:
        plain = {
            n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters()
        }
        kept = [torch.equal(plain[n], original[n]) for n in original]
        assert (
            all(kept) or method.kind == "pissa"
        )  # which moves a part of each weight to the adapter


def test_learning_rates_rise_and_fall(monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def record(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    model = LlamaForCausalLM(TINY)
    records = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}]
    points = list(
        train_steps(model, list(model.parameters()), records, Training(20, 1, (5, 20)), 0.19)
    )
    assert [step for step, _ in points] == [5, 20]
    assert rates == pytest.approx([0.095, 0.19] + [0.01 * n for n in range(18, 0, -1)])


def test_every_kind_of_piece_runs(shared_data, tmp_path, monkeypatch):
    """On a tiny model: the demo's own takes ten minutes for this."""
    model = build_model()
    monkeypatch.setattr(workshop, "load_smollm2", lambda: (model, word_tokenizer()))
    study = Study.load(HERE / "smoke.toml")
    results = Results(tmp_path / "smoke.jsonl")
    shop = workshop.Workshop(tmp_path / "work", shared_data, tmp_path, study)
    common = {"device": "here", "torch": torch.__version__}
    for piece in pieces(study, results):
        assert not results.claim(piece)
        results.add(common | run(piece, shop))
        assert Results(results.path).claim(piece)
    names = set(results.records)
    assert {"before", "before/function_calling/0", "suppress/published"} < names
    assert {f"calls/{m}/seed-0" for m in ("full", "lora", "magnitude")} < names
    figures = results.find("calls/magnitude/seed-0")["figures"]
    assert set(figures["retention"]) == {"perplexity", "arc_easy", "piqa", "hellaswag", "lambada"}
    assert figures["trained"] == 3 * 4 * 112  # 10 % of 48 rows
    write_study_report(study, results)
    text = results.path.with_suffix(".md").read_text()
    assert "| magnitude | 1 |" in text
    for drawing in ("calls", "heatmap-published"):
        assert (tmp_path / f"{drawing}.png").stat().st_size > 10_000
