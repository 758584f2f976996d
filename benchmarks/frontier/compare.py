"""Two arms at equal task loss: their frontiers, and the ratio of what they forget."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from loki_kernels.demo.frontier import Point, at_loss, frontier

from .data import DOMAINS

_REFERENCE = "full"
# Shares of what it gains at its best rate, at whose losses arms are compared.
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def log_divergence(point: Mapping[str, float], domains: Sequence[str] = DOMAINS) -> float:
    """The mean over the domains of log KL."""
    return sum(math.log(max(point[domain], 1e-9)) for domain in domains) / len(domains)


def log_mean_divergence(point: Mapping[str, float]) -> float:
    """Log of the mean over the domains of KL, which is what ``loki_kernels.drift`` shows."""
    return math.log(max(sum(point[domain] for domain in DOMAINS) / len(DOMAINS), 1e-9))


def is_finite(record: dict[str, Any]) -> bool:
    """Whether a training came to numbers; too high a rate may not."""
    return all(math.isfinite(value) for point in record["points"] for value in point.values())


def comparable(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of as many seeds as all arms have, each arm at the rates that it has with all of them.

    Of seeds whose rates are others the most that have one in common are left, so that a seed with
    another rate alone does not end the comparison of the others.
    """
    rates: dict[str, dict[int, set[float]]] = defaultdict(lambda: defaultdict(set))
    for record in records:
        rates[record["arm"]][record["seed"]].add(record["rate"])
    seeds = sorted(set.intersection(*map(set, rates.values()))) if rates else []
    for count in range(len(seeds), 0, -1):
        for chosen in itertools.combinations(seeds, count):
            common = {
                arm: set.intersection(*(own[seed] for seed in chosen)) for arm, own in rates.items()
            }
            if all(common.values()):
                return [
                    record
                    for record in records
                    if record["seed"] in chosen and record["rate"] in common[record["arm"]]
                ]
    return []


class Ratio(NamedTuple):
    """Two arms at equal loss.

    Attributes:
        logs: log(KL of the other / KL of ours) by seed, a mean over the shares.
        shares: the same, a mean over the seeds, by the share of full fine-tuning's best gain at
            whose loss they are compared.
    """

    logs: dict[int, float]
    shares: dict[float, float]


class Comparison:
    """Trainings of one task and number of steps that came to numbers, by arm and seed.

    What they forget is ``forgotten`` of a measurement, a log.
    """

    def __init__(
        self,
        records: Iterable[dict[str, Any]],
        forgotten: Callable[[Mapping[str, float]], float] = log_divergence,
    ) -> None:
        self.records = list(filter(is_finite, records))
        self.forgotten = forgotten
        # by arm, seed and rate, of every share of the update that was merged
        self.points: dict[tuple[str, int], dict[float, list[Point]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self.before: dict[int, float] = {}
        for record in self.records:
            self.before[record["seed"]] = record["before"]
            for point in record["points"]:
                self.points[record["arm"], record["seed"]][record["rate"]].append(
                    (point["loss"], forgotten(point))
                )

    def arms(self) -> list[str]:
        return list(dict.fromkeys(arm for arm, _ in self.points))

    def seeds(self, arm: str) -> list[int]:
        return sorted(seed for name, seed in self.points if name == arm)

    def of(self, arms: Collection[str]) -> Comparison:
        """Of these arms alone: the seeds that all have, at the rates that each has with them."""
        own = [record for record in self.records if record["arm"] in arms]
        return Comparison(comparable(own), self.forgotten)

    def frontier(self, arm: str, seed: int) -> list[Point]:
        """Of every rate and every share of the update that is merged."""
        return frontier(itertools.chain.from_iterable(self.points.get((arm, seed), {}).values()))

    def at(self, arm: str, seed: int, loss: float) -> float | None:
        """Log KL at a loss: of the rate whose update, scaled back, forgets least there.

        Not on the frontier of all rates, whose lines lead from a low rate's whole update, above the
        curve of a higher one's, to that curve: an arm would lose by having more rates.
        """
        curves = map(frontier, self.points.get((arm, seed), {}).values())
        found = [at_loss(curve, loss) for curve in curves]
        return min((kl for kl in found if kl is not None), default=None)

    def target(self, seed: int, share: float) -> float | None:
        """The loss at a share of full fine-tuning's best gain."""
        front = self.frontier(_REFERENCE, seed)
        return self.before[seed] - share * (self.before[seed] - front[0][0]) if front else None

    def log_ratios(self, ours: str, other: str) -> Ratio:
        """At the shares that both reach with every seed that they and full fine-tuning have."""
        pair = self.of({ours, other, _REFERENCE})
        differences: dict[float, dict[int, float]] = {}
        for share in SHARES:
            found = {}
            for seed in pair.seeds(ours):
                loss = pair.target(seed, share)
                if loss is None:
                    continue
                a, b = (pair.at(arm, seed, loss) for arm in (ours, other))
                if a is not None and b is not None:
                    found[seed] = b - a
            if found and len(found) == len(pair.seeds(ours)):
                differences[share] = found
        if not differences:
            return Ratio({}, {})
        logs = {
            seed: sum(found[seed] for found in differences.values()) / len(differences)
            for seed in pair.seeds(ours)
        }
        shares = {share: sum(found.values()) / len(found) for share, found in differences.items()}
        return Ratio(logs, shares)
