"""``python -m benchmarks.training.protected``: what a protected update costs a layer's step.

One layer of SmolLM2-135M's shape, forward and backward, with as many of its input directions
protected as `loki_kernels.estimate_protection` takes, against the same rows unprotected and the
layer trained in full. And generating with all rows of SmolLM2-135M protected, whose update is
formed once, against forming it at every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from loki_kernels import LokiLinear, patch
from loki_kernels.demo.model import load_smollm2
from loki_kernels.protection.moments import default_directions
from loki_kernels.ranking import rows_per_layer

from ..measure import DEVICE, DTYPE, DTYPE_NAME, interleave, pair
from .peers import FullLinear
from .step import made_up_protection

IN, OUT = 1536, 576
PROTECTED = default_directions(IN)


def run(tokens: Sequence[int], quotas: Sequence[float], rounds: int) -> Iterator[dict[str, Any]]:
    for count in tokens:
        for quota in quotas:
            torch.manual_seed(0)
            linear = nn.Linear(IN, OUT, bias=False, device=DEVICE, dtype=DTYPE)
            rows = torch.arange(rows_per_layer(quota, OUT), device=DEVICE)
            directions = torch.linalg.qr(torch.randn(IN, PROTECTED))[0].to(DEVICE)
            layers = {
                "ours": LokiLinear(linear, rows, directions=directions),
                "unprotected": LokiLinear(linear, rows),
                "full": FullLinear(linear, rows),
            }
            x = torch.randn(count, IN, device=DEVICE, dtype=DTYPE, requires_grad=True)
            gradient = torch.randn(count, OUT, device=DEVICE, dtype=DTYPE)

            def step(layer: nn.Module, x: Any = x, gradient: Any = gradient) -> None:
                layer.zero_grad()
                x.grad = None
                layer(x).backward(gradient)

            times = interleave({n: lambda m=m: step(m) for n, m in layers.items()}, rounds)
            case = {"tokens": count, "quota": quota, "directions": PROTECTED, "dtype": DTYPE_NAME}
            yield from pair("protected_linear", case, times)


def generate(tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of a prompt of 8 tokens and so many after it, by how often the update is formed."""
    model = load_smollm2()[0].to(DEVICE)
    patch(model, quota=100, protect=made_up_protection(model))
    ids = torch.arange(8, 16, device=DEVICE)[None]
    given = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    ways = {
        "once": lambda: model.generate(ids, **given),
        "each": lambda: type(model).generate(model, ids, **given),
    }
    return interleave(ways, rounds)


def main() -> None:
    for record in run((1024, 8192), (10.0, 100.0), 15):
        case = " ".join(f"{name}={value}" for name, value in record["case"].items())
        ours, peer = (1e3 * record[f"{who}_s"]["p50"] for who in ("ours", "peer"))
        print(f"{case}: protected {ours:.1f} ms, {record['peer']} {peer:.1f} ms", flush=True)
    times = {way: torch.tensor(seconds).median() for way, seconds in generate(16, 5).items()}
    print("16 tokens generated, update formed", *(f"{w}: {t:.2f} s" for w, t in times.items()))


if __name__ == "__main__":
    main()
