"""``python -m benchmarks peers``: the ops against what other libraries have for the same.

A peer is in its op's file and imports its library when it is asked for. One that is not installed,
or does not run here, is left out with the reason; so is one whose result or gradient is not the
reference's. The step "both" is a forward and a backward pass, since libraries divide the work
between the two in different ways.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from loki_kernels import ops
from loki_kernels.ops import _dispatch

from ..measure import DEVICE, DTYPE, DTYPE_NAME, attempt, relative_error
from .suite import Case, Work, check_results, expected, timed, title

# What compiles for long comes last: a run may be out of its time.
OPS = ("gated_product", "target_probability", "count_lowest", "shared_prefix_attention")
# A library may round more often than the reference does, and is not wrong for that.
TOLERANCE = 1e-4 if torch.float32 == DTYPE else 2e-2


def run(scope: str) -> Iterator[dict[str, Any]]:
    for op in OPS:
        module = importlib.import_module(f".{op}", __package__)
        shapes = getattr(module, "PEER_SHAPES", module.SHAPES)
        for shape in shapes["dry" if scope == "dry" else DEVICE.type]:
            described = {"op": op, **shape, "dtype": DTYPE_NAME}
            found = []
            with attempt(title(described)):
                torch.manual_seed(0)
                case = module.make_case(**shape)
                for record in compare(op, module, case, described, 2 if scope == "dry" else 5):
                    found.append(record)
                    yield record
            for line in verdicts(found):
                print(line, flush=True)


def compare(
    op: str, module: ModuleType, case: Case, described: dict[str, Any], rounds: int
) -> Iterator[dict[str, Any]]:
    """A record of each step of ours, of torch's and of every peer that agrees."""
    function = getattr(ops, op)
    own = {"ours": function, "torch": partial(function, backend="torch"), **case.peers}
    check_results(op, own, case)
    which = getattr(module, "PEER_RESULT", None)
    contenders = {name: _result(which, call) for name, call in own.items()}
    reference = _result(which, getattr(_dispatch._reference(op), f"{op}_reference"))
    exact, allowed = expected(reference, case)
    allowed = [max(TOLERANCE, most) for most in allowed]
    for name, make in module.PEERS.items():
        try:
            peer = make(case.inputs)
            results = _dispatch._evaluate(peer, case.inputs, case.differentiable)
        except Exception as error:  # whatever a library raises, the others are still timed
            print(f"{name}: not run, {title(described)}: {_first_line(error)}", flush=True)
            continue
        wrong = _disagreement(results, exact, allowed)
        if wrong:
            print(f"{name}: not timed, {title(described)}: {wrong}", flush=True)
            continue
        contenders[name] = peer
    del exact
    # Liger's backward pass writes over what the forward pass was given, so each has its own.
    inputs = {name: _copied(case) for name in contenders}
    calls = {name: partial(call, **inputs[name]) for name, call in contenders.items()}
    yield from timed(calls, described | {"step": "forward"}, case.forward, rounds)
    if case.backward is not None:
        for name, call in calls.items():
            leaves = [inputs[name][leaf] for leaf in case.differentiable]
            calls[name] = partial(_both, call, leaves, torch.randn_like(call()))
        least = Work(*map(sum, zip(case.forward, case.backward, strict=True)))
        yield from timed(calls, described | {"step": "both"}, least, rounds)


def verdicts(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    """How many times as long as ours each peer takes, a line for each."""
    ours: dict[str, Any] = {}
    for record in records:
        if record["peer"] == "ours":
            ours = record
            continue
        device, host = (record[x]["p50"] / ours[x]["p50"] for x in ("device_s", "host_s"))
        yield (
            f"{record['peer']}: {device:.3g} times ours on the device, {host:.3g} on the host, "
            f"{title(record['case'])}"
        )


def _result(which: int | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with one of its results alone, the only one that its peers have."""
    if which is None:
        return function
    return lambda **inputs: function(**inputs)[which]


def _disagreement(results: list[Tensor], exact: list[Tensor], allowed: list[float]) -> str | None:
    if len(results) != len(exact):
        return f"it has {len(results)} results and gradients, not {len(exact)}"
    for i, (got, want, most) in enumerate(zip(results, exact, allowed, strict=True)):
        if got.shape != want.shape:
            return f"result {i} is {list(got.shape)}, not {list(want.shape)}"
        error = relative_error(got, want)
        if not error <= most:
            return f"result {i} is off by {error:.2g} (allowed {most:.2g})"
    return None


def _copied(case: Case) -> dict[str, Any]:
    leaves = {name: case.inputs[name].clone().requires_grad_() for name in case.differentiable}
    return case.inputs | leaves


def _both(call: Callable[[], Tensor], leaves: list[Tensor], gradient: Tensor) -> Any:
    return torch.autograd.grad(call(), leaves, gradient)


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
