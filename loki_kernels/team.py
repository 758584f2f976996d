"""Processes of torch.distributed that share one job."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from .sharding import device_of_the_group, is_distributed

logger = logging.getLogger(__name__)

_jobs = itertools.count()  # the same in all processes, if each takes part in every job

_POLL = 0.02  # seconds
_PATIENCE = 60.0  # seconds, after which it is said who is waited for
_SAME_PROMPTS = "all have to attribute the same prompts (share=False attributes in one alone)"
_PART = 1 << 24  # elements added up at a time
_BITS = {4: torch.int32, 8: torch.int64}


class Team(contextlib.AbstractContextManager["Team"]):
    """All processes of the default group, or this one alone.

    They tell each other how far they are by the group's key-value store, and use a collective only
    once all have finished: a collective would wait for a process that has failed. A block of the
    team that raises in one process ends the others' too.

    Attributes:
        rank, size: of the group.
    """

    def __init__(self, *, share: bool = True) -> None:
        """``share=False``: alone, whatever there is."""
        self.rank, self.size = 0, 1
        if share and is_distributed():
            self.rank = torch.distributed.get_rank()
            self.size = torch.distributed.get_world_size()
        if self.size > 1:
            store = torch.distributed.distributed_c10d._get_default_store()
            prefix = f"loki_kernels/{next(_jobs)}"
            self._store = torch.distributed.PrefixStore(prefix, store)  # type: ignore[attr-defined]
        self._meetings = itertools.count()
        self._loads = [0.0] * self.size
        self._seen = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and self.size > 1:
            memory = isinstance(error, torch.OutOfMemoryError)
            text = f"{'memory' if memory else 'other'} {self.rank} {type(error).__name__}: {error}"
            self._store.compare_set("failed", "", text)

    def check(self) -> None:
        """
        Raises:
            RuntimeError: if another process has failed; OutOfMemoryError if it had no memory left.
        """
        if self.size > 1 and self._store.check(["failed"]):
            why, rank, text = self._store.get("failed").decode().split(" ", 2)
            kind = torch.OutOfMemoryError if why == "memory" else RuntimeError
            raise kind(f"process {rank}, which shares this job, failed with {text}")

    def meet(self, why: str = _SAME_PROMPTS) -> None:
        """Wait for all; raise like `check` if one fails meanwhile. A long wait is logged."""
        self._wait(why)
        self.check()

    def _wait(self, why: str = _SAME_PROMPTS) -> None:
        if self.size == 1:
            return
        key, start, said = f"met/{next(self._meetings)}", time.monotonic(), False
        self._store.add(key, 1)
        while self._store.add(key, 0) < self.size:
            self.check()
            time.sleep(_POLL)
            if not said and time.monotonic() - start > _PATIENCE:
                said = True
                logger.warning(
                    "process %d of %d waits for the others: %s", self.rank, self.size, why
                )

    def agree(self, key: str, value: str, what: str) -> None:
        """
        Raises:
            ValueError: if another process has given another value.
        """
        if self.size > 1 and self._store.compare_set(key, "", value).decode() != value:
            raise ValueError(
                f"this process attributes {what} than another one. Give every process the same "
                "(share=False attributes in each by itself)."
            )

    def all(self, flag: bool) -> bool:
        """Whether it is true in every process."""
        if self.size == 1:
            return flag
        key = f"all/{next(self._meetings)}"
        self._store.add(key, int(flag))
        self._wait()  # and no more: another may end by what it is told here
        return bool(self._store.add(key, 0) == self.size)

    def tell(self, mine: str, why: str = _SAME_PROMPTS) -> list[str]:
        """What every process says, by rank."""
        if self.size == 1:
            return [mine]
        key = f"told/{next(self._meetings)}"
        self._store.set(f"{key}/{self.rank}", mine)
        self.meet(why)
        return [self._store.get(f"{key}/{rank}").decode() for rank in range(self.size)]

    def advance(self, count: int) -> int:
        """Say that so much more is done; what all have done since this process asked last."""
        if self.size == 1:
            return count
        done = int(self._store.add("done", count))
        new, self._seen = done - self._seen, done
        return new

    def share(self, costs: Sequence[float]) -> list[bool]:
        """Which parts of a job are this process's."""
        return [owner == self.rank for owner in share_out(costs, self._loads)]

    def add_up(self, tensor: Tensor) -> None:
        """The sum over all processes, in place of a tensor on the CPU.

        Its bits are added as integers: exact for integers, and for numbers that are zero in all
        processes but one.
        """
        if self.size == 1:
            return
        device = device_of_the_group()
        for part in tensor.view(-1).view(_BITS[tensor.element_size()]).split(_PART):
            summed = part.to(device)
            torch.distributed.all_reduce(summed)
            part.copy_(summed)


def share_out(costs: Sequence[float], loads: list[float]) -> list[int]:
    """Whose each part of a job is, who has the least to do so far; its cost goes into ``loads``."""
    owners = []
    for cost in costs:
        owners.append(loads.index(min(loads)))
        loads[owners[-1]] += cost
    return owners
