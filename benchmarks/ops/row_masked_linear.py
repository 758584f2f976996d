"""One patched layer, forward and backward, against the other ways to train some of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loki_kernels import LokiLinear
from loki_kernels.ranking import rows_per_layer

from ..measure import DEVICE, DTYPE, DTYPE_NAME, attempt, check, floor, interleave, pair
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
    for shape, quota in cases(scope):
        with attempt(f"row_masked_linear, {' x '.join(map(str, shape))}, quota {quota:g}"):
            yield from _measure(shape, quota, scope)


def _measure(shape: tuple[int, int, int], quota: float, scope: str) -> Iterator[dict[str, Any]]:
    tokens, in_features, out_features = shape
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=False, device=DEVICE, dtype=DTYPE)
    k = rows_per_layer(quota, out_features)
    rows = torch.randperm(out_features)[:k].sort().values.to(DEVICE)
    x = torch.randn(tokens, in_features, device=DEVICE, dtype=DTYPE, requires_grad=True)
    gradient = torch.randn(tokens, out_features, device=DEVICE, dtype=DTYPE)
    makers = PEERS | {"ours": LokiLinear}
    layers = _checked(makers, linear, rows, x, gradient)
    if "ours" not in layers:  # that is said
        return

    def step(layer: nn.Module) -> None:
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


def _checked(
    makers: Mapping[str, Callable[..., nn.Module]],
    linear: nn.Linear,
    rows: Tensor,
    x: Tensor,
    gradient: Tensor,
) -> dict[str, nn.Module]:
    """The layers whose output, dX and gradient of the rows are those of full training."""
    tolerance = 1e-4 if torch.float32 == DTYPE else 2e-2
    full = _results(peers.FullLinear(linear, rows), x, gradient, rows)
    layers = {}
    for name, make in makers.items():
        with attempt(f"row_masked_linear, {name}"):
            layer = make(linear, rows)
            result = _results(layer, x, gradient, rows)
            for what, got, want in zip(("y", "dX", "dW"), result, full, strict=True):
                check(f"{what} of {name}", got, want, tolerance)
            layers[name] = layer
    return layers


def _results(
    layer: nn.Module, x: Tensor, gradient: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, dX and the gradient of the rows."""
    layer.zero_grad()
    x.grad = None
    y = layer(x)
    y.backward(gradient)
    (weight,) = (p.grad for p in layer.parameters() if p.grad is not None)
    assert x.grad is not None
    weight = weight[rows] if len(weight) == gradient.shape[1] else weight
    return y.detach(), x.grad.clone(), weight.clone()
