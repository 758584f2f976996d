"""Tables and plots of what the study has found so far."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loki_kernels.files import atomic_path
from loki_kernels.plots import picture

from . import metrics
from .compare import at_equal_loss, common_loss, difference
from .pieces import best_rate, sweep_name
from .results import Results
from .retention import ACCURACIES
from .study import Stage, Study
from .tasks import JUDGED_BY

_READING = """\
Trained and evaluated with float32 weights and bfloat16 products (analyses in float32). `exact` is
teacher-forced: every token of the call is the most likely one, given the right ones before it. A
figure with ± is a mean over seeds and its standard error; a difference is paired by seed and its ±
is a 95 % interval (Student's t), called noise where it contains zero. Of so many intervals about
one in twenty leaves out zero by chance. Seeds differ in the order of training and in the test fold;
text and general questions are the same for all, so the intervals do not cover the choice of those,
and the training sets overlap."""

# Methods that the others of a stage are compared with, each pair once.
_REFERENCES = ("full", "random", "magnitude", "random_30")

# The task's own figure, beside its loss.
_SCORES = {"function_calling": "exact", "reranking": "ndcg@10"}


def write_study_report(study: Study, results: Results) -> None:
    """``<results>.md`` and a plot a stage beside the results' file."""
    path = results.path.with_suffix(".md")
    text = "\n".join(_lines(study, results, path.parent)) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{results.count()} pieces -> {path}")


def _lines(study: Study, results: Results, folder: Path) -> Iterator[str]:
    devices = sorted({f"{r['device']}, torch {r['torch']}" for r in results.records.values()})
    yield "# What was learned and what was forgotten"
    yield ""
    yield "Made by `python -m benchmarks.forgetting report`; do not edit. SmolLM2-135M-Instruct,"
    yield f"on {'; '.join(devices) or 'no device yet'}. {results.count()} pieces have run."
    yield ""
    yield _READING
    before = results.find("before")
    for i, stage in enumerate(study.stages):
        # beside the methods of an earlier stage that learned the same
        alike = [s for s in study.stages[: i + 1] if _lesson(s) == _lesson(stage)]
        runs = {name: _seeds(study, s, name, results) for s in alike for name in s.methods}
        swept = [
            results.find(sweep_name(stage, name, rate))
            for name in stage.methods
            for rate in study.methods[name].learning_rates
        ]
        if not any(swept) and not any(runs[name] for name in stage.methods):
            continue
        yield from ("", f"## {stage.name}: {stage.task}, {stage.training.steps} steps", "")
        if stage.learning_rate is None:
            yield from _sweep(study, stage, results)
        elif isinstance(stage.learning_rate, float):
            yield f"Every method at a learning rate of {stage.learning_rate:g}."
        else:
            times = "" if stage.rate_factor == 1.0 else f"{stage.rate_factor:g} times "
            yield f"With {times}the best learning rates of {stage.learning_rate}."
        if before is not None and any(runs.values()):
            yield from ("", *_outcome(study, stage, runs, before["figures"], results))
            _plot(stage, runs, before["figures"], folder / f"{stage.name}.png")
            yield from ("", f"![{stage.name}]({stage.name}.png)")
    yield from _suppression(study, results)
    for definition in study.questions:
        if results.find(f"suppress/{definition}") is not None:
            yield from ("", f"![heatmap, {definition}](heatmap-{definition}.png)")
    yield from _stability(results)


def _lesson(stage: Stage) -> tuple[Any, ...]:
    return stage.task, stage.training, stage.after, stage.rate_factor, stage.learning_rate


def _seeds(study: Study, stage: Stage, name: str, results: Results) -> dict[int, dict[str, Any]]:
    records = {s: results.find(f"{stage.name}/{name}/seed-{s}") for s in study.evaluation.seeds}
    return {seed: record["figures"] for seed, record in records.items() if record is not None}


def _sweep(study: Study, stage: Stage, results: Results) -> Iterator[str]:
    judge = JUDGED_BY[stage.task]
    yield f"Validation {judge} by learning rate (seed 0; the best is chosen):"
    yield ""
    most = max(len(study.methods[name].learning_rates) for name in stage.methods)
    yield from _header("method", *[""] * most, "chosen")
    for name in stage.methods:
        rates = study.methods[name].learning_rates
        cells = []
        for rate in rates:
            record = results.find(sweep_name(stage, name, rate))
            figure = f"{record['figures']['validation'][judge]:.4f}" if record else "not run"
            cells.append(f"{rate:g}: {figure}")
        cells += [""] * (most - len(rates))
        best = best_rate(study, stage, name, results)
        note = "" if best is None else f"{best:g}"
        if len(rates) > 1 and best in (min(rates), max(rates)):
            note += ", at the edge"
        yield f"| {name} | {' | '.join(cells)} | {note} |"


def _outcome(
    study: Study,
    stage: Stage,
    runs: dict[str, dict[int, dict[str, Any]]],
    before: dict[str, float],
    results: Results,
) -> Iterator[str]:
    """Every method's figures, then what sets it apart from the methods of reference."""
    untouched = {
        seed: record["figures"]["test"]
        for seed in study.evaluation.seeds
        if (record := results.find(f"before/{stage.task}/{seed}")) is not None
    }
    table: dict[str, dict[int, dict[str, float]]] = {
        name: {seed: _figures(stage, run, before) for seed, run in seeds.items()}
        for name, seeds in runs.items()
    }
    common: dict[int, float] = {}
    if stage.after is None:
        loss = {seed: test["loss"] for seed, test in untouched.items()}
        compared = {n: r for n, r in runs.items() if n in (*stage.methods, *_REFERENCES)}
        common = common_loss(compared, loss)
        for name, by_seed in at_equal_loss(compared, loss, before["perplexity"], common).items():
            for seed, perplexity in by_seed.items():
                table[name][seed]["perplexity at equal loss"] = perplexity
    else:
        for name, seeds in table.items():
            for seed, figures in seeds.items():
                learned = results.find(f"{stage.after}/{name}/seed-{seed}")
                if learned is not None:
                    last = learned["figures"]["curve"][-1]
                    for task, scores in runs[name][seed]["earlier"].items():
                        for key, value in scores.items():
                            figures[f"{task} {key}, change"] = value - last[key]
    columns = list(dict.fromkeys(c for seeds in table.values() for f in seeds.values() for c in f))
    yield from _header("method", "seeds", *columns)
    start = {seed: test | before for seed, test in untouched.items()}
    for name, seeds in {"before": start, **table}.items():
        if not seeds:
            yield f"| {name} | not run {'|' * (1 + len(columns))}"
            continue
        cells = [_mean([f[c] for f in seeds.values() if c in f]) for c in columns]
        yield f"| {name} | {len(seeds)} | {' | '.join(cells)} |"
    if common:
        yield ""
        yield f"The equal loss: {_mean(list(common.values()))}, the best that all of them reach."
    references = [name for name in _REFERENCES if name in table]
    for i, reference in enumerate(references):
        lines = []
        for name in (name for name in runs if name not in references[: i + 1]):
            if not {name, reference} & set(stage.methods):
                continue  # both are another stage's, which compares them
            differences = [
                difference(_column(table[name], c), _column(table[reference], c)) for c in columns
            ]
            if any(differences):
                cells = ["" if d is None else str(d) for d in differences]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        if lines:
            yield from ("", *_header(f"minus {reference}", *columns), *lines)


def _column(seeds: dict[int, dict[str, float]], column: str) -> dict[int, float]:
    return {seed: figures[column] for seed, figures in seeds.items() if column in figures}


def _figures(stage: Stage, run: dict[str, Any], before: dict[str, float]) -> dict[str, float]:
    last, after = run["curve"][-1], run["retention"]
    learned = {key: last[key] for key in (_SCORES[stage.task], "loss")}
    kept = {key: after[key] for key in ("perplexity", *ACCURACIES)}
    degradation = metrics.average_change(
        *({name: of[name] for name in ACCURACIES} for of in (before, after))
    )
    return learned | kept | {"mean change, %": degradation}


def _header(*columns: str) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.3f}"
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {metrics.standard_error(values):.3f}"


def _plot(
    stage: Stage,
    runs: dict[str, dict[int, dict[str, Any]]],
    before: dict[str, float],
    path: Path,
) -> None:
    """Every checkpoint a point, one curve a method: perplexity against task loss."""
    with picture(path, 8, 5) as figure:
        from matplotlib import colormaps

        axes = figure.subplots()
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
        axes.axhline(before["perplexity"], color="grey", linewidth=0.8, label="before")
        for name, seeds in runs.items():
            if not seeds:
                continue
            points = list(zip(*(run["curve"] for run in seeds.values()), strict=True))
            loss = [statistics.mean(p["loss"] for p in point) for point in points]
            forgotten = [statistics.mean(p["perplexity"] for p in point) for point in points]
            axes.plot(loss, forgotten, marker="o", label=f"{name} ({len(seeds)} seeds)")
        axes.set_xlabel("task loss on held-out records, nats a token")
        axes.set_ylabel("wikitext-2 perplexity")
        axes.invert_xaxis()
        axes.set_title(f"{stage.name}: lower right is better")
        figure.legend(loc="outside right upper")


def _suppression(study: Study, results: Results) -> Iterator[str]:
    found = [(d, results.find(f"suppress/{d}")) for d in study.questions]
    if not any(record for _, record in found):
        return
    quotas = [f"{quota:g}" for quota in study.quotas]
    yield from ("", "## Suppression", "", "wikitext-2 perplexity with rows zeroed, by quota:", "")
    yield from _header("definition", "rows", *(f"{quota} %" for quota in quotas))
    for definition, record in found:
        questions = study.questions[definition]
        for kind, values in (record["figures"] if record else {}).items():
            label = "" if kind == "random" else f"{definition}, {questions} questions"
            cells = " | ".join(f"{values[quota]:,.1f}" for quota in quotas)
            kind = kind.replace("layer_balanced_highest", "highest")
            yield f"| {label} | {kind.replace('layer_balanced', 'lowest')} | {cells} |"


def _stability(results: Results) -> Iterator[str]:
    found = {
        name: record["figures"]
        for name in ("questions", "steps", "definitions", "dtype")
        if (record := results.find(f"stability/{name}")) is not None
    }
    if found:
        yield from ("", "## Stability", "", "Share of the 10 % of rows that two selections share.")
    for name, figures in found.items():
        columns = list(next(iter(figures.values())))
        yield from ("", *_header(name, *columns))
        for case, values in figures.items():
            cells = [f"{values[c]:.3f}" if c in values else "" for c in columns]
            yield f"| {case} | {' | '.join(cells)} |"
