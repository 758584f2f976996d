"""Which prompts are attributed together: windows of a stream, and the batches of each."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .prefill import Batch
from .prompts import Tokens

# Prompts of a stream that are held at a time: of 1,000 tokens each 32 MiB.
WINDOW = 4096


@dataclass(frozen=True)
class BatchLimits:
    """How large a batch may be.

    Attributes:
        prompts: that many in each, whatever they cost; None for as many as the rest allows.
        tokens: of all its prompts, padded to the longest.
        points: of all its prompts' paths.
        processes: that share the batches; none is left without one for the size of the others'.
    """

    prompts: int | None
    tokens: int
    points: int
    processes: int = 1

    @classmethod
    def of(cls, device: torch.device, prompts: int | None, processes: int = 1) -> BatchLimits:
        """Those of a device, or so many ``prompts``.

        Raises:
            ValueError: if ``prompts`` is no positive integer.
        """
        if prompts is not None and (not isinstance(prompts, int) or prompts < 1):
            raise ValueError(f"batch_size must be a positive integer; it is {prompts!r}.")
        # Measured on 2 cores (benchmarks/NOTES.md): more points leave the cache, fewer idle the
        # cores.
        sizes = (1024, 512) if device.type == "cpu" else (16384, 16384)
        return cls(prompts, *sizes, processes)

    def size(self, longest: int, points: int, among: int) -> int:
        """How many make a batch.

        Args:
            longest: tokens of the longest prompt.
            points: path points of a prompt.
            among: prompts in the window.
        """
        fitting = min(self.tokens // longest, self.points // points)
        return self.prompts or max(1, min(fitting, -(-among // self.processes)))


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

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, to which all are padded."""
        return max(map(len, self.sequences))

    def cost(self, points: int) -> int:
        """In tokens, with so many path points a prompt.

        A point passes half of the layers on average, forward and backward.
        """
        return len(self.members) * (self.longest + points)

    def digest(self) -> str:
        """A hash of all that the batch's results depend on beside the model and the definition."""
        digest = hashlib.sha256(repr(self.members).encode())
        for tokens in self.sequences:
            digest.update(tokens.content())
        if self.target is not None:
            digest.update(repr(self.target.tolist()).encode())
        return digest.hexdigest()[:32]

    def on(self, device: torch.device) -> Batch:
        """The batch itself, padded on the right, where the model takes its tokens."""
        lengths = torch.tensor([len(tokens) for tokens in self.sequences])
        input_ids = torch.zeros(len(self.members), self.longest, dtype=torch.int64)
        for padded, tokens in zip(input_ids, self.sequences, strict=True):
            padded[: len(tokens)] = torch.from_numpy(tokens.ids)
        media = [tokens.media for tokens in self.sequences]
        return Batch(self.members, input_ids.to(device), lengths.to(device), self.target, media)


@dataclass(frozen=True)
class Window:
    """Prompts that are sorted by length together.

    Attributes:
        first: the place of the first in the result.
        sequences: their tokens.
        targets: int64, one for each; None for those that the model predicts.
    """

    first: int
    sequences: list[Tokens]
    targets: Tensor | None

    @property
    def end(self) -> int:
        return self.first + len(self.sequences)

    def batches(self, number: int, limits: BatchLimits, points: int) -> list[PlannedBatch]:
        """The longest prompts first, so that what does not fit fails now.

        Args:
            number: of the first batch.
            limits: of each batch.
            points: path points of a prompt.
        """
        order = sorted(range(len(self.sequences)), key=lambda i: -len(self.sequences[i]))
        batches: list[PlannedBatch] = []
        start = 0
        while start < len(order):
            size = limits.size(len(self.sequences[order[start]]), points, len(order))
            chosen = order[start : start + size]
            start += size
            target = None if self.targets is None else self.targets[chosen]
            members = [self.first + i for i in chosen]
            sequences = [self.sequences[i] for i in chosen]
            batches.append(PlannedBatch(number + len(batches), members, sequences, target))
        return batches


def windows(
    sequences: Iterable[Tokens], targets: Tensor | None, size: int | None
) -> Iterator[Window]:
    """Windows of ``size`` prompts, or one window of all.

    Raises:
        ValueError: if there are more or fewer targets than prompts.
    """
    source, first = iter(sequences), 0
    while True:
        read = list(itertools.islice(source, size))
        end = first + len(read)
        last = size is None or len(read) < size
        if targets is not None and (len(targets) < end or (last and len(targets) > end)):
            raise ValueError(
                f"target must hold one token id for each of the {end} prompts"
                f"{'' if last else ' and more'}; it holds {len(targets)}."
            )
        if read:
            yield Window(first, read, None if targets is None else targets[first:end])
        if last:
            return
        first = end
