"""Run a Python program that knows LoKI adapters, because PEFT does.

    python -m loki_kernels.launch llamafactory.cli train config.yaml
    torchrun --nproc-per-node 8 -m loki_kernels.launch llamafactory.launcher config.yaml

The first argument is the module that ``python -m`` would run; it sees the rest as its own.
"""

from __future__ import annotations

import runpy
import sys

import loki_kernels.peft  # noqa: F401


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m loki_kernels.launch MODULE [ARGUMENT ...]")
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
