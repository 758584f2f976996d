"""Runs the batches of an attribution that no former process has left."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import UnsupportedModelError
from ..files import check_writable
from ..fingerprint import model_fingerprint
from ..ops._dispatch import warm_up
from ..options import EngineName
from ..placement import accelerator
from ..progress import progress_bar, skip
from ..structure import Structure, embedding_weight
from ..team import Team
from .definitions import PathIntegral
from .engine import Engine, attribute_batch, choose_engine, short_prompt
from .fitting import Fitting, Refused
from .fusing import Forward, find_fusion
from .log import Log
from .plan import BatchLimits, PlannedBatch, Window
from .result import Attribution, AttributionCounts, describe_machine, model_settings
from .scores import Counter, Scores
from .steering import borrowed, replacing
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
    team: Team
    engine: EngineName | None = None
    slower: list[int] = field(default_factory=list, init=False)  # prompts that took another engine

    def run(
        self,
        first: Window,
        others: Iterable[Window],
        total: int,
        out: str | os.PathLike[str] | None,
        run: dict[str, Any],
        progress: bool | None,
    ) -> Attribution | AttributionCounts:
        """Attribute what is not there yet, this process's share of it.

        Args:
            first, others: windows of the prompts.
            total: how many there are, for the bar.
            out: where to, as `attribute` has it.
            run: the result's.
            progress: as `attribute` has it.
        """
        store = self._store(out, run)
        weight = embedding_weight(self.structure.causal_lm)
        shown = progress if self.team.rank == 0 else False
        bar = progress_bar(total, "attribute", shown, unit="prompt")
        # before memory is full
        device, ops = self.structure.device, ("shared_prefix_attention", "target_probability")
        warm_up(ops, device, weight.dtype)
        with store, borrowed(self.structure), bar:
            every = itertools.chain([first], others)
            prompts, batches = self._run_windows(every, store, bar)
            if self.slower:
                logger.warning(
                    "the staircase refused %d of %d prompts, number %d first, which a slower "
                    "engine attributed; at level INFO it is said which and why.",
                    len(self.slower), prompts, self.slower[0],
                )  # fmt: skip
            result = store.result(prompts, batches)
            bar.update(self.team.advance(0))
        return result

    def _store(self, out: str | os.PathLike[str] | None, run: dict[str, Any]) -> Memory | Log:
        """Where the results go."""
        structure, counter, definition = self.structure, self.counter, self.integral.definition
        layers, width = len(structure.layers), structure.width(definition.site)
        layout = Layout(layers, width, scores=counter is None, complete=definition.completes)
        if out is not None:
            out = check_writable(out, ".safetensors")  # before the weights are read
        elif self.team.size == 1:
            return Memory(layout, run, counter, self.limits, self.team)
        identity = {
            "model": model_fingerprint(structure.causal_lm),
            "settings": model_settings(structure.causal_lm),
            **self.integral.described(),
            "steps": run["steps"],
            "quota": None if counter is None else counter.quota,
            "criterion": None if counter is None else counter.criterion,
            "batch_size": self.limits.prompts,
            "engine": self.engine,
        }
        mine = json.dumps([identity, None if out is None else os.fspath(out)])
        self.team.agree("job", mine, "another model, by other options or to another file")
        if out is None:
            return Memory(layout, run, counter, self.limits, self.team)
        machine = describe_machine(structure.device)
        return Log(out, layout, run, counter, self.limits, identity, machine, self.team)

    def _run_windows(
        self, windows: Iterable[Window], store: Memory | Log, bar: tqdm
    ) -> tuple[int, int]:
        """How many prompts and batches there were."""
        points = len(self.structure.layers) * len(self.integral.alphas)
        prompts = batches = 0
        engine: Engine | None = None
        fused: dict[torch.nn.Module, Forward] = {}
        start: float | None = None
        fitting = Fitting.of(points, self.limits, store.limits, self.structure.device)
        agree = self.team.all if self.structure.sharded else None
        stop = stopping(enabled=isinstance(store, Log), agree=agree)
        with stop as stopped:
            for window in windows:
                prompts = window.end
                store.reserve(prompts)
                if engine is None:
                    engine = choose_engine(
                        self.structure, window.sequences, self.integral, self.engine
                    )
                    store.run["engine"] = engine.name
                    start = time.perf_counter()
                plan = window.batches(batches, store.limits.of_engine(engine.name), points)
                if not batches:  # the engines were tried on the model as it is
                    tokens = plan[0].tokens_at_once(points, alone=engine.name != "staircase")
                    prompt = short_prompt(window.sequences[0]).to(self.structure.device)
                    fused = find_fusion(self.structure, tokens, prompt)
                batches += len(plan)
                left = self._share(plan, store, bar, points)
                todo = {planned.number for planned in left}
                for i, planned in enumerate(self._in_step(plan, left, engine), 1):
                    self.team.check()
                    with replacing(fused):
                        scores = self._compute(planned, engine, fitting)
                    if planned.number in todo:
                        todo.remove(planned.number)
                        store.write(planned, scores)
                        bar.update(self.team.advance(len(planned.members)))
                    stopped()
                    if start is not None:
                        seconds = (time.perf_counter() - start) / planned.tokens
                        start = None
                        _announce(seconds, left[i:], self.structure.device)
        return prompts, batches

    def _share(
        self, plan: list[PlannedBatch], store: Memory | Log, bar: tqdm, points: int
    ) -> list[PlannedBatch]:
        """Of a window's batches, those that this process has to compute."""
        if self.team.size > 1:
            digests = " ".join(planned.digest() for planned in plan)
            self.team.agree(f"batch {plan[0].number}", digests, "other prompts")
        known = [store.knows(planned) for planned in plan]
        skip(bar, sum(len(p.members) for p, k in zip(plan, known, strict=True) if k))
        # what is known each checks a share of: 524 GB of a million prompts at 8B
        costs = [1 if k else p.cost(points) for p, k in zip(plan, known, strict=True)]
        mine = self.team.share(costs)
        return [p for p, m in zip(plan, mine, strict=True) if m and not store.has(p)]

    def _in_step(
        self, plan: list[PlannedBatch], left: list[PlannedBatch], engine: Engine
    ) -> list[PlannedBatch]:
        """What this process runs of a window: what is left for it, and more in step with others.

        Where weights are sharded all processes make every forward pass together. On the staircase
        any batch has as many, so that the smallest fills up; other engines have them by the prompt,
        and tensor parallelism computes one batch in all.
        """
        if self.team.size == 1 or not self.structure.sharded:
            return left
        numbers = [planned.number for planned in left]
        everyone = [json.loads(told) for told in self.team.tell(json.dumps(numbers))]
        if engine.name == "staircase" and not self.structure.split:
            return left + plan[-1:] * (max(map(len, everyone)) - len(left))
        return [planned for planned in plan if any(planned.number in told for told in everyone)]

    def _compute(self, planned: PlannedBatch, engine: Engine, fitting: Fitting) -> Scores:
        # processes that share a model's weights stay in step; other engines take a prompt at a time
        halved = engine.name == "staircase" and not self.structure.sharded

        def compute(part: PlannedBatch) -> Scores | Refused:
            try:
                return attribute_batch(engine, part.on(self.structure.device))
            except UnsupportedModelError as error:
                if self.engine is not None:
                    raise
                refused = str(error)  # the error itself keeps what it stopped
            return Refused() if len(part.members) > 1 else self._by_another(part, refused)

        if halved:
            scores = fitting.run(planned, compute)
        else:
            scores = attribute_batch(engine, planned.on(self.structure.device))
        scores = scores.at(list(self.structure.present()), len(self.structure.layers))
        if self.counter is not None:
            _check_rankable(scores, planned.members)
        return scores

    def _by_another(self, planned: PlannedBatch, refused: str) -> Scores:
        """Of one prompt that the staircase, which others take, has refused.

        It may have an image, be longer than a chunk of the model's attention, or be routed by
        rounding to other experts. The last may happen to one token over a cache as well, so that
        whole prompts are left: of one prompt among many, they do not lose what the others took.

        Raises:
            UnsupportedModelError: as it was refused, if every engine refuses; it names the prompt.
        """
        names: tuple[EngineName, ...] = ("decode", "reforward")
        (number,) = planned.members
        for name in names:
            try:
                engine = choose_engine(self.structure, planned.sequences, self.integral, name)
                scores = attribute_batch(engine, planned.on(self.structure.device))
            except UnsupportedModelError:  # which keeps what it stopped, and reforward wants room
                continue
            self.slower.append(number)
            logger.info("prompt %d is attributed by the %s engine (%s)", number, name, refused)
            return scores
        raise UnsupportedModelError(f"prompt {number}, of {planned.longest} tokens: {refused}")


def _check_rankable(scores: Scores, members: list[int]) -> None:
    undefined = scores.sums.isnan().nonzero()
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
def stopping(
    *, enabled: bool, agree: Callable[[bool], bool] | None = None
) -> Iterator[Callable[[], None]]:
    """What to call between batches: it raises SystemExit once the process was sent SIGTERM.

    A batch is a good time to end, after which everything is on disk; SIGTERM in another thread than
    the main one is left to whoever handles it there.

    Args:
        enabled: whether to look for it.
        agree: whether something is true in every process; with it all end after the same batch.
    """
    received = threading.Event()

    def check() -> None:
        going = not received.is_set()
        if not (agree(going) if agree else going):
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
