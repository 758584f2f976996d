"""What one batch gives, and how often each node was among the lowest so far."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import count_lowest
from ..options import Criterion


@dataclass(frozen=True)
class Scores:
    """One batch's results, where they were computed.

    Attributes:
        scores: ``[B, L, D]``.
        change: ``[B, L]``, F(z) - F(baseline); NaN where the path has no such point.
        value: ``[B]``, F(z).
        target: int64 ``[B]``, the attributed tokens.
    """

    scores: Tensor
    change: Tensor
    value: Tensor
    target: Tensor

    @classmethod
    def of_layers(cls, parts: Sequence[Scores]) -> Scores:
        """The results of one batch from those of its layers."""
        return cls(
            torch.cat([part.scores for part in parts], dim=1),
            torch.cat([part.change for part in parts], dim=1),
            parts[0].value,
            parts[0].target,
        )

    @classmethod
    def of_samples(cls, parts: Sequence[Scores]) -> Scores:
        """The results of one batch from those of its prompts."""
        fields = ([getattr(p, name) for p in parts] for name in cls.__dataclass_fields__)
        return cls(*(torch.cat(tensors) for tensors in fields))

    def at(self, layers: Sequence[int], count: int) -> Scores:
        """Those of ``layers`` among ``count``; zero where there is nothing to attribute."""
        if len(layers) == count:
            return self
        scores = self.scores.new_zeros(len(self.scores), count, self.scores.shape[2])
        change = self.change.new_zeros(len(self.change), count)
        scores[:, layers], change[:, layers] = self.scores, self.change
        return Scores(scores, change, self.value, self.target)

    def to(self, device: torch.device) -> Scores:
        """The same on one device."""
        return Scores(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def minus(self, other: Scores) -> Scores:
        """The difference to another target's; ``target`` stays."""
        return Scores(
            self.scores - other.scores,
            self.change - other.change,
            self.value - other.value,
            self.target,
        )

    @functools.cached_property  # of counts it is asked for twice, and waits for the device
    def sums(self) -> Tensor:
        """Each layer's sum of scores, float64 ``[B, L]`` on the CPU."""
        # Apple's devices and some of Intel's have no float64.
        scores = self.scores if self.scores.device.type in ("cpu", "cuda") else self.scores.cpu()
        return scores.sum(-1, dtype=torch.float64).cpu()


@dataclass
class Counter:
    """How often each node is among the k lowest of its layer, over the batches so far.

    Attributes:
        quota: the percentage that k is.
        k: nodes of a layer.
        criterion: what the lowest are.
        counts: int64 ``[L, D]``, where the scores are; None before the first batch.
    """

    quota: float
    k: int
    criterion: Criterion
    counts: Tensor | None = None

    def add(self, scores: Tensor) -> None:
        """Count one batch's ``[B, L, D]``."""
        self.counts = count_lowest(scores, self.k, self.counts, criterion=self.criterion)
