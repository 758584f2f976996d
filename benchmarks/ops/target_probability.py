"""`target_probability` with its gradient: one prompt's points, a chunk's and 16 prompts'."""

from __future__ import annotations

import torch

from ..measure import DEVICE, DTYPE
from .suite import Case, Work, normal

SHAPES = {
    "cuda": [{"points": n, "width": 4096, "vocabulary": 128256} for n in (225, 1046, 3600)],
    "cpu": [{"points": 32, "width": 576, "vocabulary": 8192}],
    "dry": [{"points": 3, "width": 8, "vocabulary": 40}],
}


def make_case(points: int, width: int, vocabulary: int) -> Case:
    inputs = {
        "hidden": normal(points, width),
        "weight": normal(vocabulary, width) / width**0.5,
        "target": torch.randint(0, vocabulary, (points,), device=DEVICE),
    }
    # The forward pass forms the gradient too: two products, each of which reads the head.
    forward = Work(4 * points * width * vocabulary, 2 * DTYPE.itemsize * vocabulary * width)
    backward = Work(0, 2 * DTYPE.itemsize * points * width)
    return Case(inputs, forward, backward, ("hidden",))
