"""`count_lowest` of the scores of 16 prompts and of 285, a tenth of each layer's nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..measure import DEVICE
from ..selection import count_by_topk, count_indices
from .suite import Case, Work

SHAPES = {
    "cuda": [
        {"samples": 16, "layers": 32, "width": 4096},
        {"samples": 285, "layers": 32, "width": 4096},
    ],
    "cpu": [{"samples": 8, "layers": 30, "width": 576}],
    "dry": [{"samples": 2, "layers": 3, "width": 64}],
}


def make_case(samples: int, layers: int, width: int) -> Case:
    # Normal quantiles in random order: of equal scores torch.topk may take another.
    quantiles = torch.special.ndtri((torch.arange(width, device=DEVICE) + 0.5) / width)
    scores = quantiles[torch.rand(samples, layers, width, device=DEVICE).argsort(-1)]
    moved = 4 * scores.numel() + 8 * layers * width
    inputs = {"scores": scores, "k": width // 10}
    return Case(inputs, Work(0, moved), peers={"topk": count_by_topk})


def _flashinfer(inputs: dict[str, Any]) -> Callable[..., Tensor]:
    """Its kernels are compiled by nvcc when they are first called."""
    from flashinfer import top_k

    def count(scores: Tensor, k: int) -> Tensor:
        rows = scores.neg().flatten(0, 1)  # it takes the largest, of two dimensions
        return count_indices(top_k(rows, k)[1].unflatten(0, scores.shape[:2]), scores.shape[-1])

    return count


PEERS = {"flashinfer": _flashinfer}
