"""The study's pieces: what there is to run, and running one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from . import stability
from .precision import AUTOCAST
from .results import Piece, Results
from .study import Stage, Study
from .suppression import suppress
from .tasks import JUDGED_BY, VERSIONS
from .training import train
from .workshop import Workshop


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
                    lambda shop, definition=definition: suppress(shop, definition, study.quotas),
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
    """What the figures of a piece depend on, but for the seeds, which are pieces of their own.

    In the names of the committed file, which a piece is known by.
    """
    evaluation = study.evaluation
    return {
        "rows": evaluation.records,
        "windows": evaluation.windows,
        "task_rows": evaluation.task_records,
        "autocast": AUTOCAST,
    }


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
            lambda shop: train(shop, lessons, method, seed, sweep),
        )

    if stage.learning_rate is None:
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
    if isinstance(stage.learning_rate, float):
        return stage.learning_rate
    swept = stage if stage.learning_rate is None else study.stage(stage.learning_rate)
    best = best_rate(study, swept, name, results)
    return None if best is None else best * stage.rate_factor


def sweep_name(stage: Stage, method: str, rate: float) -> str:
    return f"{stage.name}/{method}/lr-{rate:g}"


def best_rate(study: Study, stage: Stage, name: str, results: Results) -> float | None:
    """The learning rate of a sweep that is best on validation; None until all have been tried."""
    judge = JUDGED_BY[stage.task]
    sign = 1.0 if judge == "loss" else -1.0
    losses = {}
    for rate in study.methods[name].learning_rates:
        record = results.find(sweep_name(stage, name, rate))
        if record is None:
            return None
        loss = sign * record["figures"]["validation"][judge]
        losses[rate] = math.inf if math.isnan(loss) else loss
    return min(losses, key=losses.__getitem__)


def run(piece: Piece, shop: Workshop) -> dict[str, Any]:
    """The piece's record."""
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
