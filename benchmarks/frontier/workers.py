"""Processes that train groups of jobs on one device."""

from __future__ import annotations

import os
import queue
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .arms import Job
from .data import Data
from .laboratory import Laboratory
from .moments import Moments
from .train import train

MOMENTS = ".moments.safetensors"
_FAILURES = 8  # groups, after which something is wrong with all
_WAIT = 5.0  # seconds for an answer, before it is asked who is still there


class Pool:
    """Trains all groups; what a device's memory does not hold at once is halved.

    Args:
        folder: the model, the data and the moments.
        device: ``cuda`` or ``cpu``.
        bfloat16: whether they train under autocast.
        groups: of jobs of one arm, task and number of steps.
        processes: how many train at a time.

    Attributes:
        failed: how many groups were not trained for another reason than memory or time.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        bfloat16: bool,
        groups: Sequence[list[Job]],
        processes: int,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.failed = 0
        self._jobs, self._answers = context.Queue(), context.Queue()
        self._jobs.cancel_join_thread()  # what nobody has taken does not hold up the exit
        self._groups, self._out = deque(groups), 0
        count = min(processes, len(groups))
        threads = 2 if device == "cuda" else max(1, torch.get_num_threads() // max(1, count))
        arguments = (folder, device, bfloat16, threads, self._jobs, self._answers)
        self._make = lambda: context.Process(target=work, args=arguments, daemon=True)
        self._device = device
        self._workers = [self._make() for _ in range(count)]

    def run(self, seconds: float) -> Iterator[dict[str, Any]]:
        """A record of every training, as it is done, until ``seconds`` have passed."""
        end = time.monotonic() + seconds
        for worker in self._workers:
            worker.start()
            self._give()
        while self._out and self.failed <= _FAILURES:
            left = end - time.monotonic()
            if left <= 0:
                print("out of time", flush=True)
                break
            try:
                answer = self._answers.get(timeout=min(left, _WAIT))
            except queue.Empty:
                if not self._go_on():
                    break
                continue
            self._out -= 1
            if "error" in answer:
                self._mend(answer["error"], answer["group"])
            else:
                yield from answer["records"]
            self._give()
        for worker in self._workers:
            worker.kill()

    def _go_on(self) -> bool:
        """Whether somebody works on, without the group of each process that a signal has ended.

        Full memory ends one, so no other is started in its place.
        """
        for worker in [w for w in self._workers if w.exitcode]:
            self._workers.remove(worker)
            print(f"a process was killed ({worker.exitcode}); perhaps by full memory", flush=True)
            self.failed += 1
            self._out -= 1
            if worker.exitcode > 0:  # what one cannot start with none can
                return False
        return any(worker.exitcode is None for worker in self._workers)

    def _give(self) -> None:
        if self._groups:
            self._jobs.put(self._groups.popleft())
            self._out += 1

    def _mend(self, error: str, group: list[Job]) -> None:
        middle = len(group) // 2
        # an error within a capture can stand in the place of the one that ended it
        if middle and "out of memory" in error.lower():
            self._groups.extendleft([group[middle:], group[:middle]])
        else:
            print(error[-3000:], sorted({job.arm_name for job in group}), flush=True)
            self.failed += 1
        if self._device == "cuda":
            self._workers.append(self._make())
            self._workers[-1].start()


def work(
    folder: Path,
    device: str,
    bfloat16: bool,
    threads: int,
    jobs: Any,
    answers: Any,
) -> None:
    """A process: takes groups of jobs, until one fails on a GPU.

    A capture that fails leaves its memory taken and its stream the current one.
    """
    torch.set_num_threads(threads)
    lab = laboratory(folder, device, bfloat16)
    while True:
        group = jobs.get()
        start = time.monotonic()
        try:
            found = train(group, lab)
        except Exception:
            answers.put({"error": traceback.format_exc(), "group": group})
            if device == "cuda":
                answers.close()
                answers.join_thread()
                os._exit(0)  # what a broken capture leaves behind may abort an orderly exit
            continue
        seconds = round((time.monotonic() - start) / len(group), 2)
        records = [
            job.spec() | figures | {"seconds": seconds}
            for job, figures in zip(group, found, strict=True)
        ]
        answers.put({"records": records})
        if device == "cuda":
            torch.cuda.empty_cache()  # the other processes' as much as this one's


def laboratory(folder: Path, device: str, bfloat16: bool) -> Laboratory:
    torch.set_float32_matmul_precision("high")  # TF32 products on a GPU; storage stays float32
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).to(device)
    data = Data.load(folder / "data.safetensors").to(device)
    return Laboratory(base, data, _read_moments(folder, device), bfloat16)


def _read_moments(folder: Path, device: str) -> dict[str, Moments]:
    read = {}
    for path in folder.glob(f"*{MOMENTS}"):
        moments = Moments({}, {}, {})
        for key, tensor in load_file(path, device=device).items():
            part, _, layer = key.partition(":")
            getattr(moments, part)[layer] = tensor
        read[path.name.removesuffix(MOMENTS)] = moments
    return read
