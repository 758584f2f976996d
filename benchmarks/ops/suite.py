"""Every op on every backend that runs here: the time until a call returns, and the device's own.

An op's file beside this one, named as the op, makes its inputs and counts its least work. Before
an op is timed, each backend's results and gradients are compared with the reference's: they may be
twice as far from it in a wider dtype as the reference in the same dtype is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loki_kernels import ops
from loki_kernels.ops import _dispatch

from ..measure import (
    DEVICE,
    DTYPE,
    DTYPE_NAME,
    attempt,
    check,
    floor,
    floor_fields,
    interleave_host_and_device,
    quantiles,
    twice_the_error,
)

# `row_masked_linear` has a suite of its own.
OPS = tuple(name for name in ops.__all__ if name.islower() and name != "row_masked_linear")


class Work(NamedTuple):
    """The least that a step has to compute, and to read and write."""

    flops: float
    bytes: float


class Case(NamedTuple):
    """An op's keyword arguments on the device under test, and what they cost at least.

    ``backward`` is None for an op without gradients; ``differentiable`` names the arguments that
    have one. ``peers`` are what torch has for the same, called as the op is.
    """

    inputs: dict[str, Any]
    forward: Work
    backward: Work | None = None
    differentiable: tuple[str, ...] = ()
    peers: Mapping[str, Callable[..., Any]] = {}


def normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def some_of(count: int, k: int) -> Tensor:
    """The indices of k rows of ``count``, in order."""
    return torch.randperm(count, device=DEVICE)[:k].sort().values


def run(scope: str) -> Iterator[dict[str, Any]]:
    for op in OPS:
        module = importlib.import_module(f".{op}", __package__)
        for shape in module.SHAPES["dry" if scope == "dry" else DEVICE.type]:
            described = {"op": op, **shape, "dtype": DTYPE_NAME}
            with attempt(title(described)):
                torch.manual_seed(0)
                case = module.make_case(**shape)
                # an op composed of others runs on the backends of one of them
                backends = backends_of(getattr(module, "BACKENDS_OF", op))
                yield from measure_case(op, backends, case, described, 2 if scope == "dry" else 5)


def title(described: dict[str, Any]) -> str:
    """A case in a line."""
    rest = " ".join(f"{name}={value}" for name, value in described.items() if name != "op")
    return f"{described['op']} {rest}"


def backends_of(op: str) -> list[str]:
    """Those that run on the device under test."""
    return [b for b in _dispatch.BACKENDS if _dispatch._no_kernel(op, b, DEVICE) is None]


def measure_case(
    op: str, backends: list[str], case: Case, described: dict[str, Any], rounds: int
) -> Iterator[dict[str, Any]]:
    """A record of each step and backend."""
    function = getattr(ops, op)
    contenders = {name: partial(function, backend=name) for name in backends} or {"torch": function}
    contenders |= case.peers
    check_results(op, contenders, case)
    leaves = [case.inputs[name].requires_grad_() for name in case.differentiable]
    calls = {name: partial(function, **case.inputs) for name, function in contenders.items()}
    yield from timed(calls, described | {"step": "forward"}, case.forward, rounds)
    if case.backward is not None:
        for name, call in calls.items():
            result = call()
            result = result if isinstance(result, Tensor) else result[0]
            gradient = torch.randn_like(result)
            calls[name] = partial(torch.autograd.grad, result, leaves, gradient, retain_graph=True)
        yield from timed(calls, described | {"step": "backward"}, case.backward, rounds)


def check_results(op: str, contenders: Mapping[str, Callable[..., Any]], case: Case) -> None:
    """Leave if one of them is wrong: it is not timed."""
    exact, allowed = expected(getattr(_dispatch._reference(op), f"{op}_reference"), case)
    for name, function in contenders.items():
        found = _dispatch._evaluate(function, case.inputs, case.differentiable)
        for i, (got, want, most) in enumerate(zip(found, exact, allowed, strict=True)):
            check(f"result {i} of {op} on {name}", got, want, most)


def expected(reference: Callable[..., Any], case: Case) -> tuple[list[Tensor], list[float]]:
    """The results and gradients in a wider dtype, and how far from each one may be."""
    wide = torch.float64 if torch.float32 == DTYPE else torch.float32

    def widened(x: Tensor) -> Tensor:
        return x.to(wide) if x.is_floating_point() else x

    wider = {name: _dispatch._map(widened, value) for name, value in case.inputs.items()}
    exact = _dispatch._evaluate(reference, wider, case.differentiable)
    del wider
    plain = _dispatch._evaluate(reference, case.inputs, case.differentiable)
    return exact, list(map(twice_the_error, plain, exact))


def timed(
    calls: Mapping[str, Callable[[], Any]], described: dict[str, Any], least: Work, rounds: int
) -> Iterator[dict[str, Any]]:
    """A record of each call."""
    host, device = interleave_host_and_device(calls, rounds)
    for name in calls:
        times = {"host_s": quantiles(host[name]), "device_s": quantiles(device[name])}
        yield {
            "suite": "ops",
            "case": described,
            "peer": name,
            "rounds": rounds,
            **times,
            **floor_fields(floor(*least), times["device_s"]["p50"]),
        }
