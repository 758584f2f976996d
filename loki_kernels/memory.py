"""How much memory a training takes, by count."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops._directions import padded_count
from .placement import accelerator, free_bytes
from .protection.moments import default_directions
from .ranking import rows_per_layer
from .sharding import is_distributed
from .structure import DownProjection, Structure

logger = logging.getLogger(__name__)

_QUOTAS = (50.0, 30.0, 20.0, 10.0, 5.0)  # that are offered where more has no room


class TrainingMemory(NamedTuple):
    """Bytes beside the model and its activations, with AdamW.

    Attributes:
        update: what is trained, its gradient and two moments, in float32 (float64 of a float64
            weight).
        base: the rows as they were, in the weight's dtype.
        directions: that are left alone, likewise, with the zeros that products are padded by.
    """

    update: int
    base: int
    directions: int

    def __str__(self) -> str:
        return f"{sum(self) / 1e9:.1f} GB"


def training_memory(
    layers: Iterable[tuple[DownProjection, int]],
    *,
    protected: bool | Mapping[str, Tensor],
    rank: int | None = None,
) -> TrainingMemory:
    """Of so many rows of each down-projection, of every expert of one that is of experts.

    ``protected`` are the directions by layer, or whether as many are left alone as by default.
    """
    update = base = directions = 0
    for down_proj, rows in layers:
        if not rows:
            continue
        experts, width = math.prod(down_proj.experts), down_proj.in_features
        size = down_proj.weight.element_size()
        numbers = rows * width if rank is None else rank * (rows + width)
        update += 4 * max(4, size) * experts * numbers
        base += size * experts * rows * width
        if isinstance(protected, bool):
            count = default_directions(width) if protected else 0
        else:
            count = protected[down_proj.name].shape[-1]
        directions += size * experts * width * padded_count(count)
    return TrainingMemory(update, base, directions)


def memory_of_quota(
    projections: Iterable[DownProjection],
    hidden_size: int,
    quota: float,
    *,
    protected: bool,
    rank: int | None = None,
) -> TrainingMemory:
    """Of a percentage of each layer's rows."""
    rows = rows_per_layer(quota, hidden_size)
    return training_memory(((d, rows) for d in projections), protected=protected, rank=rank)


def weights_size(model: nn.Module) -> int:
    """Bytes of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def warn_of_memory(
    structure: Structure,
    rows: Any,
    quota: float,
    *,
    protected: bool,
    rank: int | None,
    keeps_rows: bool = True,
) -> None:
    """Say before minutes of estimating that a training has no room, and what has.

    Of rows that are not named, and one process: several may shard the weights afterwards.
    ``keeps_rows``: whether the rows as they were are kept, which PEFT's layers do not.
    """
    if rows is not None or is_distributed():
        return
    weights = [getattr(d.module, d.parameter, None) for d in structure.projections()]
    devices = {weight.device for weight in weights if isinstance(weight, Tensor)}
    # GPTQ's layers have no weight, and are refused by those who want one
    if None in weights or len(devices) > 1 or devices & {torch.device("meta")}:
        return
    (device,) = devices
    found = accelerator() if device.type == "cpu" else (device, free_bytes(device))
    if found is None or found[1] is None:
        return
    own = weights_size(structure.causal_lm) if device.type == "cpu" else 0
    device, free = found[0], found[1] - own

    def of(percentage: float) -> TrainingMemory:
        memory = memory_of_quota(
            structure.projections(),
            structure.hidden_size,
            percentage,
            protected=protected,
            rank=rank,
        )
        return memory if keeps_rows else memory._replace(base=0)

    if sum(of(quota)) <= free:
        return
    fits = [other for other in _QUOTAS if other < quota and sum(of(other)) <= free]
    logger.warning(
        "training %g %% of the rows takes %s beside the model and its activations with AdamW, and "
        "%s has %.1f GB for it%s",
        quota,
        of(quota),
        device,
        max(free, 0) / 1e9,
        f"; quota={fits[0]:g}, protect={protected} takes {of(fits[0])}" if fits else "",
    )
