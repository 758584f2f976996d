"""`target_probability` with its gradient: one prompt's points, a chunk's and 16 prompts'."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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


def _liger(inputs: dict[str, Any], whole: bool = False) -> Callable[..., Tensor]:
    """Losses a token, whose gradient its backward pass forms from logits computed anew.

    Its sums of losses have their gradient formed in the forward pass, as ours is; but a sum says
    no token's probability.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    options = {"reduction": "none"}
    if whole:  # by default it takes as many chunks as a row of logits is wider than one of hidden
        vocabulary, width = inputs["weight"].shape
        options["chunk_mem_const"] = -(-vocabulary // width)

    def log_probability(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -liger_fused_linear_cross_entropy(hidden, weight, target, **options)

    return log_probability


def _torch(inputs: dict[str, Any]) -> Callable[..., Tensor]:
    """torch's own, since 2.12 or so; in chunks, which keep the gradient as ours does."""
    linear_cross_entropy = functional.linear_cross_entropy
    options = torch.nn.LinearCrossEntropyOptions()

    def log_probability(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, target, reduction="none", options=options)

    return log_probability


PEERS = {
    "liger": _liger,
    "liger_one_chunk": partial(_liger, whole=True),
    "torch_linear_cross_entropy": _torch,
}
PEER_RESULT = 2  # the log-probability, which is all they give
