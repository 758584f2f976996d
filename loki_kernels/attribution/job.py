"""Runs the batches of an attribution that no former process has left."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from ..fingerprint import model_fingerprint
from ..progress import skip
from ..structure import Structure
from .definitions import PathIntegral
from .log import Log, check_out
from .placement import accelerator
from .plan import BatchLimits, PlannedBatch, Window
from .prefill import Batch, run_prefill
from .probe import check_model
from .result import Attribution, AttributionCounts, describe_machine, model_settings
from .scores import Counter, Scores
from .sequence import scaled_prefixes
from .staircase import Staircase
from .store import Layout, Memory

logger = logging.getLogger(__name__)

_LONG = 60.0  # seconds, from which it is said how long an attribution takes


@dataclass(frozen=True)
class Job:
    """What is computed of every prompt, and from which model."""

    structure: Structure
    integral: PathIntegral
    limits: BatchLimits
    counter: Counter | None

    def store(self, out: str | os.PathLike[str] | None, run: dict[str, Any]) -> Memory | Log:
        """Where the results go."""
        structure, counter, definition = self.structure, self.counter, self.integral.definition
        layers, width = len(structure.layers), structure.width(definition.site)
        layout = Layout(layers, width, scores=counter is None, complete=definition.completes)
        if out is None:
            return Memory(layout, run, counter, self.limits)
        check_out(out)  # before the weights are read
        identity = {
            "model": model_fingerprint(structure.causal_lm),
            "settings": model_settings(structure.causal_lm),
            **definition.as_dict(),
            "steps": run["steps"],
            "quota": None if counter is None else counter.quota,
            "criterion": None if counter is None else counter.criterion,
            "batch_size": self.limits.prompts,
        }
        machine = describe_machine(structure.device)
        return Log(out, layout, run, counter, self.limits, identity, machine)

    def run(
        self, windows: Iterable[Window], store: Memory | Log, bar: tqdm
    ) -> Attribution | AttributionCounts:
        """Attribute what is not there yet."""
        points = len(self.structure.layers) * len(self.integral.alphas)
        batches = end = 0
        start: float | None = time.perf_counter()
        with stopping(enabled=isinstance(store, Log)) as stopped:
            for window in windows:
                end = window.end
                store.reserve(end)
                plan = window.batches(batches, store.limits, points)
                batches += len(plan)
                left = [planned for planned in plan if not store.has(planned)]
                skip(bar, len(window.sequences) - sum(len(p.members) for p in left))
                for i, planned in enumerate(left, 1):
                    self._run_batch(planned, store)
                    bar.update(len(planned.members))
                    stopped()
                    if start is not None:
                        seconds = (time.perf_counter() - start) / planned.tokens
                        start = None
                        _announce(seconds, left[i:], self.structure.device)
        return store.result(end, batches)

    def _run_batch(self, planned: PlannedBatch, store: Memory | Log) -> None:
        device = self.structure.device
        scores = _attribute_batch(self.structure, planned.on(device), self.integral)
        if self.counter is not None:
            _check_rankable(scores, planned.members)
        store.write(planned, scores)


def _attribute_batch(structure: Structure, batch: Batch, integral: PathIntegral) -> Scores:
    check_model(structure, batch)
    prefill = run_prefill(structure, batch, integral.definition)
    staircase = Staircase(structure, batch, prefill, integral)
    layers = range(len(structure.layers))
    if integral.definition.path == "last_token":
        return staircase.run(layers, prefill.prefix)
    parts = []
    # One layer at a time: a copy of the whole prompt's keys and values a path point is what the
    # memory holds.
    for layer in layers:
        one = range(layer, layer + 1)
        prefix = scaled_prefixes(structure, batch, prefill, integral, one)
        parts.append(staircase.run(one, prefix, prefix_per_point=True))
    return Scores.of_layers(parts)


def _check_rankable(scores: Scores, members: list[int]) -> None:
    undefined = scores.sums().isnan().nonzero()
    if len(undefined):
        sample, layer = undefined[0].tolist()
        raise ValueError(
            f"the scores of prompt {members[sample]} in layer {layer} hold NaN (or infinities of "
            "both signs); a rank among them means nothing."
        )


def _announce(seconds_a_token: float, left: list[PlannedBatch], device: torch.device) -> None:
    """How long the other prompts will take, if that is over a minute."""
    tokens, prompts = sum(p.tokens for p in left), sum(len(p.members) for p in left)
    seconds = seconds_a_token * tokens
    if seconds < _LONG:
        return
    length = f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
    logger.info("%d prompts take about %s more", prompts, length)
    beside = accelerator() if device.type == "cpu" else None
    if beside is not None:
        logger.warning(
            "The attribution runs on the CPU, for about %s more, beside %s with %.1f GB free; "
            "a model that fits there is attributed faster: model.to(%r).",
            length,
            beside[0],
            beside[1] / 1e9,
            str(beside[0]),
        )


@contextlib.contextmanager
def stopping(*, enabled: bool) -> Iterator[Callable[[], None]]:
    """What to call between batches: it raises SystemExit once the process was sent SIGTERM.

    A batch is a good time to end, after which everything is on disk; SIGTERM in another thread than
    the main one is left to whoever handles it there.
    """
    received = threading.Event()

    def check() -> None:
        if received.is_set():
            logger.warning("SIGTERM: the same call goes on from here")
            raise SystemExit(128 + signal.SIGTERM)

    if not enabled or threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield check
    finally:
        signal.signal(signal.SIGTERM, before)
