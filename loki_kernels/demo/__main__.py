"""``python -m loki_kernels.demo``: a protected update, full fine-tuning and LoRA, on SmolLM2."""

from __future__ import annotations

import argparse
from pathlib import Path

from .main import run_demo

parser = argparse.ArgumentParser(prog="python -m loki_kernels.demo", description=__doc__)
parser.add_argument("--out", default="demo-output", help="folder to write")
parser.add_argument("--quick", action="store_true", help="a smaller run, under 4 minutes")
arguments = parser.parse_args()
run_demo(Path(arguments.out), quick=arguments.quick)
