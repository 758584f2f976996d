from __future__ import annotations

import math

import torch
from torch import Tensor

from .reference import activate, gated_product_reference


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _slope(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        s = torch.sigmoid(gate)
        return s * (1 + gate * (1 - s))
    # d/dg of g * s(2u), u = sqrt(2/pi) (g + 0.044715 g^3): 0.5 (1 + tanh u) = s(2u)
    factor = math.sqrt(2 / math.pi)
    s = torch.sigmoid(2 * factor * (gate + 0.044715 * gate.pow(3)))
    return s * (1 + gate * (1 - s) * (2 * factor * (1 + 3 * 0.044715 * gate.square())))


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    product = gated_product_reference(_wide(gate), _wide(up), activation)
    return product.to(gate.dtype).contiguous()


def backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = gate.dtype
    grad, gate, up = _wide(grad), _wide(gate), _wide(up)
    active = activate(gate, activation)
    to_gate, to_up, product = (
        x.to(dtype).contiguous()
        for x in ((grad * up).mul_(_slope(gate, activation)), grad * active, active * up)
    )
    return to_gate, to_up, product
