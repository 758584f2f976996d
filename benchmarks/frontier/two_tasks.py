"""``python -m benchmarks.frontier.two_tasks``: what a second task leaves of the first.

SmolLM2-135M-Instruct learns Shakespeare's plays with all rows protected, the update is merged, and
then it learns the demo's calls, three times from there: with plain rows, with rows protected from
general text, and with rows protected from general text and the plays (``earlier=``). Every training
of the calls is measured at several shares of its update, so that the losses on the plays can be
compared at one loss on the calls.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loki_kernels as loki
from loki_kernels.attribution.cache import cache_folder
from loki_kernels.demo.evaluation import token_log_probabilities
from loki_kernels.demo.frontier import at_loss
from loki_kernels.demo.function_calls import generate_examples
from loki_kernels.demo.methods import Update
from loki_kernels.demo.model import load_smollm2
from loki_kernels.demo.training import Encoded, encode, fine_tune

from .data import Data

SHARES = (1.0, 0.6)


def _records(data: Data, name: str, count: int, skip: int = 0) -> list[Encoded]:
    """``count`` of a part's sequences at equal distances, without their padding."""
    ids, labels = data.ids[name][skip:], data.labels[name][skip:]
    chosen = [i * len(ids) // count for i in range(count)]
    return [_record(ids[i], labels[i]) for i in chosen]


def _record(ids: Tensor, labels: Tensor) -> Encoded:
    end = int((labels != -100).nonzero().max()) + 1
    return {"input_ids": ids[:end].tolist(), "labels": labels[:end].tolist()}


def _loss(model: nn.Module, records: list[Encoded]) -> float:
    found = token_log_probabilities(model, records, 4)
    return -float(torch.cat([log_p for log_p, _ in found]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier.two_tasks")
    parser.add_argument("--data", type=Path, default=cache_folder() / "frontier.safetensors")
    parser.add_argument("--steps", type=int, nargs=2, default=(20, 12))
    parser.add_argument("--rates", type=float, nargs="+", default=(1e-3, 5e-4, 1e-3, 1e-3))
    parser.add_argument(
        "--samples", type=int, default=24, help="of 256 tokens, and as many of the plays"
    )
    arguments = parser.parse_args()
    start = time.monotonic()

    def say(**figures: Any) -> None:
        print(json.dumps(figures | {"seconds": round(time.monotonic() - start)}), flush=True)

    data = Data.load(arguments.data)
    model: Any
    model, tokenizer = load_smollm2()
    train, test = generate_examples(96, 36)
    calls, held_out = ([encode(e, tokenizer) for e in part] for part in (train, test))
    learned = _records(data, "shakespeare/train", 160)
    plays, wikitext = (_records(data, name, 12) for name in ("shakespeare/test", "wikitext"))

    def measure(**figures: Any) -> dict[str, float]:
        found = {
            "plays": round(_loss(model, plays), 6),
            "calls": round(_loss(model, held_out), 6),
            "wikitext": round(_loss(model, wikitext), 6),
        }
        say(**figures, **found)
        return found

    def texts(name: str) -> list[list[int]]:
        return [r["input_ids"] for r in _records(data, name, arguments.samples)]

    measure(after="nothing")
    general = loki.estimate_protection(model, texts("samples"))
    say(protection=str(general))
    steps, (first, *second) = arguments.steps, arguments.rates
    handle = loki.patch(model, quota=100, protect=general)
    fine_tune(model, learned, steps=steps[0], learning_rate=first, batch_size=2, progress=False)
    handle.merge()
    measure(after="the plays")
    both = loki.estimate_protection(model, texts("shakespeare/train"), earlier=general)
    say(protection=str(both))
    fronts = {}
    arms = {"plain": None, "protected": general, "protected, earlier": both}
    for (name, protection), rate in zip(arms.items(), second, strict=True):
        with loki.patch(model, quota=100, protect=protection):
            update = Update(model)
            fine_tune(model, calls, steps=steps[1], learning_rate=rate, progress=False)
            points = []
            for share in SHARES:
                update.keep(share)
                found = measure(after="the calls", rows=name, rate=rate, share=share)
                points.append((found["calls"], found["plays"]))
            fronts[name] = sorted(points)
    target = max(points[0][0] for points in fronts.values())
    for name, points in fronts.items():
        value = at_loss(points, target)
        if value is not None and not math.isnan(value):
            say(rows=name, calls=round(target, 4), plays=round(value, 4))


if __name__ == "__main__":
    main()
