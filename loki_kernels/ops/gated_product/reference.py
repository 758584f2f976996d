from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from .._example import Draw, Example


def activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh")


def gated_product_reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    return activate(gate, activation) * up


def example(draw: Draw) -> Example:
    return {"gate": draw.normal(33, 129), "up": draw.normal(33, 129)}, ("gate", "up")
