"""What one batch gives: scores, or counts of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..options import Criterion


@dataclass(frozen=True)
class Scores:
    """One batch's results, on the CPU.

    Attributes:
        scores: ``[B, L, D]``; None where they were only counted.
        sums: float64 ``[B, L]``, of the scores.
        change: ``[B, L]``, F(z) - F(baseline); NaN where the path has no such point.
        value: ``[B]``, F(z).
        target: int64 ``[B]``, the attributed tokens.
    """

    scores: Tensor | None
    sums: Tensor
    change: Tensor
    value: Tensor
    target: Tensor

    @classmethod
    def of_layers(cls, parts: Sequence[Scores]) -> Scores:
        """The results of one batch from those of its layers."""
        scores = [part.scores for part in parts if part.scores is not None]
        return cls(
            torch.cat(scores, dim=1) if scores else None,
            torch.cat([part.sums for part in parts], dim=1),
            torch.cat([part.change for part in parts], dim=1),
            parts[0].value,
            parts[0].target,
        )


@dataclass
class Counter:
    """How often each node is among the k lowest of its layer, over the batches so far.

    Attributes:
        quota: the percentage that k is.
        k: nodes of a layer.
        criterion: what the lowest are.
        layers: layer -> int64 ``[D]``, where the layer runs.
    """

    quota: float
    k: int
    criterion: Criterion
    layers: dict[int, Tensor] = field(default_factory=dict)

    def counts(self) -> Tensor:
        """``[L, D]`` on the CPU."""
        return torch.stack([self.layers[layer].cpu() for layer in sorted(self.layers)])
