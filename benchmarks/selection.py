"""Counting the lowest scores: `count_lowest` as it runs here, against torch's ops and NumPy.

Every peer does the whole of ``select``'s counting: for each sample and layer, the k lowest of D.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loki_kernels.ops import count_lowest

from .measure import DEVICE, attempt, floor, interleave, pair


def cases(scope: str) -> Iterator[tuple[tuple[int, int, int], float]]:
    """Samples, layers, nodes; quota."""
    if scope == "dry":
        yield (2, 3, 64), 10.0
        return
    yield (16, 32, 4096), 10.0  # Llama-3.1-8B
    yield (64, 30, 576), 10.0  # SmolLM2-135M
    if scope == "quick":
        return
    yield (1, 1, 64), 10.0
    yield (16, 1, 131072), 10.0  # all layers together: global_lowest
    yield from (((16, 32, width), 10.0) for width in (512, 1024, 2048, 8192, 16384))
    yield from (((samples, 32, 4096), 10.0) for samples in (1, 4, 64))
    yield from (((16, 32, 4096), quota) for quota in (1.0, 5.0, 20.0, 30.0))


def _numpy(scores: Tensor, k: int) -> Tensor:
    array = scores.cpu().numpy()
    counts = np.zeros(array.shape[1:], dtype=np.int64)
    for sample in array:
        for layer, nodes in enumerate(sample):
            counts[layer, np.argsort(nodes)[:k]] += 1  # its fastest sort; there are no ties
    return torch.from_numpy(counts)


def count_by_topk(scores: Tensor, k: int) -> Tensor:
    """`count_lowest` of scores that differ, by `torch.topk`."""
    return count_indices(scores.topk(k, dim=-1, largest=False).indices, scores.shape[-1])


def count_indices(indices: Tensor, width: int) -> Tensor:
    """How many of the samples' lists ``[N, L, k]`` each of ``width`` nodes is in."""
    counts = torch.zeros(indices.shape[1], width, dtype=torch.int64, device=indices.device)
    ones = torch.ones((), dtype=torch.int64, device=indices.device)
    for sample in indices:
        counts.scatter_add_(1, sample, ones.expand_as(sample))
    return counts


def run(scope: str) -> Iterator[dict[str, Any]]:
    for shape, quota in cases(scope):
        with attempt(f"selection, {shape}, quota {quota:g}"):
            yield from _measure(shape, quota, 2 if scope == "dry" else 15)


def _measure(shape: tuple[int, int, int], quota: float, rounds: int) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator).to(DEVICE)
    k = max(1, int(shape[-1] * quota / 100))
    contenders = {
        "ours": count_lowest,
        "torch_ops": partial(count_lowest, backend="torch"),
        "topk": count_by_topk,
        "numpy_argsort": _numpy,
    }
    want = _numpy(scores, k)
    for name, count in contenders.items():
        if not torch.equal(count(scores, k).cpu(), want):
            raise SystemExit(f"{name} counts otherwise; a wrong result is not timed")
    times = interleave(
        {name: partial(count, scores, k) for name, count in contenders.items()}, rounds
    )
    samples, layers, width = shape
    case = {"samples": samples, "layers": layers, "nodes": width, "quota": quota}
    moved = 4 * scores.numel() + 8 * layers * width  # scores once, counts once
    yield from pair("selection", case, times, floor_s=floor(0, moved))
