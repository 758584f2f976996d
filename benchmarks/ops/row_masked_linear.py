"""One patched layer, forward and backward, against the other ways to train some of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from loki_kernels import LokiLinear
from loki_kernels.ranking import rows_per_layer

from ..measure import DEVICE, DTYPE, DTYPE_NAME, check, floor, interleave, pair
from ..training import peers

PEERS = {
    "full": peers.FullLinear,
    "split_cat_gather": peers.SplitLinear,
    "masked_gradient": peers.MaskedLinear,
    "trainable_tokens": peers.trainable_tokens,
    "delta_form": peers.delta_form,
}
# tokens, in_features, out_features
SMALL, LARGE = (1024, 1536, 576), (256, 14336, 4096)


def cases(scope: str) -> Iterator[tuple[tuple[int, int, int], float]]:
    if scope == "dry":
        yield (16, 24, 8), 10.0
        return
    shapes = [SMALL, LARGE] if DEVICE.type == "cpu" else [(4096, 14336, 4096)]
    for shape in shapes:
        yield shape, 10.0
    if scope == "quick":
        return
    for quota in (1.0, 5.0, 20.0, 30.0):
        yield shapes[0], quota
    _, in_features, out_features = shapes[0]
    for tokens in (512, 2048, 4096, 16384):
        yield (tokens, in_features, out_features), 10.0


def run(scope: str) -> Iterator[dict[str, Any]]:
    for (tokens, in_features, out_features), quota in cases(scope):
        torch.manual_seed(0)
        linear = nn.Linear(in_features, out_features, bias=False, device=DEVICE, dtype=DTYPE)
        k = rows_per_layer(quota, out_features)
        rows = torch.randperm(out_features)[:k].sort().values.to(DEVICE)
        layers = {name: peer(linear, rows) for name, peer in PEERS.items()}
        layers["ours"] = LokiLinear(linear, rows)
        x = torch.randn(tokens, in_features, device=DEVICE, dtype=DTYPE, requires_grad=True)
        gradient = torch.randn(tokens, out_features, device=DEVICE, dtype=DTYPE)
        _check(layers, x, gradient, rows)

        def step(layer: nn.Module, x: Tensor = x, gradient: Tensor = gradient) -> None:
            layer.zero_grad()
            x.grad = None
            layer(x).backward(gradient)

        times = interleave(
            {name: lambda layer=layer: step(layer) for name, layer in layers.items()},
            rounds=3 if scope == "dry" else 9 if in_features > SMALL[1] or tokens > 4096 else 25,
        )
        size = DTYPE.itemsize
        dense = 2 * tokens * in_features * out_features
        moved = size * (
            2 * in_features * out_features  # the weight, twice
            + 3 * tokens * in_features  # x twice, dX
            + 3 * tokens * out_features  # y, dY twice
            + k * in_features
        )
        case = {
            "tokens": tokens,
            "in_features": in_features,
            "out_features": out_features,
            "quota": quota,
            "dtype": DTYPE_NAME,
        }
        yield from pair(
            "row_masked_linear",
            case,
            times,
            floor_s=floor(2 * dense + dense * k / out_features, moved),
        )


def _check(layers: dict[str, nn.Module], x: Tensor, gradient: Tensor, rows: Tensor) -> None:
    """Output, dX and the rows' gradient agree with the layer that is trained in full."""
    results = {}
    for name, layer in layers.items():
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.backward(gradient)
        (weight,) = (p.grad for p in layer.parameters() if p.grad is not None)
        assert x.grad is not None
        weight = weight[rows] if len(weight) == layers["full"].weight.shape[0] else weight
        results[name] = (y.detach(), x.grad.clone(), weight.clone())
    tolerance = 1e-4 if torch.float32 == DTYPE else 2e-2
    for name, result in results.items():
        for what, got, want in zip(("y", "dX", "dW"), result, results["full"], strict=True):
            check(f"{what} of {name}", got, want, tolerance)
