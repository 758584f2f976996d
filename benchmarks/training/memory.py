"""Peak memory of a training step, each method in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..measure import DEVICE, attempt
from ..shapes import MODELS, build
from .step import cases, describe, make_step, prepare

METHODS = ("ours", "ours_protected", "full", "lora")


def run(scope: str) -> Iterator[dict[str, Any]]:
    for name, layers, tokens, _ in cases(scope):
        case, peaks = describe(name, layers, tokens), {}
        for method in METHODS:
            command = [sys.executable, "-m", "benchmarks.training.memory", method, name]
            command += [str(layers or MODELS[name]["num_hidden_layers"]), str(tokens)]
            with attempt(f"memory, {name}, {method}"):
                process = subprocess.run(command, capture_output=True, text=True)
                if process.returncode != 0:
                    raise SystemExit(f"{' '.join(command)}:\n{process.stderr[-2000:]}")
                peaks[method] = int(process.stdout.splitlines()[-1])
            if method != "ours" and {"ours", method} <= peaks.keys():  # at once: time may run out
                yield {
                    "suite": "memory",
                    "case": case,
                    "peer": method,
                    "ours_bytes": peaks["ours"],
                    "peer_bytes": peaks[method],
                }


def measure_peak(method: str, name: str, layers: int | None, tokens: int) -> int:
    """Peak bytes over three steps, beyond what python, torch and transformers take."""
    on_gpu = DEVICE.type == "cuda"
    before = 0 if on_gpu else resident("peak")  # which a sandboxed kernel may not tell
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model = prepare(method, build(name, layers))
    step = make_step(model, tokens)
    for _ in range(3):
        step()
    return (torch.cuda.max_memory_allocated() if on_gpu else resident("peak")) - before


def resident(when: str) -> int:
    """Bytes of this process, ``"now"`` or at its ``"peak"``.

    getrusage's maximum would be the parent's, where that was larger.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    name = {"now": "VmRSS", "peak": "VmHWM"}[when]
    found = re.search(rf"{name}:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    method, name, layers, tokens = sys.argv[1:]
    print(measure_peak(method, name, int(layers), int(tokens)))
