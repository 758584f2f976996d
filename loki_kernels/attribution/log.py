"""Results as they come, in a log on disk that outlives the process."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from ..errors import explained
from ..files import (
    atomic_path,
    lock,
    read_safetensors,
    reserve,
    sync_folder,
    write_safetensors,
)
from ..sharding import of_the_first
from ..team import Team
from .plan import BatchLimits, PlannedBatch
from .result import Attribution, AttributionCounts, counts_metadata, scores_metadata
from .scores import Counter, Scores
from .store import Layout

logger = logging.getLogger(__name__)

_FORMAT = "loki-kernels-log"
_DTYPES = {"<f4": "F32", "<i8": "I64"}  # numpy's and safetensors'
# Counts are kept on disk this often; what is counted since is counted again by the next process.
_SECONDS_BETWEEN_COUNTS = 30.0
# Room in the header for what is only known at the end: shapes, and where the run was continued.
_ROOM = 4096
_MOST_MACHINES = 8
_COPIED = 1 << 24  # bytes at a time
_MEASURED = " (another device measures other last bits: save the tensor once, pass what was saved)"


class Log(contextlib.AbstractContextManager["Log"]):
    """Results on disk, which a process that comes after a killed one continues.

    They lie in a folder beside the file that they become. ``run.json`` says what is computed. Each
    array of the result is a file, with every prompt's row at its place. A journal, one of each
    process, has a line for every batch of which all is written, with a hash of its prompts and a
    checksum of its rows. What has a wrong checksum counts as not written, so nothing has to be
    written in one piece, or in order. Counts cannot be taken back: they are kept together with the
    number of journal lines that they are of, and lines beyond those count as not written.
    """

    def __init__(
        self,
        out: Path,
        layout: Layout,
        run: dict[str, Any],
        counter: Counter | None,
        limits: BatchLimits,
        identity: dict[str, Any],
        machine: dict[str, str],
        team: Team,
    ) -> None:
        """
        Args:
            out: the ``.safetensors`` file, which can be written.
            layout: of the result.
            run: the result's.
            counter: of ``keep="counts"``.
            limits: of the batches; those of the first process stay in force.
            identity: what a process must have in common with those before it, as JSON values.
            machine: what it should have in common with them for the same bits.
            team: the processes that write it together.
        """
        self.out = out
        self.layout, self.run, self.counter, self.limits = layout, run, counter, limits
        self.folder = self.out.with_name(f"{self.out.name}.partial")
        self.id = uuid.uuid4().hex
        self._identity, self._machine, self.team = identity, machine, team
        self._machines: list[dict[str, str]] = []
        # The file of the scores becomes the result: room for its header comes first.
        self._space = _ROOM * (2 + len(self._header(10**15)) // _ROOM)
        self._done: dict[int, dict[str, Any]] = {}  # the batches' lines
        self._files: dict[str, io.FileIO] = {}
        self._stack = contextlib.ExitStack()
        self._lines = self._kept_lines = 0
        self._kept_at = time.monotonic()
        self._counted = True  # whether the counter has what `_lines` are of
        self._counts: list[Tensor] = []
        self._finished = self._complete = False

    def __enter__(self) -> Log:
        """
        Raises:
            ValueError: if the folder there is of another run.
            RuntimeError: if another process writes it now.
        """
        first = self.team.rank == 0
        with contextlib.ExitStack() as stack:
            if first:
                self.folder.mkdir(exist_ok=True)
                self._lock(stack)
                self._agree()
            self.team.meet()
            if not first:
                self._agree()
            self._read()
            self._finished = self._is_finished()
            numbers = [int(path.stem.split("-")[0]) for path in self._journals()]
            name = f"{1 + max(numbers, default=-1):06d}-{self.team.rank:04d}.jsonl"
            self.team.meet()  # before anything of this run is there to be read
            if self.team.size > 1:  # another machine may not see all that is there
                self._done, self._finished = of_the_first((self._done, self._finished))
            for array in self.layout.empty:
                (self.folder / array).touch()
                self._files[array] = stack.enter_context(io.FileIO(self.folder / array, "r+"))
            self._journal_path = self.folder / name
            self._journal = stack.enter_context(io.FileIO(self._journal_path, "x"))
            self._append({"machine": self._machine})
            self._stack = stack.pop_all()
        if self._done and first:
            self._announce()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._stack:
            if self._complete:
                return
            with contextlib.suppress(OSError):  # of a full disk, which was the error itself
                self._keep_counts()
            self._close()
            if not self._done and not self._lines and self.team.size == 1:
                self._remove()

    def reserve(self, total: int) -> None:
        """Make room on the disk for so many prompts: a full one is an OSError now."""
        if not self._finished and not self.team.rank:
            sizes = {file: self._place(name, total) for name, file in self._files.items()}
            reserve(sizes, shared=self.team.size > 1)

    def knows(self, planned: PlannedBatch) -> bool:
        """Whether a former process says to have done this batch."""
        return planned.number in self._done

    def has(self, planned: PlannedBatch) -> bool:
        """Whether a former process has left this batch, whole.

        Raises:
            ValueError: if it has left another one in its place.
        """
        line = self._done.get(planned.number)
        if line is None:
            return False
        if line["prompts"] != planned.digest():
            raise self._other("prompts")
        return self._finished or self._checksum(planned) == line["rows"]

    def write(self, planned: PlannedBatch, scores: Scores) -> None:
        checksum = 0
        for name, values in self.layout.values(scores).items():
            lines = values.reshape(len(values), -1).view(np.uint8)
            for member, line in zip(planned.members, lines, strict=True):
                checksum = zlib.crc32(line.data, checksum)
                _write(self._files[name], line.data, self._place(name, member))
        number = planned.number
        self._append({"batch": number, "prompts": planned.digest(), "rows": checksum})
        self._counted = False
        if self.counter is not None and number not in self._done:  # else its rows were damaged
            self.counter.add(scores.scores)
        self._lines += 1
        self._counted = True
        if time.monotonic() - self._kept_at >= _SECONDS_BETWEEN_COUNTS:
            self._keep_counts()

    def result(self, total: int, batches: int) -> Attribution | AttributionCounts:
        """The file, when it is complete; the log is gone then.

        Raises:
            ValueError: if there were more prompts before.
            RuntimeError: if batches are not to be found that were written.
            PermissionError: if an older file cannot be replaced; Windows replaces no open one.
        """
        self._keep_counts()
        self._close()
        self.team.meet()
        if not self._finished and self.team.rank == 0:
            self._read()
            self._check_batches(batches)
            try:
                os.replace(self._assemble(total), self.out)
            except PermissionError as error:
                raise PermissionError(
                    f"{self.out} cannot be replaced ({error.strerror}). On Windows close what has "
                    "it open, such as an Attribution that was loaded from it, and make the same "
                    "call: nothing is computed again."
                ) from error
        self.team.meet()
        self._complete = True
        if self.team.rank == 0:
            sync_folder(self.out.parent)  # else a power cut may leave neither the file nor its log
            self._remove()
        return (Attribution if self.counter is None else AttributionCounts).load(self.out)

    # what is there

    def _check_batches(self, count: int) -> None:
        """Raise unless so many batches are there, before any is part of the result."""
        every = set(range(count))
        if self._done.keys() - every:
            raise self._other("prompts")
        missing = every - self._done.keys()
        if missing:
            raise RuntimeError(
                f"{self.folder} lacks {len(missing)} of {count} batches, number {min(missing)} for "
                "one: a file of theirs is damaged, or was written on another machine and is not "
                "seen here yet. Make the same call again, which computes what is still missing."
            )

    def _other(self, what: str) -> ValueError:
        return ValueError(
            f"{self.folder} was left by a run that differs in: {what}. Give out= another name, or "
            "delete that folder to begin anew."
        )

    def _announce(self) -> None:
        logger.info("%s: %d batches are there already", self.folder, len(self._done))
        if self._machine not in self._machines:
            logger.warning(
                "%s was begun on %s and goes on on %s: scores may differ by rounding from those of "
                "one machine.",
                self.folder,
                self._machines[0],
                self._machine,
            )

    def _lock(self, stack: contextlib.ExitStack) -> None:
        file = stack.enter_context(io.FileIO(self.folder / "lock", "a"))
        try:
            lock(file)
        except BlockingIOError as error:
            message = f"another process is writing {self.out} now."
            raise explained(RuntimeError(message)) from error

    def _close(self) -> None:
        """All but the lock: Windows renames and removes no open file."""
        for file in (*self._files.values(), self._journal):
            file.close()

    def _remove(self) -> None:
        """The folder: what the journals are of after them, and the lock, which is open, last."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == "run.json"):
            if path.name != "lock":
                path.unlink()
        self._stack.close()
        with contextlib.suppress(OSError):  # another process may have locked it by now
            (self.folder / "lock").unlink()
            self.folder.rmdir()

    def _agree(self) -> None:
        """Be the first run in this folder, or go on with the one that was."""
        path = self.folder / "run.json"
        identity = json.loads(json.dumps(self._identity))
        if not path.exists():
            if self.team.rank:
                raise FileNotFoundError(
                    f"process {self.team.rank} does not see {path}, which process 0 wrote: out= "
                    "must be in a folder that all processes share."
                )
            mine = {
                "format": _FORMAT,
                "id": self.id,
                "space": self._space,
                "run": self.run,
                "limits": asdict(self.limits),
                "identity": identity,
            }
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(mine), encoding="utf-8")
            return
        try:
            found = json.loads(path.read_bytes())
            theirs = dict(found["identity"])
            self.id, self._space, self.run = found["id"], found["space"], found["run"]
            self.limits = BatchLimits(**found["limits"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged; delete {self.folder} to begin anew.") from error
        names = sorted(theirs.keys() | identity.keys())
        different = [name for name in names if theirs.get(name) != identity.get(name)]
        if different:
            hint = _MEASURED if different == ["baseline_values"] else ""
            raise self._other(", ".join(different) + hint)

    def _is_finished(self) -> bool:
        """Whether the file is in its place, and only the folder was not removed."""
        try:
            with safetensors.safe_open(self.out, framework="np") as file:
                return (file.metadata() or {}).get("log") == self.id
        except (OSError, safetensors.SafetensorError):
            return False

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.jsonl"))

    def _read(self) -> None:
        """The journals, the latest last."""
        self._done, self._machines, self._counts = {}, [], []
        for path in self._journals():
            lines = list(_read_lines(path))
            self._machines += [line["machine"] for line in lines if "machine" in line]
            batches = [line for line in lines if "batch" in line]
            if self.counter is not None:
                counts, of = _read_counts(path)
                if counts is None or len(batches) < of:
                    continue
                self._counts.append(counts)
                batches = batches[:of]
            self._done |= {line["batch"]: line for line in batches}

    def _checksum(self, planned: PlannedBatch) -> int:
        """Of a batch's rows as they are on disk."""
        checksum = 0
        for name, file in self._files.items():
            for member in planned.members:
                file.seek(self._place(name, member))
                checksum = zlib.crc32(
                    file.read(self._place(name, member + 1) - file.tell()), checksum
                )
        return checksum

    # what is written

    def _place(self, name: str, row: int) -> int:
        """Where a prompt's row begins in an array's file."""
        array = self.layout.empty[name]
        size = array.itemsize * math.prod(array.shape[1:])
        return row * size + (self._space if name == "scores" else 0)

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line).encode()
        _write(self._journal, b"%08x %s\n" % (zlib.crc32(text), text))

    def _keep_counts(self) -> None:
        """Those of this journal's batches so far, if there are new ones."""
        counter, lines = self.counter, self._lines
        if counter is None or counter.counts is None or not self._counted:
            return
        if lines == self._kept_lines:
            return
        counts = counter.counts.cpu()
        checksum = zlib.crc32(counts.numpy().tobytes())
        about = {"format": _FORMAT, "batches": str(lines), "sum": str(checksum)}
        write_safetensors(self._journal_path.with_suffix(".counts"), {"counts": counts}, about)
        self._kept_lines, self._kept_at = lines, time.monotonic()

    def _assemble(self, total: int) -> Path:
        """The whole file, still in the folder; the scores are in their place already."""
        path = self.folder / ("scores" if self.layout.scores else "counts")
        path.touch()
        with io.FileIO(path, "r+") as file:
            header = self._header(total)
            length = struct.pack("<Q", self._space - 8)
            _write(file, length + header + b" " * (self._space - 8 - len(header)))
            if self.counter is not None:
                _write(file, torch.stack(self._counts).sum(0).numpy().tobytes())
            for name in self._files:
                if name == "scores":
                    file.seek(self._place(name, total))
                    continue
                left = self._place(name, total)
                with io.FileIO(self.folder / name) as source:
                    while left:
                        data = source.read(min(left, _COPIED))
                        _write(file, data)
                        left -= len(data)
            file.truncate(file.tell())
            os.fsync(file.fileno())
        return path

    def _header(self, total: int) -> bytes:
        """Of the file, when it has so many prompts."""
        run, counter = self.run, self.counter
        machines = [m for i, m in enumerate(self._machines) if m not in self._machines[:i]]
        if len(machines) > 1:
            run = run | {"machines": machines[:_MOST_MACHINES]}
        shapes: dict[str, tuple[np.dtype[Any], list[int]]] = {}
        if counter is None:
            about = scores_metadata(run)
        else:
            about = counts_metadata(run, counter.quota, counter.criterion)
            shapes["counts"] = np.dtype("<i8"), [self.layout.layers, self.layout.width]
        for name, array in self.layout.empty.items():
            shapes[name] = array.dtype, [total, *array.shape[1:]]
        header: dict[str, Any] = {"__metadata__": about | {"log": self.id}}
        offset = 0
        for name, (dtype, shape) in shapes.items():
            end = offset + dtype.itemsize * math.prod(shape)
            header[name] = {
                "dtype": _DTYPES[dtype.str],
                "shape": shape,
                "data_offsets": [offset, end],
            }
            offset = end
        return json.dumps(header).encode()


def _write(file: io.FileIO, data: bytes | memoryview, place: int | None = None) -> None:
    """All of ``data``, at a place in the file or where it stands."""
    if place is not None:
        file.seek(place)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """A journal's lines, but for those whose checksum is wrong."""
    for line in path.read_bytes().splitlines():
        checksum, _, text = line.partition(b" ")
        if text and checksum == b"%08x" % zlib.crc32(text):  # that of nothing is 0
            yield json.loads(text)


def _read_counts(journal: Path) -> tuple[Tensor | None, int]:
    """The counts kept with a journal, and of how many of its batches they are."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        tensors, about = read_safetensors(journal.with_suffix(".counts"), _FORMAT)
        if zlib.crc32(tensors["counts"].numpy().tobytes()) == int(about["sum"]):
            return tensors["counts"].clone(), int(about["batches"])  # no mapping: it is removed
    return None, 0
