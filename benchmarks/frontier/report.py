"""The frontiers' tables and plots."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loki_kernels.files import atomic_path
from loki_kernels.plots import picture

from ..forgetting.compare import estimate
from .arms import ARMS
from .compare import SHARES, Comparison, is_finite, log_divergence, log_mean_divergence
from .damage import damage_table, plot_damages, read_damages
from .data import DOMAINS
from .runner import read_records

_READING = """\
Every training is measured at a quarter, half, three quarters and all of its update. Between these
log KL is taken to be linear in the loss, nothing is extrapolated, and at a loss an arm has the rate
that forgets least there. The plots' curves are the measurements of all rates that no other beats in
both task loss and KL. KL is that of the base's next-token distribution from the tuned model's, a
token, as the geometric mean over wikitext, code and chat (4,000 tokens each), which counts the
texts alike; the mean KL, which `loki-kernels drift` shows, is mostly that of the text that moves
most. The shares are of the best that full fine-tuning gains of the task's held-out loss, by seed.
`-` says that an arm does not get there, or that a quarter of its update is beyond. Two arms are
compared with the seeds that both and full fine-tuning have, at the rates that each has with all of
these, and at the shares that both reach with every seed, which stand behind the ratio: a mean of
log KL's differences over shares and seeds, with a 95 % interval of Student's t of more than one
seed. Trainings with the same texts, by the table above, share one draw of samples and answers: an
interval is over the order of the training texts, and LoRA's factors, alone. The tables of arms and
the plots are of the arms with the seed that most have, and of all seeds that these have in
common."""
_SHOWN = (0.5, 0.7, 0.9)


def write_report(results: Path, model: str) -> None:
    """``<results>.md`` and a plot of every task beside the results' file."""
    path = results.with_suffix(".md")
    text = "\n".join(_lines(read_records(results), model, path.parent)) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"-> {path}")


def _lines(records: list[dict[str, Any]], model: str, folder: Path) -> Iterator[str]:
    yield "# Forgetting at equal task loss"
    yield ""
    yield f"Made by `python -m benchmarks.frontier report`; do not edit. {model}, 4"
    yield f"sequences of 256 tokens a step. {len(records)} trainings:"
    yield ""
    yield from _machines(records)
    yield ""
    yield _READING
    groups = sorted({(r["steps"], r["task"]) for r in records})
    comparisons, ours = {}, {}
    for steps, task in groups:
        own = [r for r in records if (r["steps"], r["task"]) == (steps, task)]
        every = Comparison(own)
        comparison = comparisons[steps, task] = _of_one_seed(every)
        best = _ours(every)
        if best is not None:
            ours[steps, task] = _of_ours(every, best)
        yield from ("", f"## {task}, {steps} steps", "")
        before = sorted({f"{value:.3f}" for value in every.before.values()})
        yield f"The base's loss is {', '.join(before)}."
        yield ""
        yield from _table(comparison)
        yield from ("", "Times that the other's KL is ours; seeds; shares:", "")
        yield from _against(own)
        yield from ("", "The same (all) by the share of full fine-tuning's best gain:", "")
        yield from _by_share(every)
        if best is not None:
            yield from _against_the_rest(every, best)
        lost = sum(not is_finite(r) for r in own)
        if lost:
            yield from ("", f"{lost} trainings came to no numbers and are left out.")
    for kind, drawn in (("frontier", comparisons), ("protected", ours)):
        for steps in sorted({steps for steps, _ in drawn}):
            name = f"{kind}-{steps}.png"
            _plot({t: c for (s, t), c in drawn.items() if s == steps}, folder / name)
            yield from ("", f"![{steps} steps: log KL against task loss]({name})")
    damages = read_damages(records)
    if len(damages) >= 5:
        plot_damages(damages, folder / "damage.png")
        yield from ("", "## Predicted damage", "", *damage_table(damages), "")
        yield "![KL against predicted damage](damage.png)"


def _of_one_seed(every: Comparison) -> Comparison:
    """Of the arms with the seed that most of them have."""
    arms = {seed: [a for a in every.arms() if seed in every.seeds(a)] for seed in every.before}
    return every.of(max(arms.values(), key=len))


def _ours(every: Comparison) -> str | None:
    """What the package does by itself, of SmolLM2 or of Gemma-3-270M: that with most seeds."""
    best = max(_FOURTEENTHS, key=lambda arm: len(every.seeds(arm)))
    return best if every.seeds(best) else None


def _of_ours(every: Comparison, best: str) -> Comparison:
    """What the package does and what it is compared with, with the seed that most of them have."""
    arms, seeds = (best, *_OTHERS), every.seeds(best)
    own = [r for r in every.records if r["arm"] in arms and r["seed"] in seeds]
    return _of_one_seed(Comparison(own))


def _machines(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What trained which seeds, on which texts."""
    yield "| seeds | device | torch | products of trainings | texts |"
    yield "|---|---|---|---|---|"
    groups: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for record in records:
        products = f"{record['autocast']}, autocast" if "autocast" in record else "TF32 or float32"
        texts = record.get("data", "not recorded")
        groups[record["device"], record["torch"], products, texts].add(record["seed"])
    for group, seeds in groups.items():
        yield f"| {', '.join(map(str, sorted(seeds)))} | {' | '.join(group)} |"


def _table(comparison: Comparison) -> Iterator[str]:
    shares = [f"KL at {share:.0%}" for share in _SHOWN]
    yield f"| arm | seeds | best loss | {' | '.join(shares)} | KL by full's |"
    yield f"|---|{'--:|' * (len(shares) + 3)}"
    known = [name for name in ARMS if name in comparison.arms()]
    for arm in known:
        seeds = comparison.seeds(arm)
        best = [comparison.frontier(arm, seed)[0][0] for seed in seeds]
        cells = [arm, str(len(seeds)), f"{sum(best) / len(best):.3f}"]
        for share in _SHOWN:
            values = []
            for seed in seeds:
                loss = comparison.target(seed, share)
                if loss is not None:
                    values.append(comparison.at(arm, seed, loss))
            reached = [v for v in values if v is not None]
            all_do = len(reached) == len(seeds)
            cells.append(f"{math.exp(sum(reached) / len(reached)):.4f}" if all_do else "-")
        ratio = comparison.log_ratios("full", arm)
        cells.append(format_ratio(ratio.logs) + format_shares(ratio.shares))
        yield f"| {' | '.join(cells)} |"


# What the package does by itself, of SmolLM2 and of Gemma-3-270M.
_FOURTEENTHS = ("down_proj protected, 110", "down_proj protected, 147")
_OURS = (
    *_FOURTEENTHS,
    "rows protected, 110",
    "down_proj protected",
    "rows protected",
)
_OTHERS = ("full", "LoRA", "full + replay", "full + KL", "LoRA + replay", "LoRA + KL")


def _against(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """On the texts together, by either mean, and on each alone, which need not move alike."""
    comparisons = {
        "all": Comparison(records),
        "all, by the mean KL": Comparison(records, log_mean_divergence),
        **{text: Comparison(records, partial(log_divergence, domains=(text,))) for text in DOMAINS},
    }
    yield f"| ours | text | {' | '.join(_OTHERS)} |"
    yield f"|---|---|{'--:|' * len(_OTHERS)}"
    trained = comparisons["all"].arms()
    for ours in (arm for arm in _OURS if arm in trained):
        for text, comparison in comparisons.items():
            cells = [ours, text]
            for other in _OTHERS:
                logs, shares = comparison.log_ratios(ours, other)
                cells.append(
                    f"{format_ratio(logs)}; {len(logs)}{format_shares(shares)}" if logs else "-"
                )
            yield f"| {' | '.join(cells)} |"


def _by_share(comparison: Comparison) -> Iterator[str]:
    """All of an update is near the last share that it reaches, a merge scaled back at the first."""
    yield f"| ours | other | {' | '.join(f'{share:.0%}' for share in SHARES)} |"
    yield f"|---|---|{'--:|' * len(SHARES)}"
    trained = comparison.arms()
    for ours in (arm for arm in _OURS if arm in trained):
        for other in _OTHERS:
            found = comparison.log_ratios(ours, other).shares
            if found:
                cells = [f"{math.exp(found[s]):.2f}" if s in found else "-" for s in SHARES]
                yield f"| {ours} | {other} | {' | '.join(cells)} |"


def _against_the_rest(comparison: Comparison, ours: str) -> Iterator[str]:
    """Arms that have few seeds with ours: variants of it, and published methods."""
    rest = [arm for arm in comparison.arms() if arm not in (ours, *_OTHERS)]
    found = {arm: comparison.log_ratios(ours, arm) for arm in rest}
    lines = [
        f"| {arm} | {_by_seed(logs)} | {format_ratio(logs)}{format_shares(shares)} |"
        for arm, (logs, shares) in found.items()
        if logs
    ]
    if lines:
        yield from ("", f"Times that the other's KL is that of {ours}, one by one:", "")
        yield from ("| other | by seed | mean; shares |", "|---|---|--:|", *lines)


def _by_seed(logs: dict[int, float]) -> str:
    return ", ".join(f"{seed}: {math.exp(log):.2f}" for seed, log in logs.items())


def format_shares(shares: Collection[float]) -> str:
    """The first and the last of them."""
    return f"; {min(shares):.0%} to {max(shares):.0%}" if shares else ""


def format_ratio(logs: dict[int, float]) -> str:
    """A ratio and, of several seeds, its interval."""
    if not logs:
        return "-"
    values = list(logs.values())
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{math.exp(mean):.2f}"
    interval = estimate(values)
    low, high = math.exp(mean - interval.half), math.exp(mean + interval.half)
    return f"{math.exp(mean):.2f} ({low:.2f} to {high:.2f})"


# What the plot shows; the others are in the tables.
_DRAWN = (
    "full",
    "LoRA",
    "full + replay",
    "full + KL",
    "rows",
    "rows protected",
    "down_proj",
    "down_proj protected",
    *_FOURTEENTHS,
    "down_proj, random subspace",
    "linears protected",
)


def _plot(comparisons: dict[str, Comparison], path: Path) -> None:
    with picture(path, 6 * len(comparisons), 5) as figure:
        panels = figure.subplots(1, len(comparisons), squeeze=False)[0]
        for axes, (task, comparison) in zip(panels, comparisons.items(), strict=True):
            for number, arm in enumerate(name for name in _DRAWN if name in comparison.arms()):
                front = comparison.frontier(arm, comparison.seeds(arm)[0])
                style = "o-" if "protected" in arm else ".--"
                axes.plot(
                    [loss for loss, _ in front],
                    [math.exp(kl) for _, kl in front],
                    style,
                    color=f"C{number}",
                    markersize=4,
                    label=arm,
                )
            axes.axvline(comparison.before[min(comparison.before)], color="grey", linewidth=0.8)
            axes.set_yscale("log")
            axes.set_xlabel("held-out task loss, nats a token (grey: before training)")
            axes.set_title(f"{task}: lower left is better")
        panels[0].set_ylabel(f"KL from the base, nats a token ({', '.join(DOMAINS)})")
        panels[-1].legend(fontsize=8)
