"""``python -m benchmarks.frontier.two_tasks``: what a second task leaves of the first.

SmolLM2-135M-Instruct learns Shakespeare's plays, by full fine-tuning and with all rows protected.
Each is merged, and learns the demo's calls from there: the first in full again; the second with
plain rows, with rows protected from general text, and with rows protected from general text and
the plays (``earlier=``). Every training of the calls is measured at several shares of its update,
so that what is lost of the plays is compared at one loss on the calls. The records are appended to
``benchmarks/results/frontier/two_tasks.jsonl``.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loki_kernels as loki
from loki_kernels.cache import cache_folder
from loki_kernels.demo.evaluation import token_log_probabilities
from loki_kernels.demo.frontier import frontier, mean_at_equal_loss
from loki_kernels.demo.function_calls import generate_examples
from loki_kernels.demo.methods import Update
from loki_kernels.demo.model import load_smollm2
from loki_kernels.demo.training import Encoded, encode, fine_tune

from ..records import RESULTS, describe_machine
from .data import Data

SHARES = (1.0, 0.6, 0.3)
FULL, PLAIN, PROTECTED, EARLIER = "full", "plain", "protected", "protected, earlier"


def _records(data: Data, name: str, count: int) -> list[Encoded]:
    """``count`` of a part's sequences at equal distances, without their padding."""
    ids, labels = data.ids[name], data.labels[name]
    chosen = [i * len(ids) // count for i in range(count)]
    return [_record(ids[i], labels[i]) for i in chosen]


def _record(ids: Tensor, labels: Tensor) -> Encoded:
    end = int((labels != -100).nonzero().max()) + 1
    return {"input_ids": ids[:end].tolist(), "labels": labels[:end].tolist()}


class Tasks:
    """Both tasks' texts, those that are trained on in an order by ``seed``, and general text."""

    def __init__(self, data: Data, tokenizer: Any, samples: int, seed: int) -> None:
        train, test = generate_examples(96, 36)
        self.calls, held_out = ([encode(e, tokenizer) for e in part] for part in (train, test))
        self.plays = _records(data, "shakespeare/train", 160)
        generator = random.Random(seed)
        for records in (self.calls, self.plays):
            generator.shuffle(records)
        self._measured = {
            "plays": _records(data, "shakespeare/test", 12),
            "calls": held_out,
            "wikitext": _records(data, "wikitext", 12),
        }
        self.general, self.own = (
            [record["input_ids"] for record in _records(data, name, samples)]
            for name in ("samples", "shakespeare/train")
        )

    def losses(self, model: nn.Module) -> dict[str, float]:
        """Nats a token of each that is measured."""
        found = {}
        for name, records in self._measured.items():
            parts = token_log_probabilities(model, records, 4)
            found[name] = round(-float(torch.cat([log_p for log_p, _ in parts]).mean()), 6)
        return found


def run(
    model: Any, tasks: Tasks, steps: tuple[int, int], rates: dict[str, tuple[float, float]]
) -> Iterator[dict[str, Any]]:
    """A record of each state that is measured; at last what each way lost of the plays."""
    yield {"after": "nothing", **tasks.losses(model)}
    general = loki.estimate_protection(model, tasks.general)
    after_plays: dict[str, float] = {}
    fronts: dict[str, list[tuple[float, float]]] = {}

    def learn_plays(way: str, learner: Any) -> dict[str, Any]:
        rate = rates[way][0]
        fine_tune(
            learner, tasks.plays, steps=steps[0], learning_rate=rate, batch_size=2, progress=False
        )
        found = tasks.losses(learner)
        after_plays[way] = found["plays"]
        return {"after": "the plays", "way": way, "rate": rate, **found}

    def learn_calls(way: str, learner: Any, first: str) -> Iterator[dict[str, Any]]:
        update, rate = Update(learner), rates[way][1]
        fine_tune(learner, tasks.calls, steps=steps[1], learning_rate=rate, progress=False)
        points = []
        for share in SHARES:
            update.keep(share)
            found = tasks.losses(learner)
            points.append((found["calls"], found["plays"] - after_plays[first]))
            yield {"after": "the calls", "way": way, "rate": rate, "share": share, **found}
        fronts[way] = frontier(points)

    learner = copy.deepcopy(model).requires_grad_(True)
    yield learn_plays(FULL, learner)
    yield from learn_calls(FULL, learner, FULL)
    del learner
    with loki.patch(model, quota=100, protect=general) as handle:
        yield learn_plays(PROTECTED, model)
        handle.merge()
    both = loki.estimate_protection(model, tasks.own, earlier=general)
    for way, protection in ((PLAIN, None), (PROTECTED, general), (EARLIER, both)):
        with loki.patch(model, quota=100, protect=protection):
            yield from learn_calls(way, model, PROTECTED)
    shared, found = mean_at_equal_loss(fronts)
    between = [round(loss, 4) for loss in shared]
    for way, lost in found.items():
        yield {"way": way, "calls": between, "plays_lost": round(lost, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier.two_tasks")
    parser.add_argument("--data", type=Path, default=cache_folder() / "frontier.safetensors")
    parser.add_argument("--results", type=Path, default=RESULTS / "frontier" / "two_tasks.jsonl")
    parser.add_argument("--steps", type=int, nargs=2, default=(30, 16))
    parser.add_argument("--seed", type=int, default=0, help="of the order of the texts")
    parser.add_argument(
        "--samples", type=int, default=48, help="of 256 tokens, and as many of the plays"
    )
    arguments = parser.parse_args()
    rates = {
        FULL: (1e-4, 1e-4), PLAIN: (0.0, 5e-4), PROTECTED: (1e-3, 1e-3), EARLIER: (0.0, 1e-3),
    }  # fmt: skip
    model, tokenizer = load_smollm2()
    tasks = Tasks(Data.load(arguments.data), tokenizer, arguments.samples, arguments.seed)
    kept = {"seed": arguments.seed, "steps": list(arguments.steps), **describe_machine()}
    start = time.monotonic()
    with open(arguments.results, "a", encoding="utf-8") as file:
        for record in run(model, tasks, tuple(arguments.steps), rates):
            print(json.dumps(record | {"seconds": round(time.monotonic() - start)}), flush=True)
            file.write(json.dumps(record | kept) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
