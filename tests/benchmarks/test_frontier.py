"""benchmarks/frontier: what its arms train, and in which order and processes."""

import copy
import itertools
import json
import queue
import sys
import threading
import time

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from benchmarks.frontier import accuracies, rounded, two_tasks, workers
from benchmarks.frontier.arms import ARMS, Job
from benchmarks.frontier.data import LENGTH, TASKS, Data, _prompt, _windows, write_data
from benchmarks.frontier.laboratory import Laboratory
from benchmarks.frontier.layers import (
    OrthogonalSubspaceLinear,
    UpdatedLinear,
    singular,
    start_of,
)
from benchmarks.frontier.moments import linears, projection, rank_of
from benchmarks.frontier.runner import (
    DECISIVE,
    _refuse_other_samples,
    _refuse_other_texts,
    _rehearsal,
    _scaled,
    groups,
    main,
    moments_of,
    plan,
    read_records,
    study,
)
from benchmarks.frontier.train import Run, train
from benchmarks.frontier.workers import Pool
from benchmarks.records import read_lines
from loki_kernels.demo.frontier import frontier, mean_at_equal_loss
from tests import models
from tests.tiny_tokenizers import word_tokenizer


def make_lab(device):
    model, tensors = _rehearsal()
    model, data = model.to(device), Data(tensors).to(device)
    jobs = list(itertools.chain(*study()))
    return Laboratory(model, data, dict(moments_of(model, data, jobs)))


@pytest.fixture(scope="module")
def lab():
    return make_lab("cpu")


@pytest.fixture(scope="module")
def lab_there(lab):
    """On the device under test, where steps may be captured."""
    return lab if models.DEVICE.type == "cpu" else make_lab(models.DEVICE)


def updates(model):
    """The update of every linear layer's weight, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, UpdatedLinear):
            eye = torch.eye(module.linear.in_features)
            found[name] = (module(eye) - module.linear(eye)).T.detach()
    return found


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains_what_it_says(lab, name):
    arm = ARMS[name]
    job = Job(name, arm, "shakespeare", 1e-2, seed=0, steps=3)
    run = Run([job], lab)
    before = {n: p.detach().clone() for n, p in lab.base.named_parameters()}
    for _ in range(3):
        run.advance()
    assert all(torch.equal(p, before[n]) for n, p in lab.base.named_parameters())
    changed = updates(run.model)
    assert changed or (arm.whole and arm.protect is None)
    for layer, update in changed.items():
        assert update.abs().max() > 0
        if arm.entries is not None:
            trained = (update != 0).double().mean()
            assert float(trained) == pytest.approx(arm.quota / 100, rel=0.1)
        elif arm.quota < 100:
            rows = update.abs().amax(1) > 1e-9
            assert rows.sum() == round(arm.quota / 100 * len(update))
        if arm.protect == "cut":
            moments = lab.moments[arm.moments]
            rank = rank_of(moments.values[layer], arm.share, arm.directions)
            inside = update @ moments.vectors[layer][:, :rank]
            assert inside.abs().max() < 1e-4 * update.abs().max()
    whole = [n for n, p in run.model.named_parameters() if p.requires_grad and "delta" not in n]
    assert any("embed_tokens" in n for n in whole) == arm.whole
    (figures,) = run.finish()  # leaves the whole update in place
    assert [p["scale"] for p in figures["points"]] == [0.25, 0.5, 0.75, 1.0]
    assert figures["points"][0]["wikitext"] < figures["points"][-1]["wikitext"]
    run._merge(0.5, [p.detach().clone() for p in run.parameters])
    for layer, update in updates(run.model).items():
        torch.testing.assert_close(update, 0.5 * changed[layer], rtol=1e-3, atol=1e-6)


def test_a_seed_is_one_order_of_the_texts(lab):
    """LoRA's factors are drawn beside it."""
    runs = (Run([Job(name, ARMS[name], "gsm8k", 1e-2, 3, 2)], lab) for name in ("full", "LoRA"))
    assert torch.equal(*(run.order for run in runs))


def test_the_measures_are_what_they_say(lab):
    ((figures,),) = lab.measure([lab.look(lab.base, "gsm8k", 1)])
    ids, labels = lab.data.ids["gsm8k/test"], lab.data.labels["gsm8k/test"]
    assert figures["loss"] == pytest.approx(float(lab.base(input_ids=ids, labels=labels).loss))
    assert figures["wikitext"] == pytest.approx(0, abs=1e-6)
    run = Run([Job("full", ARMS["full"], "gsm8k", 1e-2, 0, 2)], lab)
    run.advance()
    q = run.model(input_ids=lab.data.ids["code"]).logits[:, :-1].log_softmax(-1)
    p = lab.base(input_ids=lab.data.ids["code"]).logits[:, :-1].log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)[lab.data.labels["code"][:, 1:] != -100].mean()
    looks = [lab.look(model, "gsm8k", 1) for model in (lab.base, run.model)]
    run._merge(0.0, run.parameters)  # what was looked at stays as it was
    assert lab.measure(looks)[1][0]["code"] == pytest.approx(float(divergence), rel=1e-3)


def test_moments_are_those_of_the_inputs_and_gradients(lab):
    model, name = lab.base, "model.layers.1.mlp.down_proj"
    inputs = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    ids, labels = lab.data.ids["samples"], lab.data.labels["samples"]
    model(input_ids=ids)
    hook.remove()
    x = inputs[0][labels != -100].double()
    moments = lab.moments["samples"]
    vectors = moments.vectors[name].double()
    restored = (vectors * moments.values[name].double()) @ vectors.T
    count = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(restored, x.T @ x / count, rtol=1e-4, atol=1e-7)
    assert (moments.sensitivity[name] > 0).all()
    assert set(moments.values) == set(linears(model))
    rank = rank_of(moments.values[name], 0.9)
    soft = projection("soft", moments.values[name], moments.vectors[name], rank, 0)
    kept = torch.linalg.eigvalsh(soft)
    assert 0 < kept.min() < 0.75
    assert kept.max() <= 1 + 1e-5


def test_a_random_subspace_has_the_rank_of_the_cut(lab):
    moments = lab.moments["samples"]
    name = "model.layers.0.mlp.down_proj"
    values, vectors = moments.values[name], moments.vectors[name]
    rank = rank_of(values, 0.9)
    cut, drawn = (projection(kind, values, vectors, rank, 5) for kind in ("cut", "random"))
    assert float(cut.trace()) == pytest.approx(len(values) - rank, abs=1e-3)
    assert float(cut.trace()) == pytest.approx(float(drawn.trace()), abs=1e-3)
    assert (cut - drawn).abs().max() > 0.05


def of(lab, name):
    moments = lab.moments["samples"]
    weight = lab.base.get_submodule(name).weight.detach()
    return weight, moments.values[name], moments.vectors[name]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_singular_values_are_those(shape):
    matrix = torch.randn(*shape, dtype=torch.float64)
    left, values, right = singular(matrix)
    torch.testing.assert_close(left * values @ right, matrix)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix))
    torch.testing.assert_close(left.T @ left, torch.eye(min(shape), dtype=torch.float64))


def test_lora_null_starts_where_the_inputs_hold_least(lab):
    weight, values, vectors = of(lab, "model.layers.1.mlp.down_proj")
    left, right = start_of("null", weight, values, vectors, 3)
    assert (left.shape, right.shape) == ((24, 3), (3, 40))
    least = vectors[:, -3:]
    torch.testing.assert_close(left @ right, weight @ least @ least.T, rtol=1e-3, atol=1e-5)


def test_corda_starts_as_peft_does(lab):
    """PEFT's own formulas (tuners/lora/corda.py, 0.21), without its search for a damping."""
    weight, values, vectors = of(lab, "model.layers.1.mlp.down_proj")
    moment = (vectors.double() * values.double()) @ vectors.double().T
    damped = moment + 0.01 * moment.diag().mean() * torch.eye(len(moment))
    u, sizes, v = torch.linalg.svd(weight.double() @ damped, full_matrices=False)
    want = u[:, -4:] * sizes[-4:] @ (v @ torch.linalg.inv(damped))[-4:]
    left, right = start_of("corda", weight.double(), values.double(), vectors.double(), 4)
    torch.testing.assert_close(left @ right, want)
    assert (left.norm(dim=0) > 0).all()


def test_osf_moves_its_vectors_across_the_upper_half(lab):
    linear = lab.base.get_submodule("model.layers.0.mlp.down_proj")
    layer = OrthogonalSubspaceLinear(linear, singular(linear.weight.detach()))
    assert layer.update().abs().max() == 0
    left, _, right = singular(linear.weight.detach())
    kept = min(linear.weight.shape) // 2
    layer(torch.randn(7, 40)).square().sum().backward()
    assert layer.left.grad.abs().max() > 0
    assert (left[:, :kept].T @ layer.left.grad).abs().max() < 1e-4 * layer.left.grad.abs().max()
    assert (layer.right.grad @ right[:kept].T).abs().max() < 1e-4 * layer.right.grad.abs().max()


@pytest.mark.parametrize(
    "name",
    [
        "full, down_proj protected",
        "LoRA + KL",
        "rows, random subspace",
        "rows, steps by sensitivity",
        "OSF",
        "CorDA",
        "LoRA-Null",
        "SHiRA",
    ],
)
def test_trainings_as_one_model_are_those_of_one(lab_there, name):
    """Other seeds, so other rows, factors and orders, at other rates."""
    jobs = [Job(name, ARMS[name], "gsm8k", rate, seed, 2) for seed, rate in enumerate((1e-3, 1e-2))]
    together = train(jobs, lab_there)
    for job, figures in zip(jobs, together, strict=True):
        (alone,) = train([job], lab_there)
        assert figures["trained"] == alone["trained"]
        for ours, theirs in zip(figures["points"], alone["points"], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-6)
        assert ("predicted" in figures) == (not ARMS[name].whole)
        if "predicted" in figures:
            assert figures["predicted"] == pytest.approx(alone["predicted"], rel=1e-2)


def test_damage_is_predicted_by_the_moments(lab, monkeypatch):
    run = Run([Job("rows", ARMS["rows"], "gsm8k", 1e-2, 0, 1)], lab)
    run.advance()
    moments, want = lab.moments["samples"], 0.0
    for name, update in updates(run.model).items():
        c = (moments.vectors[name] * moments.values[name]) @ moments.vectors[name].T
        want += 0.5 * float(moments.sensitivity[name] @ (update @ c * update).sum(1))
    (figures,) = run.finish()
    assert figures["predicted"] == pytest.approx(want, rel=1e-3)
    monkeypatch.delitem(moments.sensitivity, "model.layers.0.mlp.down_proj")
    (figures,) = run.finish()
    assert "predicted" not in figures


def test_jobs_of_one_arm_and_task_are_one_model():
    jobs = list(plan(["full", "rows"], TASKS, [0, 1], 80))
    found = groups(jobs, 6)
    assert sorted(map(len, found)) == [2, 2, 2, 2, 3, 3, 3, 3, 5, 5, 5, 5]
    assert all(len({(j.arm_name, j.task) for j in group}) == 1 for group in found)
    assert sorted(map(id, jobs)) == sorted(id(job) for group in found for job in group)


def test_a_plan_names_no_training_twice():
    jobs = [json.dumps(job.spec(), sort_keys=True) for job in itertools.chain(*study())]
    more = 2 * 2 * 4 * len(DECISIVE) + 2 * 2 * 3 * 6
    assert len(set(jobs)) == len(jobs) == 2 * 2 * 5 * (len(ARMS) - 1) + more
    assert len(list(plan(["LoRA"], TASKS, range(6), 400, (1e-3, 2e-3)))) == 24
    job = next(plan(["LoRA"], TASKS, [0], 80))
    assert _scaled(job, 0.25).rate == job.rate / 4


def test_texts_begin_as_the_tokenizer_begins_them():
    tokenizer = word_tokenizer()
    ids = torch.randint(97, (600,)).tolist()
    windows, labels = _windows(tokenizer, ids, 3)
    assert windows[:, 0].tolist() == [ids[0], ids[172], ids[344]]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w3 $A", special_tokens=[("w3", 3)]
    )
    windows, labels = _windows(tokenizer, ids, 3)
    assert windows.shape == (3, LENGTH)
    assert windows[:, 0].tolist() == [3, 3, 3]
    assert windows[0, 1:].tolist() == ids[: LENGTH - 1]
    assert windows[2, -1] == ids[-1]
    assert torch.equal(labels[:, 1:], windows[:, 1:])
    assert (labels[:, 0] == -100).all()
    tokenizer.chat_template = None
    assert _prompt(tokenizer, "w9 w8")[0] == 3


def test_processes_train_what_was_not_trained(tmp_path, monkeypatch, capsys):
    path = tmp_path / "trainings.jsonl"
    arms = ["full", "rows protected"]
    command = f"frontier run --rehearse --steps 2 --seeds 3 --tasks gsm8k --results {path} --arms"
    for options in (["--steps", "2"], ["--model", "gemma-3-270m"]):  # the study has its own
        monkeypatch.setattr(sys, "argv", ["frontier", "run", "--rehearse", *options])
        with pytest.raises(SystemExit):
            main()
        assert "--arms" in capsys.readouterr().err
    for most, want in (("3", 3), ("9", 10)):
        options = ["--most", most, *["--bfloat16"][: most == "9"]]
        monkeypatch.setattr(sys, "argv", [*command.split(), *arms, *options])
        main()
        assert len(read_records(path)) == want
    assert [r.get("autocast") for r in read_records(path)] == [None] * 3 + ["bfloat16"] * 7
    assert "7 trainings to do" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command.split(), *arms, "--most", "2"])
    main()  # two of those under autocast, and theirs are passed over then
    assert "7 trainings to do" not in capsys.readouterr().out
    records = read_records(path)
    assert len(records) == 10 < len(list(read_lines(path)))
    assert sum("autocast" not in record for record in records) == 5
    monkeypatch.setattr(sys, "argv", ["frontier", "report", "--results", str(path)])
    main()
    text = path.with_suffix(".md").read_text()
    assert "| rows protected | 1 |" in text
    assert (tmp_path / "frontier-2.png").stat().st_size > 1000


def test_two_tasks_are_learned_in_a_row(tmp_path, monkeypatch, capsys):
    model, tensors = _rehearsal()
    monkeypatch.setattr(two_tasks, "load_smollm2", lambda: (model, word_tokenizer()))
    monkeypatch.setattr(Data, "load", lambda _: Data(tensors))
    path = tmp_path / "two_tasks.jsonl"
    command = f"two_tasks --samples 4 --steps 2 2 --seed 1 --results {path}"
    monkeypatch.setattr(sys, "argv", command.split())
    two_tasks.main()
    lines = [json.loads(s) for s in capsys.readouterr().out.splitlines() if s.startswith('{"')]
    kept = list(read_lines(path))
    assert [{k: line[k] for k in line if k != "seconds"} for line in lines] == [
        {k: record[k] for k in line if k != "seconds"}
        for line, record in zip(lines, kept, strict=True)
    ]
    assert {record["seed"] for record in kept} == {1}
    assert len([line for line in lines if "wikitext" in line]) == 1 + 2 + 4 * 3
    for way in ("full", "plain"):
        losses = {
            line["share"]: line["calls"]
            for line in lines
            if line.get("way") == way and "share" in line
        }
        assert len(set(losses.values())) == len(losses) == 3
    after = {line["way"]: line["plays"] for line in lines if line.get("after") == "the plays"}
    fronts = {
        way: frontier(
            (line["calls"], line["plays"] - after["full" if way == "full" else "protected"])
            for line in lines
            if line.get("way") == way and "share" in line
        )
        for way in ("full", "plain", "protected", "protected, earlier")
    }
    shared, want = mean_at_equal_loss(fronts)
    compared = {line["way"]: line for line in lines if "plays_lost" in line}
    assert {way: line["plays_lost"] for way, line in compared.items()} == {
        way: pytest.approx(lost, abs=1e-4) for way, lost in want.items()
    }
    assert all(line["calls"] == pytest.approx(shared, abs=1e-4) for line in compared.values())


def test_finals_are_asked_questions(tmp_path, monkeypatch, capsys):
    model, tensors = _rehearsal()
    folders = tmp_path / "general", tmp_path / "text"
    for folder in folders:
        folder.mkdir()
    words = "w1 w2 w3 w4 w5 w6 w7 w8 "
    (folders[1] / "wikitext2_valid.txt").write_text(words * 600)
    question = {"query": "w3 w4", "choices": ["w5", "w6 w7"], "gold": 1}
    for name in ("arc_easy", "piqa", "hellaswag_first2000"):
        (folders[0] / f"{name}.jsonl").write_text(f"{json.dumps(question)}\n" * 3)
    record = {"context": "w3 w4", "continuation": " w5"}
    (folders[0] / "lambada_first1500.jsonl").write_text(f"{json.dumps(record)}\n" * 3)
    loaded = {accuracies.NAME: lambda: (model, word_tokenizer())}
    monkeypatch.setattr(accuracies, "MODELS", loaded)
    monkeypatch.setattr(Data, "load", lambda _: Data(tensors))
    command = f"accuracies --steps 2 --shared {tmp_path} --records 3 --arms full CorDA"
    monkeypatch.setattr(sys, "argv", command.split())
    accuracies.main()
    lines = [json.loads(s) for s in capsys.readouterr().out.splitlines() if s.startswith('{"')]
    assert [(line["arm"], line["task"]) for line in lines] == [
        ("base", ""),
        *itertools.product(("full", "CorDA"), ("shakespeare",)),
        *itertools.product(("full", "CorDA"), ("gsm8k",)),
    ]
    assert all(0 <= line["piqa"] <= 1 for line in lines)
    assert len({line["perplexity"] for line in lines}) == 5


def test_a_training_is_measured_as_a_checkpoint_of_16_bits(monkeypatch, capsys):
    model, tensors = _rehearsal()
    monkeypatch.setattr(rounded, "MODELS", {rounded.NAME: lambda: (model, None)})
    monkeypatch.setattr(Data, "load", lambda _: Data(tensors))
    command = "rounded --steps 3 --arms full LoRA --rates 1e-3 1e-1"
    monkeypatch.setattr(sys, "argv", command.split())
    measured = []
    look = Laboratory.look
    monkeypatch.setattr(
        Laboratory,
        "look",
        lambda lab, own, *rest: measured.append(on_grid(own)) or look(lab, own, *rest),
    )
    rounded.main()
    assert on_grid(model)  # the base, which trainings share layers with
    assert measured == [False, True] * 2
    lines = [json.loads(s) for s in capsys.readouterr().out.splitlines() if s.startswith('{"')]
    assert [line.get("weights") for line in lines] == ["float32", "bfloat16", None] * 2
    exact, coarse, about = lines[3:]
    assert exact["loss"] != coarse["loss"]
    assert exact["loss"] == pytest.approx(coarse["loss"], rel=0.01)
    assert exact["wikitext"] > 0
    assert 0 < about["rounding"] < 0.2


def on_grid(model):
    return all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())


class Threads:
    """Workers that are threads, whose laboratory is empty."""

    def Process(self, target, args, daemon):
        thread = threading.Thread(target=target, args=args, daemon=daemon)
        thread.exitcode, thread.kill = None, lambda: None
        return thread

    class Queue(queue.Queue):
        def cancel_join_thread(self):
            pass


@pytest.mark.parametrize("name", ["full + KL", "LoRA"])
def test_autocast_trains_the_same_and_measures_in_float32(lab, name):
    job = Job(name, ARMS[name], "gsm8k", 1e-3, seed=0, steps=3)
    half = copy.copy(lab)
    half.bfloat16 = True
    (exact,), (rounded,) = train([job], lab), train([job], half)
    assert rounded["before"] == exact["before"]
    assert rounded["points"] != exact["points"]
    for ours, want in zip(rounded["points"], exact["points"], strict=True):
        assert ours == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # where a worker ends after a failure
def test_a_group_that_does_not_fit_is_halved(device, monkeypatch, capsys):
    def train(group, _):
        if len(group) > 2:
            raise RuntimeError("CUDA error: out of memory")
        if group[-1].rate == 5e-4:
            raise RuntimeError("another reason")
        return [{"before": job.rate} for job in group]

    monkeypatch.setattr(workers, "train", train)
    monkeypatch.setattr(workers, "laboratory", lambda *_: None)
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: Threads())
    jobs = [Job("LoRA", ARMS["LoRA"], "gsm8k", rate * 1e-4, 0, 2) for rate in range(1, 6)]
    pool = Pool(None, device, False, [jobs, jobs[:2]], 2)
    found = sorted(record["rate"] for record in pool.run(60))
    assert found == pytest.approx([1e-4, 1e-4, 2e-4, 2e-4, 3e-4])
    assert pool.failed == 1
    assert "another reason" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "trained"), [(-9, {2.0, 3.0, 4.0}), (1, set())])
def test_the_others_go_on_without_one_that_is_killed(code, trained, monkeypatch, capsys):
    """Full memory ends one process; one that cannot start means that none can."""
    ended = threading.Event()

    class Mortal(Threads):
        def Process(self, target, args, daemon):
            def run():
                try:
                    target(*args)
                except SystemExit:
                    process.exitcode = code
                    ended.set()

            process = super().Process(run, (), daemon)
            return process

    def train(group, _):
        if group[0].rate == 1:
            raise SystemExit
        ended.wait(10)
        time.sleep(1)  # meanwhile it is asked who is still there
        return [{"before": job.rate} for job in group]

    monkeypatch.setattr(workers, "train", train)
    monkeypatch.setattr(workers, "laboratory", lambda *_: None)
    monkeypatch.setattr(workers, "_WAIT", 0.1)
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: Mortal())
    jobs = [Job("LoRA", ARMS["LoRA"], "gsm8k", rate, 0, 2) for rate in (1.0, 2.0, 3.0, 4.0)]
    pool = Pool(None, "cpu", False, [[job] for job in jobs], 2)
    assert {record["before"] for record in pool.run(20)} == trained
    assert pool.failed == 1
    assert f"a process was killed ({code})" in capsys.readouterr().out


def test_other_texts_are_refused():
    known = {("gsm8k", 0): 1.5}
    record = {"task": "gsm8k", "seed": 0, "before": 1.5004}
    _refuse_other_texts(record, known)
    _refuse_other_texts({"task": "shakespeare", "seed": 0, "before": 3.7}, known)
    assert known == {("gsm8k", 0): 1.5, ("shakespeare", 0): 3.7}
    with pytest.raises(SystemExit, match="not the texts"):
        _refuse_other_texts(record | {"before": 1.51}, known)
    jobs = [Job("LoRA", ARMS["LoRA"], "gsm8k", 1e-4, seed, 2) for seed in (1, 2)]
    _refuse_other_samples("abc", jobs, {0: {"other"}, 1: {"abc", None}})
    with pytest.raises(SystemExit, match="of seed 2 are of other"):
        _refuse_other_samples("abc", jobs, {1: {"abc"}, 2: {None}})


def test_a_part_of_a_source_is_of_all_of_it():
    ids = torch.arange(192)[:, None]
    data = Data({"samples:ids": ids, "samples:labels": -ids})
    some, labels = data.texts_of("samples", 48)
    assert torch.equal(labels, -some)
    assert len(some.unique()) == 48
    assert (some < 96).sum() == 24
    assert len(data.texts_of("samples")[0]) == len(data.texts_of("samples", 500)[0]) == 192


def test_drawn_texts_are_drawn_once(tmp_path):
    model, _ = _rehearsal()
    folder = tmp_path / "shared"
    (folder / "text").mkdir(parents=True)
    (folder / "general").mkdir()
    words = " ".join(f"w{i % 50}" for i in range(6000))
    for name in ("text/tinyshakespeare.txt", "text/wikitext2_valid.txt"):
        (folder / name).write_text(words)
    for name, record in {
        "HumanEval": {"prompt": words, "canonical_solution": "w1"},
        "gsm8k_test": {"question": "w1 w2", "answer": "w3"},
        "piqa": {"query": "Question: w1 w2\nw3"},
    }.items():
        (folder / "general" / f"{name}.jsonl").write_text(f"{json.dumps(record)}\n" * 80)
    paths, drawn = [tmp_path / name for name in ("one", "two")], tmp_path / "drawn.json"
    for path in paths:
        write_data(path, folder, drawn, model, word_tokenizer())
        model = None  # no more is drawn
    one, two = map(Data.load, paths)
    assert one.digest() == two.digest()
    assert (one.labels["chat"] != -100).any(1).all()
    two.labels["samples"][0, 5] += 1
    assert one.digest() != two.digest()
