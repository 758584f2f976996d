"""``python -m benchmarks.goals``: how far a GPU is from where its figures are to be.

Each goal is measured on the card under test, beside its peers, and appended to ``goals.jsonl``
among the results; a table is printed. On a CPU, or with ``--dry-run``, the same runs on a tiny
model, to find typing errors.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from loki_kernels import attribute, estimate_protection

from .attribution import least_bytes, least_work
from .measure import (
    DEVICE,
    attempt,
    finish,
    floor,
    host_and_device,
    interleave,
    run_to_the_end,
)
from .records import append_record, describe_machine
from .shapes import build
from .training.memory import measure_peak
from .training.step import begin, least_time

_ROUNDS = 3
STEPS = 7  # path points


class Measured(NamedTuple):
    """One figure.

    Attributes:
        what: in words.
        value: measured.
        goal: where it is to be; None for a peer's, which has none.
        unit: of both.
        more: whether more is better.
    """

    what: str
    value: float
    goal: float | None
    unit: str
    more: bool = False

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        reached = self.value >= self.goal if self.more else self.value <= self.goal
        return "reached" if reached else "missed"


def _attribute(model: Any, tokens: int, prompts: int, size: int | None) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, model.config.vocab_size, (prompts, tokens), generator=generator)
    return lambda: attribute(model, [{"input_ids": ids}], steps=STEPS, batch_size=size)


def _median(function: Callable[[], Any]) -> float:
    return statistics.median(interleave({"it": function}, _ROUNDS)["it"])


def analyses(name: str, dry: bool) -> Iterator[Measured]:
    """Of a large model: shares of the floor, of the wall that the device idles, and one prompt."""
    model = build(name).requires_grad_(False)
    cases = ((128, 16, 16, 0.75), (128, 128, None, 0.8), (512, 32, None, 0.8), (2048, 8, None, 0.8))
    for tokens, prompts, size, goal in cases:
        tokens = 16 if dry else tokens
        what = f"analysis, {name}, {tokens} tokens x {prompts}"
        with attempt(what):
            call = _attribute(model, tokens, prompts, size)
            wall = _median(call)
            # what a batch reads is little beside what it computes
            least = floor(least_work(name, None, tokens, STEPS) * prompts, 0)
            yield Measured(what, 100 * least / wall, 100 * goal, "% of the floor", more=True)
            yield Measured(f"{what}: a prompt", wall / prompts * 1e3, None, "ms")
            if size == 16:
                _, busy = host_and_device(call, 1)
                yield Measured(f"{what}: wall beyond busy", 100 * (wall / busy - 1), 15, "%")
    tokens = 16 if dry else 128
    alone = _median(_attribute(model, tokens, 1, None))
    what = f"analysis, {name}, one prompt alone"
    yield Measured(what, alone * 1e3, 40, "ms")
    # of it the weights take longer to be read than to be multiplied
    least = floor(least_work(name, None, tokens, STEPS), least_bytes(name, None))
    yield Measured(what, 100 * least / alone, None, "% of the floor", more=True)


def small_models(names: dict[str, float], dry: bool) -> Iterator[Measured]:
    for name, goal in names.items():
        prompts = 4 if dry else 256
        what = f"analysis, {name}, {prompts} prompts"
        with attempt(what):
            wall = _median(_attribute(build(name).requires_grad_(False), 128, prompts, None))
            yield Measured(what, wall / prompts * 1e3, goal, "ms each")
        gc.collect()


def protection(name: str, layers: int | None, texts: int) -> Iterator[Measured]:
    """What `estimate_protection` takes of texts that are given, the drawing of samples aside."""
    model = build(name, layers).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (texts, 256), generator=generator).tolist()
    start = time.perf_counter()
    estimate_protection(model, ids, progress=False)
    what = f"a protection, {name}, {layers or 'all'} layers, {texts} texts of 256 tokens"
    yield Measured(what, time.perf_counter() - start, None, "s")


_FIRST_CALL = """
import time, torch
from benchmarks.goals import _attribute
from benchmarks.shapes import build
call = _attribute(build({name!r}).requires_grad_(False), 64, 4, None)
for _ in range(2):
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(time.perf_counter() - start)
"""


def first_calls(name: str) -> Iterator[Measured]:
    """Of a process: with Triton's cache empty, and then with what that one left."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()  # what this process keeps of it the others lack
    with tempfile.TemporaryDirectory() as cache:
        for which, goal in (("cold", 10.0), ("from the cache", 1.0)):
            run = subprocess.run(
                [sys.executable, "-c", _FIRST_CALL.format(name=name)],
                env=os.environ | {"TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
            )
            if run.returncode:
                raise SystemExit(run.stderr[-2000:])
            first, second = map(float, run.stdout.split()[-2:])
            value = first if which == "cold" else first - second
            beyond = "" if which == "cold" else ", beyond the second"
            yield Measured(f"first call, {name}, {which}{beyond}", value, goal, "s")


# What the goals of a training step are for: 10 % of the rows.
_JUDGED = ("ours", "ours_fused", "ours_compiled")


def _title(name: str, layers: int | None, tokens: int) -> str:
    return f"training step, {name}, {layers or 'all'} layers, {tokens} tokens"


def _times(
    method: str, seconds: float, name: str, layers: int | None, tokens: int, goal: float
) -> Iterator[Measured]:
    """A step's time, and of ours its share of the floor."""
    what = f"{_title(name, layers, tokens)}: {method}"
    yield Measured(what, seconds * 1e3, goal if method in _JUDGED else None, "ms")
    if method in _JUDGED:
        share = 100 * least_time(name, layers, tokens) / seconds
        yield Measured(what, share, None, "% of the floor", more=True)


def training(
    name: str, layers: int | None, tokens: int, goals: tuple[float, float | None], methods: Any
) -> Iterator[Measured]:
    """Steps in turns, and each method's peak beside what all of them keep."""
    what, steps = _title(name, layers, tokens), {}
    for method in methods:
        with attempt(f"{what}: {method}"):
            steps[method] = begin(method, name, layers, tokens)[0]
    for method, seconds in interleave(steps, _ROUNDS).items():
        yield from _times(method, statistics.median(seconds), name, layers, tokens, goals[0])
    if DEVICE.type == "cuda" and goals[1] is not None:
        measured = tuple(steps)
        steps.clear()  # no variable may keep one: a peak would be that much too high
        for method in measured:
            gc.collect()
            torch.cuda.empty_cache()
            with attempt(f"{what}: {method}, peak"):
                peak = measure_peak(method, name, layers, tokens) / 2**30
                goal = goals[1] if method in _JUDGED else None
                yield Measured(f"{what}: {method}, peak", peak, goal, "GiB")


def compiled_training(
    name: str, layers: int | None, tokens: int, goals: tuple[float, float | None], methods: Any
) -> Iterator[Measured]:
    """`training` of one method after the other, since any compilation may be the last there is
    time for."""
    for method in methods:
        with attempt(f"{_title(name, layers, tokens)}: {method}"):
            yield from _compiled(method, name, layers, tokens, goals)
        gc.collect()


def _compiled(
    method: str, name: str, layers: int | None, tokens: int, goals: tuple[float, float | None]
) -> Iterator[Measured]:
    """A method's own time and peak.

    All modules' compilations belong to one function of torch's, which takes eight; what comes after
    those would run eager, and be timed as compiled. So it begins anew, and the ninth is an error.
    """
    torch._dynamo.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        step = begin(method, name, layers, tokens)[0]
        seconds = _median(step)
    yield from _times(method, seconds, name, layers, tokens, goals[0])
    if DEVICE.type == "cuda" and goals[1] is not None:
        peak = torch.cuda.max_memory_allocated() / 2**30
        goal = goals[1] if method in _JUDGED else None
        yield Measured(f"{_title(name, layers, tokens)}: {method}, peak", peak, goal, "GiB")


def goals(dry: bool) -> Iterator[Measured]:
    """A part that fails does not end the rest. What takes a compilation comes last, since time may
    run out."""
    large, small = ("tiny", "tiny") if dry else ("Llama-3.1-8B", "SmolLM2-135M")
    layers, tokens = (None, (32, 32)) if dry else (8, (8192, 2048))
    few = ("ours", "ours_protected", "lora", "full")
    which = ("ours",) if dry else ("ours", "lora", "full")
    compiled = tuple(f"{method}_compiled" for method in which)
    parts = {
        "analyses": analyses(large, dry),
        "small models": small_models({small: 0.8} | ({} if dry else {"Qwen2.5-0.5B": 0.7}), dry),
        "steps": training(
            large,
            layers,
            tokens[0],
            (130, 23),
            ("ours", "ours_fused", "ours_protected", "lora_down_proj", "lora", "full"),
        ),
        "a small model's steps": training(small, None, tokens[1], (65, None), few),
        "a protection": protection(large, layers, 4 if dry else 192),
        "first calls": first_calls(small),
        "compiled steps": compiled_training(large, layers, tokens[0], (130, 23), compiled),
        # a rehearsal has one model, and has compiled it
        "a small model's compiled steps": compiled_training(
            small, None, tokens[1], (65, None), () if dry else compiled
        ),
    }
    for what, part in parts.items():
        with attempt(what):
            yield from part
        gc.collect()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goals", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, nothing is kept")
    dry = parser.parse_args(argv).dry_run or DEVICE.type == "cpu"
    machine = describe_machine()
    print("| | measured | goal | |\n|---|--:|--:|---|")
    for figure in goals(dry):
        goal = "" if figure.goal is None else f"{figure.goal:g}"
        value = f"{figure.value:.3g} {figure.unit}"
        print(f"| {figure.what} | {value} | {goal} | {figure.verdict} |", flush=True)
        if not dry:
            append_record(machine | figure._asdict(), "goals.jsonl")
    finish()


if __name__ == "__main__":
    run_to_the_end(main)
