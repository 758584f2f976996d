"""What a method forgets for what it learns: points of task loss and divergence, and curves."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..plots import picture

Point = tuple[float, float]  # task loss, and log KL or what else is lost

_STEPS = 10  # of the losses at which methods are compared


def frontier(points: Iterable[Point]) -> list[Point]:
    """Those that no other beats in both, by rising loss and falling KL."""
    kept: list[Point] = []
    for loss, kl in sorted(points):
        if not kept or kl < kept[-1][1]:
            kept.append((loss, kl))
    return kept


def at_loss(front: Sequence[Point], loss: float) -> float | None:
    """A frontier's value, such as log KL, linear in the loss between points; None outside them."""
    if not front or not front[0][0] <= loss <= front[-1][0]:
        return None
    place = bisect.bisect_left(front, (loss, -math.inf))
    if front[place][0] == loss:
        return front[place][1]
    (loss_a, a), (loss_b, b) = front[place - 1], front[place]
    return a + (loss - loss_a) / (loss_b - loss_a) * (b - a)


def at_equal_loss(
    methods: Mapping[str, Iterable[tuple[float, float]]],
) -> tuple[tuple[float, float], dict[str, float]]:
    """`mean_at_equal_loss` of the (task loss, KL) of each method's measurements, by log KL."""
    fronts = {
        name: frontier((loss, math.log(kl)) for loss, kl in points if kl > 0)
        for name, points in methods.items()
    }
    shared, found = mean_at_equal_loss(fronts)
    return shared, {name: math.exp(mean) for name, mean in found.items()}


def mean_at_equal_loss(
    fronts: Mapping[str, Sequence[Point]],
) -> tuple[tuple[float, float], dict[str, float]]:
    """The task losses between which all methods were measured, and each one's mean value there.

    A method that never had a loss which all others reach is left out. The mean is over equal steps
    of the loss: at the lowest one alone, the end of the method that learns least, that method's
    frontier is steepest.
    """
    low = max(front[0][0] for front in fronts.values())
    fronts = {name: front for name, front in fronts.items() if front[-1][0] >= low}
    high = min(front[-1][0] for front in fronts.values())
    losses = [low + (high - low) * i / _STEPS for i in range(_STEPS)] + [high]
    found = {}
    for name, front in fronts.items():
        values = [value for loss in losses if (value := at_loss(front, loss)) is not None]
        found[name] = sum(values) / len(values)
    return (low, high), found


def plot_frontier(
    path: Path,
    methods: Mapping[str, Sequence[tuple[float, float]]],
    before: float,
) -> None:
    """KL from the base against task loss, a curve a method.

    Args:
        path: a ``.png`` file.
        methods: (task loss, KL) by name, by falling share of the update.
        before: the base's loss.
    """
    with picture(path, 7, 5) as figure:
        axes = figure.subplots()
        for name, points in methods.items():
            losses, divergences = zip(*points, strict=True)
            axes.plot(losses, divergences, "o-", markersize=5, label=name)
        axes.set_yscale("log")
        axes.set_xlabel(f"loss on held-out calls, nats a token ({before:.2f} before training)")
        axes.set_ylabel("KL from the base on general text and questions, nats a token")
        axes.set_title("what is forgotten for what is learned: lower left is better", fontsize=10)
        axes.legend()
