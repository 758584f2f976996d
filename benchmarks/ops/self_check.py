"""Every op's self-check, on every backend and dtype that this machine can run; fails if one does.

    python -m benchmarks.ops.self_check [BACKEND ...]

It is what ``compute-sanitizer`` watches in ``benchmarks/gpu.sh``.
"""

from __future__ import annotations

import sys

import torch

from loki_kernels.ops import _dispatch
from loki_kernels.ops._check import KERNEL_DTYPES


def main() -> None:
    failed = 0
    for op in _dispatch._ops:
        for backend in sys.argv[1:] or _dispatch.BACKENDS[:-1]:
            device = _dispatch._device_of(backend)
            reason = _dispatch._no_kernel(op, backend, device)
            if reason is not None:
                print(f"{op:24} {backend:7} {'':9} not run: {reason}")
                continue
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
