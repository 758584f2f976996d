"""``python -m benchmarks.frontier.accuracies``: what trainings do to answers, not to likelihoods.

Each of some arms is trained once on each task, at the middle of its rates, and asked ARC-easy's,
PIQA's and HellaSwag's questions and LAMBADA's last words, as the base is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from loki_kernels.cache import cache_folder
from loki_kernels.demo.model import NAME

from ..forgetting.precision import DEVICE, keep_head
from ..forgetting.retention import Retention
from ..records import SHARED
from .arms import ARMS, Job
from .data import TASKS, Data
from .laboratory import Laboratory
from .models import MODELS
from .runner import STEPS, moments_of
from .train import trained


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier.accuracies")
    parser.add_argument("--data", type=Path, default=cache_folder() / "frontier.safetensors")
    parser.add_argument("--shared", type=Path, default=SHARED, help="the questions")
    parser.add_argument("--records", type=int, default=1000, help="questions of a set")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=tuple(ARMS),
        default=("full", "LoRA", "rows protected, 110", "down_proj protected, 110"),
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    torch.set_float32_matmul_precision("high")  # as the study trains
    model, tokenizer = MODELS[NAME]()
    model.to(DEVICE)
    retention = Retention(arguments.shared, tokenizer, arguments.records, windows=32)
    data = Data.load(arguments.data).to(DEVICE)
    jobs = [
        Job(name, ARMS[name], task, ARMS[name].rates[2], 0, arguments.steps)
        for task in TASKS
        for name in arguments.arms
    ]
    lab = Laboratory(model, data, dict(moments_of(model, data, jobs, predict=False)))

    def say(arm: str, task: str, asked: torch.nn.Module) -> None:
        keep_head(asked)
        figures = {name: round(value, 4) for name, value in retention.evaluate(asked).items()}
        seconds = round(time.monotonic() - start)
        print(json.dumps({"arm": arm, "task": task} | figures | {"seconds": seconds}), flush=True)

    say("base", "", lab.base)
    for job in jobs:
        say(job.arm_name, job.task, trained([job], lab).model)


if __name__ == "__main__":
    main()
