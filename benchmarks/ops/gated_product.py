"""`gated_product` between the products of an FFN, which memory alone bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..measure import DEVICE, DTYPE
from .suite import Case, Work, normal

SHAPES = {
    "cuda": [{"tokens": n, "width": 14336} for n in (4096, 16384)],
    "cpu": [{"tokens": 512, "width": 1536}],
    "dry": [{"tokens": 3, "width": 5}],
}


def eager(gate: Tensor, up: Tensor) -> Tensor:
    """What models do, in their dtype; the backend torch computes in float32."""
    return functional.silu(gate) * up


def peers() -> dict[str, Callable[..., Tensor]]:
    if DEVICE.type == "cpu":  # a C++ compiler takes longer than all of them
        return {"eager": eager}
    from torch._functorch import config

    config.donated_buffer = False  # the backward pass runs again on what one forward pass has kept
    return {"eager": eager, "compiled": torch.compile(eager, dynamic=False)}


def make_case(tokens: int, width: int) -> Case:
    gate, up = normal(2, tokens, width)
    one = DTYPE.itemsize * gate.numel()
    # backward: the gradient, gate and up read; two gradients and the product written
    forward, backward = Work(0, 3 * one), Work(0, 6 * one)
    return Case({"gate": gate, "up": up}, forward, backward, ("gate", "up"), peers())


def _liger(inputs: dict[str, Any]) -> Callable[..., Tensor]:
    from liger_kernel.ops import LigerSiLUMulFunction

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


PEERS = {"liger": _liger}
