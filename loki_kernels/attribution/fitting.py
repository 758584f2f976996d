"""How large a batch a device has room for: by count beforehand, by halving what does not fit."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..placement import free_bytes, memory_is_full
from ..structure import Structure, embedding_weight
from .plan import PlannedBatch
from .scores import Scores

logger = logging.getLogger(__name__)

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


@dataclass
class Fitting:
    """Halves what does not fit, until it does; what is as large is halved at once from then on.

    Attributes:
        points: path points of a prompt.
    """

    points: int
    _below: float = field(default=math.inf, init=False)  # in `PlannedBatch.cost`: what did not fit

    def run(self, planned: PlannedBatch, compute: Callable[[PlannedBatch], Scores]) -> Scores:
        """A batch's results.

        Raises:
            torch.OutOfMemoryError: if one prompt alone does not fit.
        """
        left, done = [planned], []
        while left:
            part = left.pop()
            if len(part.members) > 1 and part.cost(self.points) >= self._below:
                left += reversed(part.halves())
                continue
            scores = self._try(part, compute)
            if scores is None:
                left.append(part)
            else:
                done.append(scores)
        return done[0] if len(done) == 1 else Scores.of_samples(done)

    def _try(self, part: PlannedBatch, compute: Callable[[PlannedBatch], Scores]) -> Scores | None:
        """None if it did not fit, but half of it may."""
        try:
            return compute(part)
        except RuntimeError as error:
            # Triton and cuBLAS ask for memory of their own, and say so in other words.
            if len(part.members) == 1 or not memory_is_full(error):
                raise
            logger.warning(
                "%d prompts of up to %d tokens do not fit into the device's memory at once: half "
                "as many at a time from now on (%s)",
                len(part.members),
                part.longest,
                str(error),  # a handler may keep the record, and an error keeps what it stopped
            )
        self._below = part.cost(self.points)
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()  # now that the error and what it held are gone
        return None
