"""A batch in parts, where the device has no room for all of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .plan import PlannedBatch
from .scores import Scores

logger = logging.getLogger(__name__)


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
        except torch.OutOfMemoryError as error:
            if len(part.members) == 1:
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
