"""`gated_product` between the products of an FFN, which memory alone bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..measure import DTYPE
from .suite import Case, Work, normal

SHAPES = {
    "cuda": [{"tokens": n, "width": 14336} for n in (4096, 16384)],
    "cpu": [{"tokens": 512, "width": 1536}],
    "dry": [{"tokens": 3, "width": 5}],
}


def make_case(tokens: int, width: int) -> Case:
    gate, up = normal(2, tokens, width)
    one = DTYPE.itemsize * gate.numel()
    # backward: the gradient, gate and up read; two gradients and the product written
    forward, backward = Work(0, 3 * one), Work(0, 6 * one)
    return Case({"gate": gate, "up": up}, forward, backward, ("gate", "up"))


def _liger(inputs: dict[str, Any]) -> Callable[..., Tensor]:
    from liger_kernel.ops import LigerSiLUMulFunction

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


PEERS = {"liger": _liger}
