"""``python -m benchmarks.processes``: one attribution that several processes share.

Measured with a random model of SmolLM2-135M's shape, one thread a process. Counted for more of
them: the share of its time that a process works, where nothing but waiting for the last is lost.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import loki_kernels as loki
from loki_kernels.attribution.plan import BatchLimits, windows
from loki_kernels.attribution.prompts import WINDOW, Tokens
from loki_kernels.team import share_out

from .shapes import build

_POINTS = 32 * 7  # of a prompt: layers by steps
# The bundled questions, MMLU's test set, and a stream.
_COUNTS = (285, 14_042, 1_000_000)


def _lengths(count: int) -> np.ndarray:
    """Tokens of prompts like MMLU's."""
    drawn = np.random.default_rng(0).lognormal(np.log(110), 0.6, count)
    return drawn.astype(int).clip(16, 1024)


def busy(count: int, processes: int) -> float:
    """The share of the time that processes work until the last is done, by count."""
    prompts = (Tokens(np.empty(length, dtype=np.int64)) for length in _lengths(count))
    limits = BatchLimits.of(torch.device("cuda"), None, processes, points=16_384)
    loads, batches = [0.0] * processes, 0
    for window in windows(prompts, WINDOW if count > 100_000 else None):
        plan = window.batches(batches, limits, _POINTS)
        batches += len(plan)
        share_out([planned.cost(_POINTS) for planned in plan], loads)
    return sum(loads) / (processes * max(loads))


def _attribute(rank: int, size: int, prompts: int, folder: str, layers: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store-{size}", size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=10)
    )
    model = build("SmolLM2-135M", layers).to(torch.device("cpu"), torch.float32)
    ids = [
        {"input_ids": torch.randint(model.config.vocab_size, (length,))}
        for length in _lengths(prompts)
    ]
    # what runs once: checks of kernels and of the model
    loki.attribute(model, ids[:1], share=False, progress=False)
    dist.barrier()
    start = time.perf_counter()
    loki.attribute(model, ids, batch_size=2, keep="counts", progress=False)
    if rank == 0:
        Path(folder, f"seconds-{size}").write_text(str(time.perf_counter() - start))
    dist.destroy_process_group()


def measure(processes: list[int], prompts: int, layers: int) -> Iterator[tuple[int, float]]:
    """(processes, seconds until all have the whole result)."""
    with tempfile.TemporaryDirectory() as folder:
        for size in processes:
            arguments = (size, prompts, folder, layers)
            multiprocessing.start_processes(_attribute, arguments, size, start_method="spawn")
            yield size, float(Path(folder, f"seconds-{size}").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--count", type=int, nargs="*", default=[2, 4, 8, 16, 64])
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores\n| processes | s | times as fast |\n|---|---|---|")
    first = 0.0
    for size, seconds in measure(options.processes, options.prompts, options.layers):
        first = first or seconds
        print(f"| {size} | {seconds:.1f} | {first / seconds:.2f} |", flush=True)
    print(f"\n| processes, by count | {' | '.join(f'{n:,} prompts' for n in _COUNTS)} |")
    print(f"|---|{'---|' * len(_COUNTS)}")
    for size in options.count:
        print(f"| {size} | {' | '.join(f'{busy(n, size):.2f}' for n in _COUNTS)} |", flush=True)


if __name__ == "__main__":
    main()
