"""What sets two methods apart: paired over seeds, at their best and at equal task loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import metrics

# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Estimate:
    """A mean of paired differences and the half-width of its 95 % interval."""

    mean: float
    half: float

    @property
    def is_noise(self) -> bool:
        return not abs(self.mean) > self.half

    def __str__(self) -> str:
        text = f"{self.mean:+.3f} ± {self.half:.3f}"
        return f"{text} (noise)" if self.is_noise else text


def estimate(values: Sequence[float]) -> Estimate:
    """Of 2 to 10 independent values, taken to be normal."""
    mean, error = sum(values) / len(values), metrics.standard_error(values)
    return Estimate(mean, _T95[len(values) - 2] * error)


def difference(ours: Mapping[int, float], other: Mapping[int, float]) -> Estimate | None:
    """Ours minus the other, by seed; None of fewer than two seeds in common."""
    seeds = sorted(ours.keys() & other.keys())
    if len(seeds) < 2:
        return None
    return estimate([ours[seed] - other[seed] for seed in seeds])


def perplexity_at(curve: Sequence[tuple[float, float]], loss: float) -> float:
    """Perplexity where a curve of (task loss, perplexity) first comes down to ``loss``.

    Between checkpoints the logarithm of perplexity is linear in the loss. NaN if the curve stays
    above.
    """
    for (loss_a, a), (loss_b, b) in itertools.pairwise(curve):
        if loss_b <= loss <= loss_a:
            share = (loss_a - loss) / (loss_a - loss_b) if loss_a > loss_b else 1.0
            return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))
    return math.nan


def common_loss(
    runs: Mapping[str, Mapping[int, dict[str, Any]]], untouched: Mapping[int, float]
) -> dict[int, float]:
    """By seed, the lowest task loss that every method comes down to at some checkpoint.

    Args:
        runs: figures by method and seed.
        untouched: the task loss before, by seed.
    """
    lowest: dict[int, list[float]] = {}
    for run in runs.values():
        for seed in run.keys() & untouched.keys():
            losses = (untouched[seed], *(point["loss"] for point in run[seed]["curve"]))
            lowest.setdefault(seed, []).append(min(losses))
    return {seed: max(losses) for seed, losses in lowest.items()}


def at_equal_loss(
    runs: Mapping[str, Mapping[int, dict[str, Any]]],
    untouched: Mapping[int, float],
    perplexity: float,
    common: Mapping[int, float],
) -> dict[str, dict[int, float]]:
    """Perplexity by method and seed, where each has come down to the `common_loss`.

    ``runs`` and ``untouched`` as there; ``perplexity`` is the untouched model's.
    """
    return {
        name: {
            seed: perplexity_at(
                [
                    (untouched[seed], perplexity),
                    *((point["loss"], point["perplexity"]) for point in run[seed]["curve"]),
                ],
                common[seed],
            )
            for seed in run.keys() & common.keys()
        }
        for name, run in runs.items()
    }
