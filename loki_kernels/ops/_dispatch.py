"""Which implementation runs an op: `Backend`, `backends`, and the registration of the ops.

An op is known to torch by one schema, ``loki_kernels::<op>``, with a fake implementation and, where
it has gradients, ``loki_kernels::<op>_backward``. What runs is a module of the op's folder,
``torch_impl``, ``triton_impl``, ``cuda_impl`` or ``cpp_impl``, chosen at each call. The choice is
made inside the op, where tensors are real, so that ``torch.compile`` sees one opaque call whatever
is chosen.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch import library as torch_library

from .. import _native
from ..errors import check_choice, explained
from ..placement import memory_is_full
from ._call import add_gradient, add_step
from ._check import KERNEL_DTYPES, check_first_derivative, without_autocast
from ._example import Draw, Example
from ._table import Backends

logger = logging.getLogger(__name__)

Backend = Literal["cuda", "triton", "cpp", "torch"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
ENVIRONMENT_VARIABLE = "LOKI_KERNELS_BACKEND"

_library = torch_library.Library("loki_kernels", "DEF")
_ops: list[str] = []


def register(
    op: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    step: Literal["forward", "backward"] = "forward",
) -> None:
    """Make ``torch.ops.loki_kernels.<op>`` (``<op>_backward``) run the chosen backend's ``step``.

    ``schema`` is that of the step without its last argument, the backend. A backward step takes
    the gradient and then the forward's inputs, by which both steps choose alike. Autocast is off
    inside: an op computes in what its schema promises for the dtypes it was given, on any backend.
    """
    inputs_from = 0 if step == "forward" else 1
    arguments, result = schema.split(" -> ")
    name = op if step == "forward" else f"{op}_{step}"
    _library.define(f"{name}({arguments.strip('()')}, str? backend) -> {result}")

    def run(*args: Any) -> Any:
        *inputs, backend = args
        chosen = choose(op, backend, inputs[inputs_from:])
        with without_autocast(_first_tensor(inputs)):
            return getattr(chosen, step)(*inputs)

    _library.impl(name, run, "CompositeExplicitAutograd")
    add_step(name, run)
    torch_library.register_fake(
        f"loki_kernels::{name}", lambda *args: fake(*args[:-1]), lib=_library
    )
    if step == "forward":
        _ops.append(op)


def register_autograd(
    op: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Make ``torch.ops.loki_kernels.<op>`` differentiable, once."""

    def first(ctx: Any, *grads: Any) -> Any:
        check_first_derivative()
        return backward(ctx, *grads)

    torch_library.register_autograd(
        f"loki_kernels::{op}", first, setup_context=setup_context, lib=_library
    )
    add_gradient(op, setup_context, first)


def check_backend(backend: str | None) -> None:
    """Raise ValueError unless ``backend`` is None or one of `BACKENDS`."""
    if backend is not None:
        check_choice("backend", backend, BACKENDS)


def choose(op: str, backend: str | None, inputs: list[Any]) -> ModuleType:
    """The module that runs ``op`` on ``inputs``.

    A backend named by the call runs or raises. One named by ``$LOKI_KERNELS_BACKEND`` must be
    usable on this machine, and runs every call it has a kernel for; tensors on a device that it
    is not for are treated as under ``auto``, which takes the first that has passed its self-check
    on the device. Everything else runs on torch.

    Raises:
        RuntimeError: if a backend asked for by name cannot run here, or not with these inputs.
        ValueError: if ``$LOKI_KERNELS_BACKEND`` names no backend.
    """
    first = _first_tensor(inputs)
    if backend is not None:
        reason = _why_not(op, backend, first.device, inputs)
        if reason is not None:
            message = f"{op} cannot run on backend={backend!r}: {reason}"
            raise explained(RuntimeError(message))
        return _module(op, backend)
    preferred = _preferred(first.device)
    for candidate in (preferred,) if preferred else _candidates(first.device):
        if _why_not(op, candidate, first.device, inputs) is None and (
            preferred or _self_check(op, candidate, first.device, first.dtype) is None
        ):
            return _module(op, candidate)
    return _module(op, "torch")


def has_kernel(op: str, inputs: list[Any]) -> bool:
    """Whether a kernel runs ``op`` on ``inputs``, and not torch."""
    return choose(op, None, inputs) is not _module(op, "torch")


def _preferred(device: torch.device) -> str | None:
    """What ``$LOKI_KERNELS_BACKEND`` names for tensors on ``device``; None: ``auto``."""
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if name == "auto":
        return None
    if name not in BACKENDS:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}={name!r} is unknown; choose auto, {', '.join(BACKENDS)}."
        )
    if _backend_why_not(name, device) is None:
        return name
    reason = _backend_why_not(name, _device_of(name))
    if reason is not None:
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE}={name} cannot be used: {reason}")
    return None


def _first_tensor(inputs: list[Any]) -> Tensor:
    """The first input, or the first of the list that it is."""
    return inputs[0][0] if isinstance(inputs[0], list) else inputs[0]


def _candidates(device: torch.device) -> tuple[Backend, ...]:
    """Those that ``auto`` tries before torch, in this order."""
    return ("cpp",) if device.type == "cpu" else ("cuda", "triton")


def _why_not(op: str, backend: str, device: torch.device, inputs: list[Any]) -> str | None:
    reason = _no_kernel(op, backend, device)
    if reason is None and backend != "torch":
        reason = _module(op, backend).unsupported(*inputs)
    return reason


def _no_kernel(op: str, backend: str, device: torch.device) -> str | None:
    if not _exists(op, backend):
        return f"it has no {backend} implementation."
    return _backend_why_not(backend, device)


@functools.cache
def _exists(op: str, backend: str) -> bool:
    return importlib.util.find_spec(f"{__package__}.{op}.{backend}_impl") is not None


@functools.cache
def _module(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{op}.{backend}_impl")


@functools.cache
def _backend_why_not(backend: str, device: torch.device) -> str | None:
    """Why nothing of ``backend`` can run on ``device``; None if it can."""
    if backend == "torch":
        return None
    if backend == "cpp":
        return _native.why_not("cpp") if device.type == "cpu" else "it runs on CPU tensors."
    if backend == "cuda":
        return _native.why_not("cuda") or _gpu_why_not(device)
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'triton>=3.6')."
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return _gpu_why_not(device) or _triton_why_not()


def _triton_why_not() -> str | None:
    try:
        importlib.import_module("triton.language")
        importlib.import_module(f"{__package__}._triton")
    except Exception as error:  # its libraries are not here, or it is too old (3.3 has no knobs)
        return f"triton cannot be imported ({type(error).__name__}: {error})."
    return None


def _gpu_why_not(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}."
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0."
    return None


_Key = tuple[str, str, torch.device, torch.dtype]  # op, backend, device, dtype
_checks: dict[_Key, str | None] = {}
_check_lock = threading.Lock()
_postponed: dict[_Key, tuple[float, float]] = {}  # not before this time; how long that wait was
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 64.0  # seconds


def _self_check(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None once the kernel has agreed with the reference here; otherwise what went wrong.

    Runs once a process, device and dtype. It runs in a thread of its own, which has none of the
    caller's autograd, autocast, inference-mode or tracing state. Full memory is no verdict: the
    check runs again after a second, and then after twice the last wait. Nor does it start while a
    CUDA graph is captured, where it would be recorded or end the capture.
    """
    key = (op, backend, device, dtype)
    if key in _checks:
        return _checks[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "it is not checked yet, and a CUDA graph is being captured."
    with _check_lock:
        due, wait = _postponed.get(key, (0.0, _FIRST_WAIT / 2))
        if key not in _checks and time.monotonic() >= due:
            thread = threading.Thread(target=_check, args=(key, min(2 * wait, _LONGEST_WAIT)))
            thread.start()
            thread.join()
        return _checks.get(key, "memory was full when it was checked.")


def _check(key: _Key, wait: float) -> None:
    """Put the verdict into `_checks`; after full memory there is none for ``wait`` seconds."""
    op, backend, device, dtype = key
    try:
        result = _compare(op, backend, device, dtype)
    except Exception as error:
        logger.warning(
            "memory was full when the %s kernel of %s was to be checked on %s in %s (%s: %s); "
            "torch runs instead, and the check again in %g s at the earliest.",
            backend,
            op,
            device,
            dtype,
            type(error).__name__,
            error,
            wait,
        )
        _postponed[key] = time.monotonic() + wait, wait
        return
    _checks[key] = result
    if result is not None:
        logger.warning(
            "the %s kernel of %s failed its self-check on %s in %s (%s); torch runs instead. "
            "Please report this.",
            backend,
            op,
            device,
            dtype,
            result,
        )


def warm_up(ops: Iterable[str], device: torch.device, dtype: torch.dtype) -> None:
    """Check now what ``auto`` would check at the first call of each op on ``device`` in ``dtype``.

    That call may come while a CUDA graph is captured or memory is full. Does nothing where a
    backend is named or ``auto`` has torch alone, and for a dtype that no kernel takes.
    """
    if dtype not in KERNEL_DTYPES:
        return
    if device.type == "cuda" and device.index is None:  # as tensors there say it
        device = torch.device("cuda", torch.cuda.current_device())
    if _preferred(device) is not None:
        return
    for op in ops:
        for backend in _candidates(device):
            if _no_kernel(op, backend, device) is None and (
                _self_check(op, backend, device, dtype) is None
            ):
                break


def _compare(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What `_self_check` returns. Raises only when memory is full."""
    try:
        public = getattr(importlib.import_module(__package__), op)
        definition = getattr(_reference(op), f"{op}_reference")
        inputs, differentiable = example(op, device, dtype)
        exact = _evaluate(definition, _double(inputs), differentiable)
        plain = _evaluate(definition, inputs, differentiable)
        ours = _evaluate(functools.partial(public, backend=backend), inputs, differentiable)
        for i, (got, same, best) in enumerate(zip(ours, plain, exact, strict=True)):
            error, allowed = _error(got, best), 2 * _error(same, best) + 1e-6
            if not error <= allowed:
                return f"result {i}: relative error {error:.2g}, allowed {allowed:.2g}"
    except Exception as error:  # a kernel that does not compile here must not end the training
        if memory_is_full(error):
            raise
        return f"{type(error).__name__}: {error}"
    return None


def compare_all(backend: Backend, dtype: torch.dtype) -> dict[str, str | None]:
    """Compare every kernel of ``backend`` with its reference now, on the device it is for.

    Returns, for every op that has such a kernel, what went wrong; None where they agree.
    """
    device = _device_of(backend)
    return {op: _compare(op, backend, device, dtype) for op in _ops if _exists(op, backend)}


def why_not(backend: Backend) -> str | None:
    """Why nothing of ``backend`` can run on this machine; None if something can."""
    return _backend_why_not(backend, _device_of(backend))


def _reference(op: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{op}.reference")


def example(op: str, device: torch.device, dtype: torch.dtype) -> Example:
    """A small case of ``op``, the same on any device."""
    with torch.device("cpu"):  # whatever the default device, the numbers are drawn here
        return _reference(op).example(Draw(device, dtype))


def _evaluate(
    function: Callable[..., Any], inputs: dict[str, Any], differentiable: tuple[str, ...]
) -> list[Tensor]:
    """Outputs, and gradients of their weighted sum."""
    inputs = {n: _map(lambda x: x.detach().clone(), x) for n, x in inputs.items()}
    leaves = [inputs[name].requires_grad_() for name in differentiable]
    outputs = function(**inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    results = [output.detach() for output in outputs]
    if leaves:
        total = sum(
            (y.double() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum()
            for y in outputs
        )
        # In this thread: the device's own may be the one that waits for this check, inside the
        # backward pass of a reentrant checkpoint.
        with torch.autograd.set_multithreading_enabled(False):
            results += torch.autograd.grad(total, leaves)
    return results


def _double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        n: _map(lambda x: x.double() if x.is_floating_point() else x, x) for n, x in inputs.items()
    }


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` applied, if it is a tensor or a list of them."""
    if isinstance(value, list):
        return [function(x) for x in value]
    return function(value) if isinstance(value, Tensor) else value


def _error(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def backends() -> Backends:
    """For every op, what each backend's state is on the current device (``cpp``: on the CPU).

    The result is a dict of dicts, ``backends()[op][backend]``, that prints as a table.

    ``"live"`` runs; ``"verified"`` is a kernel that has passed its self-check in this process; the
    rest says why not. The environment variable ``LOKI_KERNELS_BACKEND`` (``auto``, ``cuda``,
    ``triton``, ``cpp``, ``torch``) chooses for all ops, ``backend=`` for one call.
    """
    return Backends(
        {op: {name: _state(op, name, _device_of(name)) for name in BACKENDS} for op in _ops}
    )


def _device_of(backend: str) -> torch.device:
    """The device of this machine that ``backend`` is for."""
    if backend != "cpp" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _state(op: str, backend: Backend, device: torch.device) -> str:
    if backend == "torch":
        return "live"
    reason = _no_kernel(op, backend, device)
    if reason is not None:
        return f"not live: {reason}"
    if device.type == "cpu" and backend == "triton":
        return "live for tests only: triton's interpreter"
    results = {
        key[3]: result for key, result in _checks.items() if key[:3] == (op, backend, device)
    }
    failed = [f"{dtype}: {result}" for dtype, result in results.items() if result is not None]
    if failed:
        return f"failed its self-check: {'; '.join(failed)}"
    checked = ", ".join(str(dtype).removeprefix("torch.") for dtype in results)
    return f"verified in {checked}" if checked else "checked at first use"
