"""Tables and plots of what the study has found so far."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loki_kernels.files import atomic_path

from . import metrics
from .pieces import Results, Stage, Study, best_rate, sweep_name
from .retention import ACCURACIES

# The task's own figure, beside its loss.
_SCORES = {"function_calling": "exact", "reranking": "ndcg@10"}


def write(study: Study, results: Results) -> None:
    """``<results>.md`` and a plot a stage beside the results' file."""
    path = results.path.with_suffix(".md")
    text = "\n".join(_lines(study, results, path.parent)) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{len(results.rows)} pieces -> {path}")


def _lines(study: Study, results: Results, folder: Path) -> Iterator[str]:
    devices = sorted({f"{r['device']}, torch {r['torch']}" for r in results.rows.values()})
    yield "# What was learned and what was forgotten"
    yield ""
    yield "Made by `python -m benchmarks.forgetting report`; do not edit. SmolLM2-135M-Instruct,"
    yield f"float32, on {'; '.join(devices) or 'no device yet'}."
    yield f"{len(results.rows)} pieces have run."
    before = results.find("before")
    for stage in study.stages:
        rows = {name: list(_seeds(study, stage, name, results)) for name in stage.methods}
        if not any(results.find(sweep_name(stage, n, r)) for n in stage.methods
                   for r in study.methods[n].learning_rates):  # fmt: skip
            continue
        yield from ("", f"## {stage.name}: {stage.task}, {stage.training.steps} steps", "")
        yield from _sweep(study, stage, results)
        if before is not None and any(rows.values()):
            yield from ("", *_outcome(study, stage, rows, before["figures"], results))
            _plot(stage, rows, before["figures"], folder / f"{stage.name}.png")
            yield from ("", f"![{stage.name}]({stage.name}.png)")
    yield from _suppression(study, results)
    yield from _stability(results)


def _seeds(study: Study, stage: Stage, name: str, results: Results) -> Iterator[dict[str, Any]]:
    for seed in study.evaluation.seeds:
        row = results.find(f"{stage.name}/{name}/seed-{seed}")
        if row is not None:
            yield row["figures"]


def _sweep(study: Study, stage: Stage, results: Results) -> Iterator[str]:
    yield "Validation loss, nats a token, by learning rate (seed 0; the lowest is chosen):"
    yield ""
    yield "| method | | | | chosen |"
    yield "|---|---|---|---|---|"
    for name in stage.methods:
        rates = study.methods[name].learning_rates
        cells = []
        for rate in rates:
            row = results.find(sweep_name(stage, name, rate))
            loss = f"{row['figures']['validation']['loss']:.4f}" if row else "not run"
            cells.append(f"{rate:g}: {loss}")
        best = best_rate(study, stage, name, results)
        note = "" if best is None else f"{best:g}"
        if best in (min(rates), max(rates)):
            note += ", at the edge"
        yield f"| {name} | {' | '.join(cells)} | {note} |"


def _outcome(
    study: Study,
    stage: Stage,
    rows: dict[str, list[dict[str, Any]]],
    before: dict[str, float],
    results: Results,
) -> Iterator[str]:
    """Means over seeds, ± their standard error where there are several."""
    score = _SCORES[stage.task]
    columns = ("method", "seeds", score, "loss", "perplexity", *ACCURACIES, "degradation, %")
    yield f"| {' | '.join(columns)} |"
    yield "|---" * (6 + len(ACCURACIES)) + "|"
    untouched = [
        row["figures"]["test"]
        for seed in study.evaluation.seeds
        if (row := results.find(f"before/{stage.task}/{seed}")) is not None
    ]
    if untouched:
        cells = [_mean([test[key] for test in untouched]) for key in (score, "loss")]
        kept = [_mean([before[key]]) for key in ("perplexity", *ACCURACIES)]
        yield f"| before | {len(untouched)} | {' | '.join(cells + kept)} | |"
    accuracy_before = {name: before[name] for name in ACCURACIES}
    for name, seeds in rows.items():
        if not seeds:
            yield f"| {name} | not run {'|' * (4 + len(ACCURACIES))} |"
            continue
        cells = [_mean([s["curve"][-1][key] for s in seeds]) for key in (score, "loss")]
        cells += [
            _mean([s["retention"][key] for s in seeds]) for key in ("perplexity", *ACCURACIES)
        ]
        cells.append(
            _mean(
                [
                    metrics.average_degradation(
                        accuracy_before, {k: s["retention"][k] for k in ACCURACIES}
                    )
                    for s in seeds
                ]
            )
        )
        yield f"| {name} | {len(seeds)} | {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {metrics.standard_error(values):.3f}"


def _plot(
    stage: Stage, rows: dict[str, list[dict[str, Any]]], before: dict[str, float], path: Path
) -> None:
    """Every checkpoint a point, one curve a method: perplexity against task loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(before["perplexity"], color="grey", linewidth=0.8, label="before")
    for name, seeds in rows.items():
        if not seeds:
            continue
        steps = range(len(seeds[0]["curve"]))
        loss = [statistics.mean(s["curve"][i]["loss"] for s in seeds) for i in steps]
        forgotten = [statistics.mean(s["curve"][i]["perplexity"] for s in seeds) for i in steps]
        axes.plot(loss, forgotten, marker="o", label=f"{name} ({len(seeds)} seeds)")
    axes.set_xlabel("task loss on held-out rows, nats a token")
    axes.set_ylabel("wikitext-2 perplexity")
    axes.invert_xaxis()
    axes.set_title(f"{stage.name}: lower right is better")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _suppression(study: Study, results: Results) -> Iterator[str]:
    found = [(d, results.find(f"suppress/{d}")) for d in study.questions]
    if not any(row for _, row in found):
        return
    quotas = [f"{quota:g}" for quota in study.quotas]
    yield from ("", "## Suppression", "", "wikitext-2 perplexity with rows zeroed, by quota:", "")
    yield f"| definition | rows | {' | '.join(f'{quota} %' for quota in quotas)} |"
    yield "|---" * (2 + len(quotas)) + "|"
    for definition, row in found:
        for kind, values in (row["figures"] if row else {}).items():
            label = "" if kind == "random" else definition
            cells = " | ".join(f"{values[quota]:,.1f}" for quota in quotas)
            kind = kind.replace("layer_balanced_highest", "highest")
            yield f"| {label} | {kind.replace('layer_balanced', 'lowest')} | {cells} |"


def _stability(results: Results) -> Iterator[str]:
    found = {
        name: row["figures"]
        for name in ("questions", "steps", "definitions", "dtype")
        if (row := results.find(f"stability/{name}")) is not None
    }
    if found:
        yield from ("", "## Stability", "", "Share of the 10 % of rows that two selections share.")
    for name, figures in found.items():
        columns = list(next(iter(figures.values())))
        yield from ("", f"| {name} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|")
        for case, values in figures.items():
            cells = [f"{values[c]:.3f}" if c in values else "" for c in columns]
            yield f"| {case} | {' | '.join(cells)} |"
