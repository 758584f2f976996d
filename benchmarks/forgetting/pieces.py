"""The study's pieces: what there is to run, what has been run, and running one."""

from __future__ import annotations

import hashlib
import json
import math
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import loki_kernels as loki
from loki_kernels import Attribution
from loki_kernels.cache import CALIBRATION_PER_SUBJECT
from loki_kernels.demo.evaluation import labelled_logits
from loki_kernels.demo.model import load_smollm2
from loki_kernels.demo.training import Encoded
from loki_kernels.errors import check_choice
from loki_kernels.questions import Question

from . import methods as methods_module
from . import stability
from .methods import Method
from .precision import AUTOCAST, DEVICE, autocast, keep_head
from .retention import Retention
from .tasks import JUDGED_BY, VERSIONS, Task, group_by_length, load_task

# (strategy, criterion) of the rows that suppression zeroes
_SUPPRESSED = (
    ("layer_balanced", "signed"),
    ("layer_balanced_highest", "signed"),
    ("layer_balanced", "magnitude"),
    ("layer_balanced_highest", "magnitude"),
)


@dataclass(frozen=True)
class Training:
    steps: int
    batch_size: int
    checkpoints: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.checkpoints[-1] != self.steps:
            raise ValueError(f"the last of checkpoints={self.checkpoints} must be {self.steps=}")


@dataclass(frozen=True)
class Evaluation:
    """``rows`` of each set of questions, ``windows`` of text, ``task_rows`` of a task's fold."""

    rows: int
    windows: int
    task_rows: dict[str, int]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Stability:
    """How many questions each comparison takes; ``blocks`` of 5 MMLU questions a subject."""

    blocks: int
    steps: int
    definitions: int
    dtype: int


@dataclass(frozen=True)
class Stage:
    """Some methods on one task: a sweep of learning rates, then every seed.

    With ``after``, on top of what each method learned in that stage. Instead of a sweep,
    ``rates_of`` names the stage whose best learning rates, times ``rate_factor``, are taken, or
    ``learning_rate`` is every method's.
    """

    name: str
    task: str
    methods: tuple[str, ...]
    training: Training
    after: str | None = None
    rates_of: str | None = None
    rate_factor: float = 1.0
    learning_rate: float | None = None

    @property
    def sweeps(self) -> bool:
        return self.rates_of is None and self.learning_rate is None


@dataclass(frozen=True)
class Study:
    """A study's file.

    ``questions`` says for each definition how many of the questions that `loki.patch` takes by
    itself are analysed; ``quotas`` are zeroed in the rows that come out.
    """

    questions: dict[str, int]
    evaluation: Evaluation
    methods: dict[str, Method]
    stages: tuple[Stage, ...]
    quotas: tuple[float, ...]
    stability: Stability

    @classmethod
    def load(cls, path: Path) -> Study:
        """Read a study's file.

        Raises:
            ValueError: if it names a method or setting that does not exist.
        """
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        try:
            methods = {
                name: Method(**{k: _frozen(v) for k, v in fields.items()})
                for name, fields in content["methods"].items()
            }
            training = Training(**{k: _frozen(v) for k, v in content["training"].items()})
            stages = []
            for fields in content["stage"]:
                fields = {k: _frozen(v) for k, v in fields.items()}
                own = {k: fields.pop(k) for k in ("steps", "checkpoints") if k in fields}
                stages.append(Stage(**fields, training=replace(training, **own)))
            evaluation = Evaluation(**{k: _frozen(v) for k, v in content["evaluation"].items()})
            questions = content["analysis"]["questions"]
            quotas = tuple(content["suppression"]["quotas"])
            counts = Stability(**content["stability"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        swept: dict[str, Stage] = {}
        for stage in stages:
            for name in stage.methods:
                check_choice("method", name, methods)
            for other in (stage.after, stage.rates_of):
                if other is not None:
                    check_choice("stage", other, swept)
                    for name in stage.methods:
                        check_choice(f"method of {other}", name, swept[other].methods)
            if stage.sweeps:
                if stage.after is not None or stage.rate_factor != 1.0:
                    raise ValueError(f"{path}: {stage.name} needs rates_of or learning_rate")
                swept[stage.name] = stage
            elif stage.learning_rate is not None and stage.rates_of is not None:
                raise ValueError(f"{path}: {stage.name} has both rates_of and learning_rate")
        return cls(questions, evaluation, methods, tuple(stages), quotas, counts)

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Piece:
    """One run: its name, everything it depends on, and how to get its figures."""

    name: str
    spec: dict[str, Any]
    run: Callable[[Workshop], dict[str, Any]]


def pieces(study: Study, results: Results) -> Iterator[Piece]:
    """All pieces in order, so far as the learning rates they need have been chosen."""
    evaluation = _evaluation(study)
    yield Piece(
        "before", {"evaluation": evaluation}, lambda shop: shop.retention.evaluate(shop.model())
    )
    seen = set()
    for i, stage in enumerate(study.stages):
        if stage.task not in seen:
            seen.add(stage.task)
            for seed in study.evaluation.seeds:
                yield Piece(
                    f"before/{stage.task}/{seed}",
                    {"task": _task(stage), "seed": seed, "evaluation": evaluation},
                    lambda shop, stage=stage, seed=seed: _score_untouched(shop, stage.task, seed),
                )
        yield from _stage_pieces(study, stage, results)
        if i == 0:
            for definition, count in study.questions.items():
                yield Piece(
                    f"suppress/{definition}",
                    {
                        "quotas": study.quotas,
                        "definition": definition,
                        "questions": count,
                        "evaluation": evaluation,
                    },
                    lambda shop, definition=definition: _suppress(shop, definition, study.quotas),
                )
            yield from _stability_pieces(study)


def _stability_pieces(study: Study) -> Iterator[Piece]:
    wanted, spec = study.stability, {"quota": stability.QUOTA}
    for block in range(wanted.blocks):
        yield Piece(
            f"stability/block-{block}",
            spec | {"questions a subject": stability.BLOCK},
            lambda shop, block=block: {"questions": len(shop.block(block).scores)},
        )
    if wanted.blocks:
        yield Piece(
            "stability/questions",
            spec | {"blocks": wanted.blocks},
            lambda shop: stability.by_questions([shop.block(b) for b in range(wanted.blocks)]),
        )
    for name, count, run in (
        ("steps", wanted.steps, lambda shop, count: stability.by_steps(shop.attribute(count))),
        (
            "definitions",
            wanted.definitions,
            # the same questions as captum's suppression: its analysis is there
            lambda shop, count: stability.by_definition(shop.attribute(count, keep=True)),
        ),
        (
            "dtype",
            wanted.dtype,
            lambda shop, count: stability.by_dtype(shop.attribute(count), shop.model()),
        ),
    ):
        if count:
            yield Piece(
                f"stability/{name}",
                spec | {"questions": count},
                lambda shop, run=run, count=count: run(shop, count),
            )


def _evaluation(study: Study) -> dict[str, Any]:
    """What the figures of a piece depend on, but for the seeds, which are pieces of their own."""
    fields = asdict(study.evaluation) | {"autocast": AUTOCAST}
    return {name: value for name, value in fields.items() if name != "seeds"}


def _task(stage: Stage) -> dict[str, Any]:
    return {"name": stage.task, "version": VERSIONS[stage.task]}


def _stage_pieces(study: Study, stage: Stage, results: Results) -> Iterator[Piece]:
    def piece(name: str, rates: dict[str, float], seed: int, sweep: bool) -> Piece:
        method = study.methods[name]
        lessons = [(study.stage(n), rate) for n, rate in rates.items()]
        spec = {
            "lessons": [
                {"task": _task(s), "training": asdict(s.training), "learning_rate": rate}
                for s, rate in lessons
            ],
            "method": {k: v for k, v in asdict(method).items() if k != "learning_rates"},
            "seed": seed,
            "sweep": sweep,
            "evaluation": _evaluation(study),
        }
        if method.kind == "rows":
            spec["questions"] = study.questions[method.definition]
        return Piece(
            sweep_name(stage, name, rates[stage.name])
            if sweep
            else f"{stage.name}/{name}/seed-{seed}",
            spec,
            lambda shop: _train(shop, lessons, method, seed, sweep),
        )

    if stage.sweeps:
        for name in stage.methods:
            for rate in study.methods[name].learning_rates:
                yield piece(name, {stage.name: rate}, 0, True)
    for seed in study.evaluation.seeds:
        for name in stage.methods:
            rates = {}
            for lesson in (stage.after, stage.name):
                if lesson is not None:
                    rates[lesson] = _rate(study, study.stage(lesson), name, results)
            if None not in rates.values():
                yield piece(name, rates, seed, False)


def _rate(study: Study, stage: Stage, name: str, results: Results) -> float | None:
    if stage.learning_rate is not None:
        return stage.learning_rate
    best = best_rate(study, stage, name, results)
    return None if best is None else best * stage.rate_factor


def sweep_name(stage: Stage, method: str, rate: float) -> str:
    return f"{stage.name}/{method}/lr-{rate:g}"


def best_rate(study: Study, stage: Stage, name: str, results: Results) -> float | None:
    """The learning rate that is best on validation; None until all of them have been tried."""
    if stage.rates_of is not None:
        stage = study.stage(stage.rates_of)
    judge = JUDGED_BY[stage.task]
    sign = 1.0 if judge == "loss" else -1.0
    losses = {}
    for rate in study.methods[name].learning_rates:
        row = results.find(sweep_name(stage, name, rate))
        if row is None:
            return None
        loss = sign * row["figures"]["validation"][judge]
        losses[rate] = math.inf if math.isnan(loss) else loss
    return min(losses, key=losses.__getitem__)


class Results:
    """A JSON-lines file, one line a piece; of several lines for one spec the last counts.

    A row is known once its piece claims it: what an older study file asked for is not. A training
    that two stages ask for runs once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self._stored: dict[tuple[str, str], dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._stored[_key(row["piece"], row["spec"])] = row

    def find(self, name: str) -> dict[str, Any] | None:
        return self.rows.get(name)

    def count(self) -> int:
        """How many pieces have run; a training of two stages is one."""
        return len({id(row) for row in self.rows.values()})

    def claim(self, piece: Piece) -> bool:
        """Whether the piece has been run as it is asked for now."""
        row = self._stored.get(_key(piece.name, piece.spec))
        if row is None:
            return False
        self.rows[piece.name] = row
        return True

    def add(self, row: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[row["piece"]] = self._stored[_key(row["piece"], row["spec"])] = row


def _key(name: str, spec: dict[str, Any]) -> tuple[str, str]:
    """A training's figures depend on its spec alone, whatever the stage's name."""
    return "" if "lessons" in spec else name, json.dumps(spec, sort_keys=True)


class Workshop:
    """What pieces share: the data, and the model and the analyses, kept in ``work``.

    ``drawings`` is where the heatmaps go.
    """

    def __init__(self, work: Path, data: Path, drawings: Path, study: Study) -> None:
        self.work, self.data, self.drawings = work, data, drawings
        self._model = work / "model"
        if not self._model.is_dir():
            model, tokenizer = load_smollm2()
            partial = work / "model.partial"
            tokenizer.save_pretrained(partial)
            model.save_pretrained(partial)
            partial.rename(self._model)
        self.tokenizer = AutoTokenizer.from_pretrained(self._model)
        self.questions, self.evaluation = study.questions, study.evaluation
        self.retention = Retention(
            data, self.tokenizer, study.evaluation.rows, study.evaluation.windows
        )

    def model(self) -> Any:
        """A fresh copy."""
        model = AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32)
        keep_head(model)
        return model.to(DEVICE).eval()

    def task(self, name: str, seed: int) -> Task:
        rows = self.evaluation.task_rows[name]
        return load_task(name, self.data, self.tokenizer, seed, rows)

    def attribution(self, definition: str) -> Attribution:
        """Of the study's questions, evenly taken from those `loki.patch` takes by itself."""
        return self.attribute(self.questions[definition], keep=True)(definition=definition)

    def block(self, number: int) -> Attribution:
        """On 5 questions of each of MMLU's subjects, kept."""
        first = number * stability.BLOCK
        questions = stability.mmlu(self.data, first, stability.BLOCK)
        return self._attribute(questions, keep=True)(definition="published")

    def attribute(self, count: int, keep: bool = False) -> Callable[..., Attribution]:
        """`loki.attribute` on so many of the questions `loki.patch` takes, evenly taken."""
        every = loki.load_questions(CALIBRATION_PER_SUBJECT)
        return self._attribute(every[:: max(1, len(every) // count)][:count], keep)

    def _attribute(self, questions: Sequence[Question], keep: bool) -> Callable[..., Attribution]:
        """With ``keep``, what was computed once is read from the folder."""
        prompts = [question.prompt(self.tokenizer) for question in questions]

        def attribute(model: Any = None, **options: Any) -> Attribution:
            wanted = json.dumps([loki.__version__, options, prompts]) if keep else ""
            digest = hashlib.sha256(wanted.encode()).hexdigest()[:16]
            path = self.work / f"attribution-{digest}.safetensors"
            if keep and path.is_file():
                return Attribution.load(path)
            model = self.model() if model is None else model
            result = loki.attribute(model, prompts, tokenizer=self.tokenizer, **options)
            if keep:
                result.save(path)
            return result

        return attribute


def run(piece: Piece, shop: Workshop) -> dict[str, Any]:
    """The piece's row."""
    start = time.monotonic()
    figures = piece.run(shop)
    return {
        "piece": piece.name,
        "spec": piece.spec,
        "figures": figures,
        "seconds": round(time.monotonic() - start, 1),
    }


def _score_untouched(shop: Workshop, name: str, seed: int) -> dict[str, Any]:
    task = shop.task(name, seed)
    return {"test": task.score(shop.model(), task.test)}


def _suppress(
    shop: Workshop, definition: str, quotas: tuple[float, ...]
) -> dict[str, dict[str, float]]:
    """Perplexity with rows zeroed, by kind of rows and quota. Draws the scores' heatmap."""
    attribution, model = shop.attribution(definition), shop.model()
    attribution.heatmap(shop.drawings / f"heatmap-{definition}.png", stability.QUOTA)
    kinds = [*_SUPPRESSED, *([("random", "signed")] if definition == "published" else [])]
    result: dict[str, dict[str, float]] = {}
    for strategy, criterion in kinds:
        kind = "random" if strategy == "random" else f"{criterion} {strategy}"
        for quota in quotas:
            with loki.suppress(model, loki.select(attribution, quota, strategy, criterion)):  # type: ignore[arg-type]
                perplexity = shop.retention.perplexity(model)
            result.setdefault(kind, {})[f"{quota:g}"] = perplexity
    return result


def _train(
    shop: Workshop,
    lessons: Sequence[tuple[Stage, float]],
    method: Method,
    seed: int,
    sweep: bool,
) -> dict[str, Any]:
    """Learn one task after the other, each with its learning rate.

    For a sweep score the last one's validation fold, else its test fold at every checkpoint, and
    at the end the earlier tasks' and what was forgotten.
    """
    attribution = shop.attribution(method.definition) if method.kind == "rows" else None
    model, parameters = methods_module.prepare(shop.model(), method, attribution, seed)
    curve = []
    for number, (stage, rate) in enumerate(lessons, 1):
        task = shop.task(stage.task, seed)
        rows = group_by_length(task.train, stage.training.batch_size, seed)
        for step, loss in _steps(model, parameters, rows, stage.training, rate):
            if number < len(lessons):
                continue
            point: dict[str, Any] = {"step": step, "train_loss": loss}
            if not sweep:
                point |= task.score(model, task.test)
                if step < stage.training.steps:
                    point["perplexity"] = shop.retention.perplexity(model)
            curve.append(point)
    figures: dict[str, Any] = {"trained": sum(p.numel() for p in parameters), "curve": curve}
    if sweep:
        return figures | {"validation": task.score(model, task.validation)}
    retention = shop.retention.evaluate(model)
    curve[-1]["perplexity"] = retention["perplexity"]
    earlier = {}
    for stage, _ in lessons[:-1]:
        task = shop.task(stage.task, seed)
        earlier[stage.task] = task.score(model, task.test)
    return figures | {"earlier": earlier, "retention": retention}


def _steps(
    model: nn.Module,
    parameters: list[nn.Parameter],
    rows: list[Encoded],
    training: Training,
    rate: float,
) -> Iterator[tuple[int, float]]:
    """AdamW without weight decay, gradients clipped at 1, a tenth of the steps to warm up, then
    linear decay. Yields (step, mean loss since the last) at each checkpoint."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    warm = max(1, training.steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warm, (training.steps - step) / (training.steps - warm + 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses: list[float] = []
    for step in range(training.steps):
        first = step * training.batch_size
        batch = [rows[i % len(rows)] for i in range(first, first + training.batch_size)]
        model.train()
        with autocast():
            logits, labels = labelled_logits(model, batch)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step + 1 in training.checkpoints:
            model.eval()
            yield step + 1, sum(losses) / len(losses)
            losses.clear()
    model.eval()
