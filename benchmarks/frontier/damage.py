"""What the update's size predicts of forgetting, against what was measured."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loki_kernels.plots import picture

from .compare import is_finite, log_divergence


class Damage(NamedTuple):
    """Of one training's whole update.

    Attributes:
        arm: its name.
        predicted: log of ½ sum_j s_j delta_j^T E[x x^T] delta_j, nats a token.
        measured: the mean over the domains of log KL.
    """

    arm: str
    predicted: float
    measured: float


def read_damages(records: Sequence[dict[str, Any]]) -> list[Damage]:
    """Of the trainings that predicted it."""
    return [
        Damage(r["arm"], math.log(r["predicted"]), log_divergence(r["points"][-1]))
        for r in records
        if r.get("predicted", 0) > 0 and is_finite(r)
    ]


def fit(damages: Sequence[Damage]) -> tuple[float, float]:
    """Slope of the measured on the predicted, and their correlation."""
    x, y = [d.predicted for d in damages], [d.measured for d in damages]
    return statistics.linear_regression(x, y).slope, statistics.correlation(x, y)


def damage_table(damages: Sequence[Damage]) -> Iterator[str]:
    """Of all trainings, and of each arm with five or more."""
    by_arm = defaultdict(list)
    for damage in damages:
        by_arm[damage.arm].append(damage)
    yield "KL against ½ Σ s δᵀ E[xxᵀ] δ of the whole update; of a square law the slope is 1."
    yield from (
        "",
        "| arm | trainings | slope | correlation | KL by predicted |",
        "|---|--:|--:|--:|--:|",
    )
    for name, own in {"all": list(damages), **by_arm}.items():
        if len(own) < 5:
            continue
        slope, correlation = fit(own)
        ratio = math.exp(sum(d.measured - d.predicted for d in own) / len(own))
        yield f"| {name} | {len(own)} | {slope:.2f} | {correlation:.2f} | {ratio:.2f} |"


def plot_damages(damages: Sequence[Damage], path: Path) -> None:
    with picture(path, 7, 6) as figure:
        axes = figure.subplots()
        by_arm = defaultdict(list)
        for damage in damages:
            by_arm[damage.arm].append(damage)
        for number, (name, own) in enumerate(sorted(by_arm.items())):
            axes.plot(
                [math.exp(d.predicted) for d in own],
                [math.exp(d.measured) for d in own],
                "ov^s"[number // 10 % 4],
                color=f"C{number % 10}",
                markersize=3,
                label=name,
            )
        ends = [math.exp(f(d.predicted for d in damages)) for f in (min, max)]
        axes.plot(ends, ends, color="grey", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("predicted: ½ Σ s δᵀ E[xxᵀ] δ, nats a token (grey: equal)")
        axes.set_ylabel("measured KL from the base, nats a token")
        axes.legend(fontsize=6, ncols=2)
