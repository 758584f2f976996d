"""How large a batch a device has room for: by count beforehand, by halving what does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..placement import computed_if_it_fits, free_bytes
from ..structure import Structure, embedding_weight
from .plan import BatchLimits, PlannedBatch
from .scores import Scores

_SHARE = 0.6  # of what is free
_MOST = 131_072  # 600 prompts of a small model, which is enough to share the launches


def points_that_fit(structure: Structure, device: torch.device, beside: int = 0) -> int | None:
    """Path points of which three fifths of a device's free memory hold the activations.

    A point passes half of the layers on average, and autograd keeps about twice what their linear
    layers put out: 2.75 MB a point of Llama-3.1-8B in bfloat16 (`benchmarks/NOTES.md`). A power of
    two, so that a little more or less of free memory cuts the same batches.

    Args:
        structure: of the model.
        device: where it is, or will be.
        beside: bytes that will be taken by then.

    Returns:
        None where nothing says what is free, and for layers whose activations this does not count:
        experts and convolutions, those on several devices, and those that run again or whose
        weights come and go.
    """
    if structure.reruns:  # sharded ones among them
        return None
    free = free_bytes(device)
    if free is None:
        return None
    outputs = 0
    places: set[torch.device] = set()
    for module in structure.parts:
        own = [x for x in module._parameters.values() if x is not None]
        places.update(parameter.device for parameter in own)
        if any(parameter.ndim > 1 for parameter in own):
            width = getattr(module, "out_features", getattr(module, "nf", None))
            if not isinstance(width, int):
                return None
            outputs += width
    if not outputs or len(places) > 1:
        return None
    each = outputs * embedding_weight(structure.causal_lm).element_size()
    points = int(_SHARE * max(0, free - beside)) // each
    return min(_MOST, 1 << max(0, points.bit_length() - 1))


class Refused:
    """In the place of scores: of several prompts that the engine does not take together."""


@dataclass
class Fitting:
    """Halves what does not fit, until it does; what is as large is halved at once from then on.

    Attributes:
        points: path points of a prompt.
        below: of what `PlannedBatch.cost` a batch is halved before it is tried.
    """

    points: int
    below: float = math.inf

    @classmethod
    def of(cls, points: int, own: BatchLimits, kept: BatchLimits, device: torch.device) -> Fitting:
        """One that tries nothing larger than a CPU plans, if the batches are another device's.

        A batch that a large GPU has planned may be all of a CPU's memory, and the system ends a
        process for that without an error that could be caught. On a GPU, whose limits are of what
        is free and so others in each run, it can be, and a batch that fits has the same bits.
        """
        larger = kept.tokens > own.tokens or kept.points > own.points
        ahead = larger and not own.prompts and free_bytes(device) is None
        return cls(points, own.tokens + own.points + 1 if ahead else math.inf)

    def run(
        self, planned: PlannedBatch, compute: Callable[[PlannedBatch], Scores | Refused]
    ) -> Scores:
        """A batch's results; of one that ``compute`` refuses those of its halves.

        Raises:
            torch.OutOfMemoryError: if one prompt alone does not fit.
        """
        left, done = [planned], []
        while left:
            part = left.pop()
            several, cost = len(part.members) > 1, part.cost(self.points)
            found: Scores | Refused | None = None
            if not several or cost < self.below:
                what = f"{len(part.members)} prompts of up to {part.longest} tokens"
                found = computed_if_it_fits(partial(compute, part), what, halves=several)
                if found is None:
                    self.below = cost
            if isinstance(found, Scores):
                done.append(found)
            else:
                left += reversed(part.halves())
        return done[0] if len(done) == 1 else Scores.of_samples(done)
