"""Counting the lowest scores: this installation's `count_lowest` against torch's ops and NumPy.

Every peer does the whole of ``select``'s counting: for each sample and layer, the k lowest of D.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from loki_kernels import backends
from loki_kernels.ops import count_lowest

from .results import append

# samples, layers, nodes: tiny, SmolLM2-135M, Llama-3.1-8B, all its layers together (global_lowest)
SHAPES = [(1, 1, 64), (1, 1, 4096), (64, 30, 576), (16, 32, 4096), (16, 1, 131072)]


def _numpy(scores: Tensor, k: int) -> Tensor:
    array = scores.numpy()
    counts = np.zeros(array.shape[1:], dtype=np.int64)
    for sample in array:
        for layer, nodes in enumerate(sample):
            counts[layer, np.argsort(nodes)[:k]] += 1  # NumPy's fastest; there are no ties
    return torch.from_numpy(counts)


def _torch(scores: Tensor, k: int) -> Tensor:
    return count_lowest(scores, k, backend="torch")


def compare(shape: tuple[int, int, int], runs: int) -> dict:
    """Check the counts agree, then time all three, interleaved."""
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    k = shape[-1] // 10
    contenders: dict[str, Callable[[Tensor, int], Tensor]] = {
        "ours": count_lowest,
        "torch": _torch,
        "numpy": _numpy,
    }
    want = _numpy(scores, k)
    for name, count in contenders.items():
        if not torch.equal(count(scores, k), want):
            raise SystemExit(f"{name} counts otherwise at {shape}; a wrong result is not timed")
    timers = {
        name: Timer(
            "count(scores, k)",
            globals={"count": count, "scores": scores, "k": k},
            num_threads=torch.get_num_threads(),
        )
        for name, count in contenders.items()
    }
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(runs):
        for name, timer in timers.items():
            times[name].append(timer.blocked_autorange(min_run_time=0.05).median)
    median = {name: statistics.median(t) for name, t in times.items()}
    return {
        "suite": "selection",
        "shape": list(shape),
        "k": k,
        "runs": runs,
        "ours_s": median["ours"],
        "peers_s": {name: median[name] for name in ("torch", "numpy")},
        "ratios": {name: median[name] / median["ours"] for name in ("torch", "numpy")},
        "ours_min_max": [min(times["ours"]), max(times["ours"])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--dry-run", action="store_true", help="the smallest shape, once")
    arguments = parser.parse_args()
    if arguments.dry_run:
        print(compare(SHAPES[0], runs=1))
        return
    count_lowest(torch.zeros(1, 1, 1), 1)
    print("count_lowest on the CPU:", backends()["count_lowest"]["cpp"])
    for shape in SHAPES:
        row = compare(shape, arguments.runs)
        append(row)
        ratios = ", ".join(f"{name} {ratio:.1f}" for name, ratio in row["ratios"].items())
        print(f"{shape}, k = {row['k']}: {row['ours_s'] * 1e3:.3f} ms; times as long: {ratios}")


if __name__ == "__main__":
    main()
