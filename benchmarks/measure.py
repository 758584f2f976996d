"""Paired timings: contenders interleaved in one process, against what the hardware can do."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import statistics
import sys
import time
import timeit
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer as clock  # waits for a GPU

Contenders = Mapping[str, Callable[[], Any]]
Times = dict[str, list[float]]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What models are trained in: bfloat16 gains nothing on a CPU without AMX (NOTES.md).
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
DTYPE_NAME = str(DTYPE).removeprefix("torch.")

_failed: list[str] = []


@contextlib.contextmanager
def attempt(what: str) -> Iterator[None]:
    """Of a part that fails, say that it was not measured, and why: those after it still are."""
    if _failed:  # what the frames of one held this one may need
        gc.collect()
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = str(error)
        if isinstance(error, Exception):
            traceback.print_exc()
            reason = f"{type(error).__name__}: {reason.strip().partition(chr(10))[0]}"
        print(f"not measured: {what}: {reason}", flush=True)
        _failed.append(what)


def finish() -> None:
    """Leave with an error if a part was not measured."""
    failed = _failed.copy()
    _failed.clear()
    if failed:
        raise SystemExit(f"not measured: {'; '.join(failed)}")


def run_to_the_end(main: Callable[[], None]) -> NoReturn:
    """Run a command and end the process, whatever waits for it.

    What has compiled by Inductor may wait for its workers until its time is out.
    """
    status = 0
    try:
        main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Ceilings(NamedTuple):
    """What this device reaches: FLOP/s of a large product, bytes/s of a large copy."""

    flops: float
    bytes: float


def seconds(function: Callable[[], Any], repeats: int = 1) -> float:
    """A call of ``function``. (``torch.utils.benchmark.Timer`` would make two more to warm up.)"""
    return timeit.timeit(function, timer=clock, number=repeats) / repeats


@functools.cache
def ceilings() -> Ceilings:
    """Measured once a process, in `DTYPE`; the best of five."""
    n = 8192 if DEVICE.type == "cuda" else 2048
    a = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    source = torch.empty((1 << 30) if DEVICE.type == "cuda" else (1 << 28), dtype=torch.uint8)
    source = source.to(DEVICE)
    target = torch.empty_like(source)

    def best(function: Callable[[], Any]) -> float:
        function()
        return min(seconds(function, 3) for _ in range(5))

    return Ceilings(
        2 * n**3 / best(lambda: a @ a), 2 * source.numel() / best(lambda: target.copy_(source))
    )


def floor(flops: float, bytes: float) -> float:
    """Seconds that this much work takes at the ceilings."""
    top = ceilings()
    return max(flops / top.flops, bytes / top.bytes)


def interleave(contenders: Contenders, rounds: int, least: float = 0.02) -> Times:
    """Seconds a call of each contender, one of every round, in an order that rotates.

    Calls shorter than ``least`` seconds are repeated within a round until it has passed.
    """
    repeats = {}
    for name, function in contenders.items():
        taken = seconds(function)  # to warm up
        if taken < 10 * least:
            taken = seconds(function)
        repeats[name] = max(1, math.ceil(least / taken))
    times: Times = {name: [] for name in contenders}
    for name in turns(contenders, rounds):
        times[name].append(seconds(contenders[name], repeats[name]))
    return times


def turns(contenders: Contenders, rounds: int) -> Iterator[str]:
    """Every name once a round; each round starts one further."""
    names = list(contenders)
    for i in range(rounds):
        start = i % len(names)
        yield from names[start:] + names[:start]


def interleave_host_and_device(contenders: Contenders, rounds: int) -> tuple[Times, Times]:
    """`interleave` for calls that return before a GPU is done: host seconds, device seconds."""
    repeats = {}
    for name, function in contenders.items():
        host_and_device(function, 1)  # to warm up
        # few enough that a GPU's queue of launches never fills, which would hold up the host
        repeats[name] = min(20, max(1, math.ceil(0.02 / seconds(function))))
    host: Times = {name: [] for name in contenders}
    device: Times = {name: [] for name in contenders}
    for name in turns(contenders, rounds):
        returned, busy = host_and_device(contenders[name], repeats[name])
        host[name].append(returned)
        device[name].append(busy)
    return host, device


def host_and_device(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds until a call returns, and of all it runs on the GPU; on a CPU both are wall time."""
    if DEVICE.type == "cpu":
        taken = seconds(function, repeats)
        return taken, taken
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    host = (time.perf_counter() - start) / repeats
    torch.cuda.synchronize()
    # In calls of their own: the profiler slows the host, and not the kernels.
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    # What torch.compile made may annotate the kernels' time, which would count them twice.
    kernels = [
        event
        for event in recorded.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return host, sum(event.time_range.elapsed_us() for event in kernels) * 1e-6 / repeats


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": fifths[0], "p50": statistics.median(values), "p80": fifths[3]}


def floor_fields(floor_s: float, measured_s: float) -> dict[str, Any]:
    """What a record says of the floor."""
    share = floor_s / measured_s
    return {"floor_s": floor_s, "of_floor": share, "ceilings": ceilings()._asdict()}


def pair(
    suite: str,
    case: Mapping[str, Any],
    times: Times,
    *,
    floor_s: float | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """One record a peer: its time and ours (the contender called "ours"), and their ratio."""
    own = times["ours"]
    records = []
    for peer, seconds in times.items():
        if peer == "ours":
            continue
        ratios = [p / o for p, o in zip(seconds, own, strict=True)]
        record = {
            "suite": suite,
            "case": dict(case),
            "peer": peer,
            "rounds": len(own),
            "ours_s": quantiles(own),
            "peer_s": quantiles(seconds),
            "ratio": quantiles(ratios),
        }
        if floor_s is not None:
            record |= floor_fields(floor_s, statistics.median(own))
        if notes and peer in notes:
            record["note"] = notes[peer]
        records.append(record)
    return records


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def check(what: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Leave unless the relative error is within ``tolerance``: a wrong result is not timed."""
    error = relative_error(got, want)
    if not error <= tolerance:
        raise SystemExit(f"{what} is off by {error:.2g} (allowed {tolerance:.2g})")


def twice_the_error(plain: torch.Tensor, exact: torch.Tensor) -> float:
    """The tolerance by two references: ``plain`` has ours' dtype, ``exact`` a wider one."""
    return 2 * relative_error(plain, exact) + 1e-6
