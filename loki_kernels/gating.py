"""How a gated MLP computes ``down(act(gate) * up)``, found by structure and by values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from .ops import gated_product
from .ops.gated_product import Activation
from .structure import DownProjection, alike, has_hooks, is_linear_like


@dataclass(frozen=True)
class Gating:
    """How an MLP is ``down(act(gate) * up)``: of ``gate(x)`` and ``up(x)``, or of two halves.

    Attributes:
        gate: name of the linear that gives the gate; of the one that gives both if ``up`` is None.
        up: name of the linear that gives the factor, or None.
        gate_first: whether the gate is the first half, where ``up`` is None.
        activation: applied to the gate.
    """

    gate: str
    up: str | None
    gate_first: bool
    activation: Activation

    def split(self, mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """(gate, up), ``[..., intermediate_size]`` each."""
        gate: Tensor = getattr(mlp, self.gate)(x)
        if self.up is not None:
            return gate, getattr(mlp, self.up)(x)
        first, second = gate.chunk(2, dim=-1)
        return (first, second) if self.gate_first else (second, first)


def find_gating(down_proj: DownProjection, *, to_train: bool = False) -> Gating | str:
    """How the MLP around a down-projection is gated, or why it cannot be fused.

    The linears and the activation are found by structure and known by what they compute: the
    activation by its values, which linear is the gate by the MLP's output on random input; that is
    compared in training mode too where the MLP is to be trained.
    """
    mlp = down_proj.parent
    # linears of any library, with the features and the weight of torch's
    down: Any = down_proj.module
    linears: dict[str, Any] = {
        n: m for n, m in mlp.named_children() if is_linear_like(m) and m is not down
    }
    others = [m for m in mlp.children() if not is_linear_like(m)]
    own_state = [*mlp.parameters(recurse=False), *mlp.buffers(recurse=False)]
    if own_state or any(True for m in others for _ in m.parameters()):
        return "it has parameters besides its linears"
    if has_hooks(mlp):
        return "it has hooks"
    if down.weight.is_meta:
        return "its weights are not loaded"
    dropouts = [m for m in others if isinstance(m, nn.Dropout)]
    if any(m.p > 0 for m in dropouts):
        return "it has dropout"
    activations = [m for m in others if m not in dropouts]
    activation = _known_activation(activations[0]) if len(activations) == 1 else None
    if activation is None:
        return "its activation is not one SiLU or tanh-approximated GELU"
    if has_hooks(activations[0]):
        return "its activation has hooks"
    candidates = list(_possible_gatings(linears, down.in_features, activation))
    unknown = "it does not compute down(act(gate(x)) * up(x))"
    if not candidates:  # its forward pass may not even take one argument
        return unknown
    generator = torch.Generator().manual_seed(0)
    weight = next(iter(linears.values())).weight
    x = torch.randn(4, weight.shape[1], generator=generator, device="cpu")
    # Large rows too, in which a clamped gate shows; in float16 a product of two must not overflow.
    sizes = [1, 3, 10, 30] if weight.dtype == torch.float16 else [1, 3, 30, 100]
    x = (x * torch.tensor(sizes)[:, None]).to(weight.device, weight.dtype)
    entering: list[Tensor] = []
    hook = down.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    try:
        leaving = _output(mlp, x, training=False)
    finally:
        hook.remove()
    with torch.no_grad():
        for gating in candidates if len(entering) == 1 else ():
            product = gated_product(*gating.split(mlp, x), activation)
            # Zeros, as a new block's, would be equal by any formula.
            if (
                (product != 0).any()
                and _equal(product, entering[0])
                and _equal(down(product), leaving)
            ):
                if to_train and not _equal(_output(mlp, x, training=True), leaving):
                    return "it computes something else in training mode, as dropout does"
                return gating
    return unknown


@torch.no_grad()
def _output(mlp: nn.Module, x: Tensor, *, training: bool) -> Tensor:
    """Of a mode of the MLP alone, by which its forward pass may call a function such as dropout."""
    on_cuda = [x.device] if x.device.type == "cuda" else []
    before = mlp.training
    try:
        mlp.training = training
        with torch.random.fork_rng(on_cuda):
            output: Tensor = mlp(x)
    finally:
        mlp.training = before
    return output


def _equal(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and alike(got, want, want.dtype)


def _known_activation(activation: nn.Module) -> Activation | None:
    x = torch.cat([torch.linspace(-6, 6, 97), torch.tensor([-99.0, -25, -12, 9, 12, 25, 99])])
    for name in ("silu", "gelu_tanh"):
        want = gated_product(x, torch.ones_like(x), name)
        # exact GELU is up to 5e-4 away from its tanh approximation
        if torch.allclose(activation(x), want, rtol=1e-5, atol=1e-5):
            return name
    return None


def _possible_gatings(
    linears: dict[str, Any], intermediate_size: int, activation: Activation
) -> Iterator[Gating]:
    widths = [linear.out_features for linear in linears.values()]
    if widths == [2 * intermediate_size]:
        (name,) = linears
        yield Gating(name, None, True, activation)
        yield Gating(name, None, False, activation)
    elif widths == [intermediate_size] * 2:
        for gate, up in permutations(linears):
            yield Gating(gate, up, True, activation)
