"""Where `patch` analyses and estimates, on the accelerator if the model fits there; what fits."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .sharding import is_sharded, process_device

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Beside the weights: a fifth for what a small batch keeps, and what CUDA and its libraries take.
_MARGIN = 1.2
_LEAST_FREE = 2 * 10**9


def device_to_use(named: str | torch.device | None = None) -> str | torch.device:
    """The device that is named; else CUDA where there is one that computes, else the CPU."""
    if named:
        return named
    return "cuda" if torch.cuda.is_available() and computes(torch.device("cuda")) else "cpu"


def accelerator() -> tuple[torch.device, int] | None:
    """This process's accelerator and its free bytes; None if there is none that tells them."""
    device = process_device()
    free = None if device is None else free_bytes(device)
    return (device, free) if device and free is not None and computes(device) else None


def computes(device: torch.device) -> bool:
    """Whether this build of torch has kernels for a device; if not, that is logged.

    It finds the device and fills its memory all the same: builds for CUDA 12.8 and later have none
    for cards before the T4, such as a P100.
    """
    try:
        return _computes(device)
    except RuntimeError:  # its memory is full, which tells nothing: another time it is tried again
        return True


@functools.cache
def _computes(device: torch.device) -> bool:
    try:
        (torch.zeros(1, device=device) + 1).item()
    except RuntimeError as error:
        if memory_is_full(error):
            raise
        reason = str(error).partition("\n")[0]
        logger.warning("%s is left alone, since this torch cannot use it: %s", device, reason)
        return False
    return True


def free_bytes(device: torch.device) -> int | None:
    """What a device has free, or this process holds without using it; None if it does not tell."""
    if device.type == "cpu":
        return None
    module: Any = torch.get_device_module(device)
    ask = getattr(module, "mem_get_info", None)
    if ask is None:  # MPS
        return None
    try:
        free = ask(device)[0]
    except RuntimeError:  # some of Intel's do not tell
        return None
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def warn_of_slow_products(weight: Tensor | None) -> None:
    """Log where a model's 16-bit weights lie on a CPU that has no instructions for their products.

    transformers loads what a checkpoint holds, bfloat16 mostly. Without AVX-512 or AMX oneDNN does
    not multiply it, and torch's own loops take 7 times as long as float32's forwards and 65 times
    backwards (docs/troubleshooting.md).
    """
    if weight is None or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(weight.dtype)
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported", None)
    if supported is not None and not supported():
        logger.warning(
            "this CPU has no instructions for products of %s, which take many times as long as "
            "float32's: load the model with dtype=torch.float32 (or .float()), or on a GPU.",
            str(weight.dtype).removeprefix("torch."),
        )


# What libraries say of full memory. Not Triton's OutOfResources: that is the kernel's own size.
_MEMORY_FULL = (
    "out of memory",
    "can't allocate memory",
    "cudaErrorMemoryAllocation",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def memory_is_full(error: Exception) -> bool:
    """Whether that is what an error of torch, Triton or CUDA's libraries says."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in _MEMORY_FULL
    )


def computed_if_it_fits(compute: Callable[[], T], what: str, *, halves: bool) -> T | None:
    """What ``compute`` gives; None if memory was full, so that half of ``what`` should be tried.

    Args:
        compute: of what.
        what: in the plural, for the log.
        halves: whether there can be half as many; if not the error is raised.
    """
    try:
        return compute()
    except Exception as error:
        # Triton and cuBLAS ask for memory of their own, and say so in other words.
        if not halves or not memory_is_full(error):
            raise
        logger.warning(
            "%s do not fit into the device's memory at once: half as many at a time from now on "
            "(%s)",
            what,
            str(error),  # a handler may keep the record, and an error keeps what it stopped
        )
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()  # now that the error and what it held are gone
    return None


@contextlib.contextmanager
def on_accelerator(model: nn.Module) -> Iterator[bool]:
    """A model that lies on the CPU, on the accelerator if it fits there; put back whatever happens.

    It gives whether the model is there.

    The tensors on the CPU are kept and put back as they were, so that whatever shares them still
    does. A model that something else has placed, split or quantized stays where it is.
    """
    device = _device_for(model)
    if device is None:
        yield False
        return
    homes = [(tensor, tensor.data) for tensor in _tensors(model)]
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    try:
        for tensor, home in homes:
            tensor.data = home.to(device, copy=True)
        with torch.accelerator.device_index(device.index):
            yield True
    finally:
        for tensor, home in homes:
            tensor.data = home
        for now, before in buffers:  # rotary embeddings may register new ones as they run
            now.clear()
            now.update(before)
        torch.accelerator.empty_cache()  # other processes may want it


def _device_for(model: nn.Module) -> torch.device | None:
    """Where a model should be moved; None for one that stays."""
    tensors = _tensors(model)
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    found = accelerator()
    if found is None:
        return None
    device, free = found
    reason = _why_it_stays(model, tensors)
    if reason is None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size * _MARGIN + _LEAST_FREE <= free:
            logger.info("running on %s; the model goes back to the CPU afterwards", device)
            return device
        reason = f"its {size / 1e9:.1f} GB do not fit the {free / 1e9:.1f} GB that are free there"
    logger.warning("the model is run on the CPU and not on %s: %s", device, reason)
    return None


def _tensors(model: nn.Module) -> list[Tensor]:
    """Each parameter and buffer once, however many modules share it."""
    return [*model.parameters(), *model.buffers()]


def _why_it_stays(model: nn.Module, tensors: list[Tensor]) -> str | None:
    """What speaks against moving a model by its tensors."""
    modules = list(model.modules())
    if any(getattr(module, "hf_device_map", None) for module in modules):
        return "it has a device map"
    if any(hasattr(module, "_hf_hook") for module in modules):
        return "accelerate's hooks place its tensors"
    if any(getattr(module, "is_quantized", False) is True for module in modules):
        return "it is quantized"
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules):
        return "DistributedDataParallel is around it"
    if any(map(is_sharded, tensors)):
        return "its weights are split between processes"
    plain = (Tensor, nn.Parameter)
    other = [t for t in tensors if type(t) not in plain or type(t.data) is not Tensor]
    return f"it has weights of type {type(other[0]).__name__}" if other else None
