"""Which rows to train: the selection rules of arXiv 2505.22120 on attribution scores."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, overload

import numpy as np
import torch
from torch import Tensor

from .attribution import Attribution, AttributionCounts
from .default_device import made_on_cpu
from .errors import check_choice, explained
from .files import atomic_path
from .options import DEFAULT_CRITERION, DEFAULT_QUOTA, Criterion, Strategy
from .ranking import count_extreme, in_parts, most_frequent, rows_per_layer

_FORMAT = "loki-kernels-rows"


class RowSelection(Sequence[Tensor]):
    """The selected rows of each layer's ``down_proj.weight``.

    A sequence of L sorted int64 tensors. ``info`` says how they were chosen and is saved with them.

    Raises:
        ValueError: for rows that are negative, duplicated, or not integers.
    """

    def __init__(
        self, rows: Sequence[Sequence[int] | Tensor], info: dict[str, Any] | None = None
    ) -> None:
        self._rows = tuple(_check_layer(layer, i) for i, layer in enumerate(rows))
        if not self._rows:
            raise ValueError("a row selection needs at least one layer.")
        if not any(len(layer) for layer in self._rows):
            raise ValueError("the row selection is empty in every layer.")
        self.info = dict(info or {})

    @overload
    def __getitem__(self, layer: int) -> Tensor: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, layer: int | slice) -> Tensor | Sequence[Tensor]:
        return self._rows[layer]

    def __len__(self) -> int:
        return len(self._rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RowSelection):
            return NotImplemented
        return len(self) == len(other) and all(
            torch.equal(a, b) for a, b in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        counts = self.counts
        spread = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        return f"RowSelection({len(self)} layers, {spread} rows each)"

    @property
    def counts(self) -> list[int]:
        """How many rows each layer has."""
        return [len(layer) for layer in self._rows]

    def overlap(self, other: RowSelection) -> float:
        """The share of rows two selections have in common: shared rows over the larger count.

        Raises:
            ValueError: if they have another number of layers.
        """
        if len(self) != len(other):
            raise ValueError(
                f"selections of {len(self)} and {len(other)} layers cannot be compared."
            )
        shared = sum(
            int(torch.isin(a, b, assume_unique=True).sum())
            for a, b in zip(self, other, strict=True)
        )
        return shared / max(sum(self.counts), sum(other.counts))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a row file: a JSON object of ``rows`` (list of lists) and how they were chosen."""
        content = {
            "format": _FORMAT,
            **self.info,
            "rows": [layer.tolist() for layer in self._rows],
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RowSelection:
        """Read what `save` wrote, or the plain list of lists of the authors' position files.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not such a file, or its rows are not sound.
        """
        text = Path(path).read_bytes()
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise explained(ValueError(f"{path} is not a row file: {error}.")) from error
        info: dict[str, Any] = {}
        rows = content
        if isinstance(content, dict):
            rows = content.get("rows")
            info = {key: content[key] for key in content if key not in ("rows", "format")}
        if not isinstance(rows, list) or not all(isinstance(layer, list) for layer in rows):
            message = (
                f"{path} is not a row file: it must be a list of lists of row numbers, "
                "or an object that has one under 'rows'."
            )
            raise explained(ValueError(message))
        try:
            return cls(rows, info)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _check_layer(rows: Sequence[int] | Tensor, layer: int) -> Tensor:
    if isinstance(rows, (Tensor, np.ndarray)):
        tensor = torch.as_tensor(rows)
        if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.ndim != 1:
            raise ValueError(
                f"rows of layer {layer} must be integers [k]; they are {tensor.dtype}."
            )
        values = tensor.tolist()
    elif not isinstance(rows, Iterable):
        raise ValueError(f"layer {layer} is {rows!r}; a selection is a list of rows a layer.")
    else:
        values = [int(row) if isinstance(row, np.integer) else row for row in rows]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
            raise ValueError(f"layer {layer} has {value!r} where a row number should be.")
    ordered = sorted(values)
    for low, high in itertools.pairwise(ordered):
        if low == high:
            raise ValueError(f"layer {layer} has row {low} twice.")
    return torch.tensor(ordered, dtype=torch.int64, device="cpu")


@made_on_cpu
def select(
    attribution: Attribution | AttributionCounts | Tensor,
    quota: float | Fraction | None = None,
    strategy: Strategy = "layer_balanced",
    criterion: Criterion | None = None,
    seed: int = 0,
) -> RowSelection:
    """Choose rows by how often their node is among the lowest-scored of a sample.

    ``layer_balanced``: in each layer, the k = floor(quota * D / 100) nodes that are most often
    among a sample's k lowest scores (the paper's layer-balanced strategy).
    ``layer_balanced_highest``: the same with the highest. ``global_lowest``, ``global_highest``:
    the L*k nodes most often among a sample's L*k lowest or highest over all layers together, so
    that layers get unequal shares. ``random``: k rows a layer, by ``seed``. Equal counts are
    decided by the lower index.

    Args:
        attribution: an `Attribution`, scores ``[N, L, D]``, or `AttributionCounts`, which hold
            what ``layer_balanced`` needs for one quota and criterion.
        quota: percentage of rows, in (0, 100]; 10 by default, or that of the counts.
        strategy: see above.
        criterion: ``"magnitude"`` (the default) ranks the scores' absolute values, ``"signed"`` the
            scores themselves, as the paper does; by default that of the counts.
        seed: for ``random``.

    Raises:
        ValueError: for a quota outside (0, 100], an unknown strategy or criterion, NaN scores,
            scores of another shape, or counts of another strategy, quota or criterion.
    """
    check_choice("strategy", strategy, get_args(Strategy))
    counted = attribution if isinstance(attribution, AttributionCounts) else None
    if counted is not None:
        _check_counted(counted, quota, strategy, criterion)
        quota, criterion = counted.quota, counted.criterion
    quota = DEFAULT_QUOTA if quota is None else quota
    criterion = DEFAULT_CRITERION if criterion is None else criterion
    check_choice("criterion", criterion, get_args(Criterion))
    run = {} if isinstance(attribution, Tensor) else attribution.run
    if isinstance(attribution, AttributionCounts):
        scores = attribution.counts[None]
    else:
        scores = attribution.scores if isinstance(attribution, Attribution) else attribution
    if scores.ndim != 3 or 0 in scores.shape:
        raise ValueError(
            f"scores must be [N, L, D], none of them 0; they are {list(scores.shape)}."
        )
    _, layers, width = scores.shape
    k = rows_per_layer(quota, width)
    info = {
        "quota": float(quota),
        "strategy": strategy,
        "criterion": criterion,
        "width": width,
        "site": run.get("site", "down_proj"),
        "attribution": run,
    }
    without, highest = run.get("without_ffn", ()), strategy.endswith("highest")
    rows: Sequence[Any]
    if strategy == "random":
        info["seed"] = seed
        rows = random_rows(layers, width, k, seed)
    elif strategy.startswith("layer_balanced"):
        counts = scores[0]
        if counted is None:
            counts = count_extreme(scores, k, highest, criterion)
        rows = [most_frequent(layer, k) for layer in counts]
    else:
        present = [layer for layer in range(layers) if layer not in without]
        counts = torch.zeros(1, len(present) * width, dtype=torch.int64, device=scores.device)
        for part in in_parts(scores):  # what has no FFN left out of each: it may be a large file
            flat = (part[:, present] if without else part).reshape(len(part), 1, -1)
            counts += count_extreme(flat, len(present) * k, highest, criterion)
        chosen = most_frequent(counts[0], len(present) * k)
        found = {layer: chosen[chosen // width == i] % width for i, layer in enumerate(present)}
        rows = [found.get(layer, []) for layer in range(layers)]
    return RowSelection([[] if i in without else own for i, own in enumerate(rows)], info)


def _check_counted(
    counted: AttributionCounts,
    quota: float | Fraction | None,
    strategy: Strategy,
    criterion: Criterion | None,
) -> None:
    """Raise ValueError if something else is asked for than was counted."""
    quota = None if quota is None else float(quota)
    asked = {"strategy": strategy, "quota": quota, "criterion": criterion}
    have = {"strategy": "layer_balanced", "quota": counted.quota, "criterion": counted.criterion}
    for name, value in asked.items():
        if value is not None and value != have[name]:
            raise ValueError(
                f"these counts are for {name}={have[name]!r}, not {value!r}; attribute with "
                "keep='scores' to choose afterwards."
            )


def random_rows(layers: int, width: int, k: int, seed: int) -> list[list[int]]:
    """k of ``width`` rows for each layer; the same on every machine."""
    generator = random.Random(seed)
    return [sorted(generator.sample(range(width), k)) for _ in range(layers)]
