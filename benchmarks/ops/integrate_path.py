"""`integrate_path` of one layer's gradients for 16 prompts, and of all 32 layers' at once."""

from __future__ import annotations

import torch

from ..measure import DEVICE, DTYPE
from .suite import Case, Work, normal

SHAPES = {
    "cuda": [{"samples": n, "points": 7, "width": 4096} for n in (16, 16 * 32)],
    "cpu": [{"samples": 240, "points": 7, "width": 576}],
    "dry": [{"samples": 3, "points": 2, "width": 5}],
}


def make_case(samples: int, points: int, width: int) -> Case:
    inputs = {
        "gradients": normal(samples, points, width),
        "weights": torch.rand(points, device=DEVICE),
        "z": normal(samples, width),
    }
    # the gradients and z read, float32 sums written
    moved = samples * width * ((points + 1) * DTYPE.itemsize + 4)
    return Case(inputs, Work(0, moved))
