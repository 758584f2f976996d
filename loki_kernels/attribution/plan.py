"""Which prompts are attributed together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..structure import Structure
from .prefill import Batch
from .prompts import Tokens


@dataclass(frozen=True)
class BatchLimits:
    """How large a batch may be.

    Attributes:
        prompts: that many in each, whatever they cost; None for as many as the rest allows.
        tokens: of all its prompts, padded to the longest.
        points: of all its prompts' paths.
    """

    prompts: int | None
    tokens: int
    points: int

    @classmethod
    def of(cls, device: torch.device, prompts: int | None) -> BatchLimits:
        """Those of a device, or so many ``prompts``.

        Raises:
            ValueError: if ``prompts`` is no positive integer.
        """
        if prompts is not None and (not isinstance(prompts, int) or prompts < 1):
            raise ValueError(f"batch_size must be a positive integer; it is {prompts!r}.")
        # Measured on 2 cores (benchmarks/NOTES.md): more points leave the cache, fewer idle the
        # cores.
        return cls(prompts, *((1024, 512) if device.type == "cpu" else (16384, 16384)))

    def size(self, longest: int, points: int) -> int:
        """How many prompts of up to ``longest`` tokens and ``points`` path points make a batch."""
        return self.prompts or max(1, min(self.tokens // longest, self.points // points))


@dataclass(frozen=True)
class PlannedBatch:
    """Prompts that are attributed together.

    Attributes:
        number: of the batch, counted from 0.
        members: the prompts' places in the result.
        sequences: their tokens.
        target: int64 ``[B]``, the tokens to attribute; None for those that the model predicts.
    """

    number: int
    members: list[int]
    sequences: list[Tokens]
    target: Tensor | None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))

    def digest(self) -> str:
        """A hash of all that the batch's results depend on beside the model and the definition."""
        digest = hashlib.sha256(repr(self.members).encode())
        for tokens in self.sequences:
            digest.update(f"{len(tokens)} ".encode())
            digest.update(tokens.tobytes())
        if self.target is not None:
            digest.update(repr(self.target.tolist()).encode())
        return digest.hexdigest()[:32]

    def on(self, device: torch.device) -> Batch:
        """The batch itself, padded on the right, where the model takes its tokens."""
        lengths = torch.tensor([len(tokens) for tokens in self.sequences])
        input_ids = torch.zeros(len(self.members), int(lengths.max()), dtype=torch.int64)
        for padded, tokens in zip(input_ids, self.sequences, strict=True):
            padded[: len(tokens)] = torch.from_numpy(tokens)
        return Batch(self.members, input_ids.to(device), lengths.to(device), self.target)


def plan_batches(
    sequences: Sequence[Tokens],
    targets: Tensor | None,
    limits: BatchLimits,
    structure: Structure,
    steps: int,
) -> list[PlannedBatch]:
    """The longest prompts first, so that what does not fit fails now.

    Args:
        sequences: N prompts.
        targets: int64 ``[N]``, or None.
        limits: of each batch.
        structure: of the model.
        steps: path points of a layer.
    """
    points = len(structure.layers) * steps
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    batches: list[PlannedBatch] = []
    start = 0
    while start < len(order):
        size = limits.size(len(sequences[order[start]]), points)
        members = order[start : start + size]
        start += size
        chosen = [sequences[i] for i in members]
        target = None if targets is None else targets[members]
        batches.append(PlannedBatch(len(batches), members, chosen, target))
    return batches
