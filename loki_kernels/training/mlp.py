"""`FusedMLP`: a gated MLP that does not keep its activation product for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..gating import Gating
from ..ops import gated_product
from ..ops.gated_product.torch_impl import forward as traceable_gated_product
from ..structure import has_hooks
from .linear import LokiLinear


class FusedMLP(nn.Module):
    """An MLP's own modules under their own names, its activation and `LokiLinear` as one op."""

    def __init__(self, mlp: nn.Module, down: str, gating: Gating) -> None:
        super().__init__()
        self.gating = gating
        self.down = down
        for name, child in mlp.named_children():
            self.add_module(name, child)
        linears = {gating.gate, gating.up, down}
        # the one that `find_gating` has found, which is called where it has hooks
        (self._activation,) = (
            name
            for name, child in mlp.named_children()
            if name not in linears and not isinstance(child, nn.Dropout)
        )
        self.training = mlp.training

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gating.split(self, x)
        layer: LokiLinear = getattr(self, self.down)
        activation = self.gating.activation
        module = getattr(self, self._activation)
        if has_hooks(module):
            unfused: Tensor = layer(module(gate) * up)
            return unfused
        # The fused op works on a written weight, and hooks expect an ordinary call. Below the first
        # trained row nothing is differentiated, and keeping gate and up would cost memory.
        differentiated = gate.requires_grad or up.requires_grad
        if layer.writes_rows and differentiated and not has_hooks(layer):
            return layer.forward_gated(gate, up, activation)
        # The compiler fuses what it sees through, but keeps it, since a product reads it in the
        # backward pass (torch 2.13's partitioner, by reading): no memory is saved there.
        product = traceable_gated_product if torch.compiler.is_compiling() else gated_product
        y: Tensor = layer(product(gate, up, activation))
        return y

    def extra_repr(self) -> str:
        return f"activation={self.gating.activation}"
