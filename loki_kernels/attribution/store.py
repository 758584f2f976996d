"""Results as they come, in this process's memory."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..team import Team
from .plan import BatchLimits, PlannedBatch
from .result import Attribution, AttributionCounts
from .scores import Counter, Scores


@dataclass(frozen=True)
class Layout:
    """The arrays of a result, which have one row a prompt.

    Attributes:
        layers, width: L and D.
        scores: whether the scores are kept.
        complete: whether the definition has a completeness.
    """

    layers: int
    width: int
    scores: bool
    complete: bool

    @cached_property
    def empty(self) -> dict[str, np.ndarray]:
        """The arrays of no prompt, in the order in which a file has them."""
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        if self.scores:
            shapes["scores"] = ("<f4", (self.layers, self.width))
        shapes |= {"targets": ("<i8", ()), "value": ("<f4", ())}
        if self.complete:
            shapes |= dict.fromkeys(("completeness", "change"), ("<f4", (self.layers,)))
        return {name: np.empty((0, *shape), dtype) for name, (dtype, shape) in shapes.items()}

    def values(self, scores: Scores) -> dict[str, np.ndarray]:
        """One batch's; the only place that waits for the device."""
        values = {"targets": scores.target, "value": scores.value}
        if self.scores:
            values["scores"] = scores.scores.to(torch.float32)
        if self.complete:
            change = scores.change.cpu()
            values |= {"change": change, "completeness": scores.sums - change}
        return {
            name: values[name].cpu().numpy().astype(array.dtype, order="C", copy=False)
            for name, array in self.empty.items()
        }


class Memory(contextlib.AbstractContextManager["Memory"]):
    """Results in this process's memory."""

    def __init__(
        self,
        layout: Layout,
        run: dict[str, Any],
        counter: Counter | None,
        limits: BatchLimits,
        team: Team,
    ) -> None:
        self.layout, self.run, self.counter, self.limits = layout, run, counter, limits
        self.team = team
        self._arrays = {name: array.copy() for name, array in layout.empty.items()}

    def __exit__(self, *_: object) -> None:
        return None

    def reserve(self, total: int) -> None:
        """Make room for so many prompts."""
        for array in self._arrays.values():
            array.resize((total, *array.shape[1:]), refcheck=False)

    def knows(self, planned: PlannedBatch) -> bool:
        """Whether a former process says to have done this batch."""
        return False

    def has(self, planned: PlannedBatch) -> bool:
        """Whether a former process has left this batch."""
        return False

    def write(self, planned: PlannedBatch, scores: Scores) -> None:
        if self.counter is not None:
            self.counter.add(scores.scores)
        for name, values in self.layout.values(scores).items():
            self._arrays[name][planned.members] = values

    def result(self, total: int, batches: int) -> Attribution | AttributionCounts:
        """All of it, in every process, when it is complete."""
        self.team.meet()
        tensors = {name: torch.from_numpy(array) for name, array in self._arrays.items()}
        for tensor in tensors.values():
            self.team.add_up(tensor)
        counter = self.counter
        if counter is None:
            return Attribution(run=self.run, **tensors)
        counts = torch.zeros(self.layout.layers, self.layout.width, dtype=torch.int64)
        counts = counts if counter.counts is None else counter.counts.cpu()
        self.team.add_up(counts)
        return AttributionCounts(counts, counter.quota, counter.criterion, run=self.run, **tensors)
