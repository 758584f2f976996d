"""``python -m benchmarks.frontier.rounded``: what a training is once its weights are bfloat16.

Each of some arms is trained once in float32, from the base's bfloat16 values, and measured as it is
and as a checkpoint of 16 bits has it: merged, and rounded.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from loki_kernels.cache import cache_folder
from loki_kernels.demo.model import NAME
from loki_kernels.sharding import linear_of

from ..forgetting.precision import DEVICE
from .arms import ARMS, Job
from .data import TASKS, Data
from .laboratory import Laboratory, digits
from .layers import UpdatedLinear
from .models import MODELS
from .runner import STEPS, moments_of
from .train import trained


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Put plain layers with the merged weights in the place of those with an update."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, UpdatedLinear):
                setattr(module, name, linear_of(child.weight(), child.linear.bias))


@torch.no_grad()
def to_grid(model: nn.Module) -> None:
    """Round every weight to bfloat16's values, in the dtype it has."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


@torch.no_grad()
def size_of_rounding(model: nn.Module, base: nn.Module) -> Tensor:
    """The norm of what rounding would change, as a share of the update's own."""
    lost = update = torch.zeros(())
    for own, before in zip(model.parameters(), base.parameters(), strict=True):
        lost = lost + (own.bfloat16() - own).square().sum().cpu()
        update = update + (own - before).square().sum().cpu()
    return (lost / update).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier.rounded")
    parser.add_argument("--data", type=Path, default=cache_folder() / "frontier.safetensors")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--task", choices=TASKS, default="gsm8k")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), required=True)
    parser.add_argument("--rates", nargs="+", type=float, required=True, help="of each arm")
    arguments = parser.parse_args()
    start = time.monotonic()
    model, _ = MODELS[NAME]()
    to_grid(model.to(DEVICE))
    data = Data.load(arguments.data).to(DEVICE)
    jobs = [
        Job(name, ARMS[name], arguments.task, rate, arguments.seed, arguments.steps)
        for name, rate in zip(arguments.arms, arguments.rates, strict=True)
    ]
    lab = Laboratory(model, data, dict(moments_of(model, data, jobs, predict=False)))
    for job in jobs:
        tuned = trained([job], lab).model
        merge(tuned)
        share = size_of_rounding(tuned, lab.base)
        looks = [lab.look(tuned, job.task, 1)]
        to_grid(tuned)
        looks.append(lab.look(tuned, job.task, 1))
        for way, figures in zip(("float32", "bfloat16"), lab.measure(looks), strict=True):
            print(json.dumps({"arm": job.arm_name, "rate": job.rate, "weights": way} | figures[0]))
        about = {"rounding": digits(share), "before": lab.before[job.task]}
        print(json.dumps(about | {"seconds": round(time.monotonic() - start)}), flush=True)


if __name__ == "__main__":
    main()
