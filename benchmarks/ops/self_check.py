"""Every op's self-check, on every backend and dtype that this machine can run; fails if one does.

    python -m benchmarks.ops.self_check [BACKEND ...]

It is what ``compute-sanitizer`` watches in ``benchmarks/gpu.sh``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from loki_kernels import ops
from loki_kernels.ops import _dispatch
from loki_kernels.ops._check import KERNEL_DTYPES


def count_lowest_of_wide_layers(backend: Any, device: torch.device) -> bool:
    """Equal scores of 9,000 nodes: CUDA has another kernel above 8,192, and a path for ties."""
    scores = torch.zeros(2, 2, 9000, device=device)
    scores[:, 1] = torch.arange(9000, device=device) % 7
    counts = [ops.count_lowest(scores, 900, backend=name) for name in (backend, "torch")]
    return torch.equal(*counts)


def sync_rows_of_many(backend: Any, device: torch.device) -> bool:
    """50 matrices, of which CUDA's takes 48 a launch."""
    rows = torch.tensor([2, 0], device=device)
    ones = [torch.ones(2, 5, device=device)] * 50
    weights = [torch.zeros(3, 5, device=device) for _ in range(50)]
    ops.sync_rows(weights, ones, ones, [rows] * 50, backend=backend)
    want = torch.tensor([10.0, 0.0, 10.0], device=device)
    return all(torch.equal(weight.sum(1), want) for weight in weights)


# What the self-checks' small examples do not reach.
LARGE = {"count_lowest": count_lowest_of_wide_layers, "sync_rows": sync_rows_of_many}


def main() -> None:
    failed = 0
    for op in _dispatch._ops:
        for backend in sys.argv[1:] or _dispatch.BACKENDS[:-1]:
            device = _dispatch._device_of(backend)
            reason = _dispatch._no_kernel(op, backend, device)
            if reason is not None:
                print(f"{op:24} {backend:7} {'':9} not run: {reason}")
                continue
            if op in LARGE:
                agrees = LARGE[op](backend, device)
                failed += not agrees
                print(f"{op:24} {backend:7} {'large':9} {'agrees' if agrees else 'differs'}")
            for dtype in KERNEL_DTYPES:
                error = _dispatch._compare(op, backend, device, dtype)
                failed += error is not None
                name = str(dtype).removeprefix("torch.")
                print(f"{op:24} {backend:7} {name:9} {error or 'agrees'}", flush=True)
    if failed:
        raise SystemExit(f"{failed} failed")
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # an error of the last launch shows here


if __name__ == "__main__":
    main()
