"""Attributes in children that it kills; a test runs it in a process that has run nothing before.

    python -m tests.attribution.killed_worker FOLDER

It leaves what was to become FOLDER/scores.safetensors and FOLDER/counts.safetensors.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from loki_kernels import attribute
from loki_kernels.attribution import job, log
from tests.models import build_model

PROMPTS = [{"input_ids": [1 + i % 90, 5, 7 + i % 3]} for i in range(60)]
OPTIONS = {"batch_size": 2, "steps": 2}


def lines(folder: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in folder.glob("*.jsonl"))


def run_child(out: Path, keep: str, number: int) -> int:
    """The exit status of a child that is sent a signal after some batches of its own."""
    child = os.fork()
    if child == 0:
        compute = job.attribute_batch
        # so that a parent that waits for the processor still finds it at work
        job.attribute_batch = lambda *given: time.sleep(0.02) or compute(*given)
        try:
            attribute(build_model(), PROMPTS, out=out, keep=keep, **OPTIONS)
        except SystemExit as error:
            os._exit(error.code)
        finally:
            os._exit(1)
    folder = out.with_name(f"{out.name}.partial")
    enough = lines(folder) + random.randint(3, 9)
    while lines(folder) < enough:
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:  # before it was sent anything: the assertion says with what
            return os.waitstatus_to_exitcode(status)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path) -> None:
    random.seed(0)
    log._SECONDS_BETWEEN_COUNTS = 0.02
    for keep in ("scores", "counts"):
        out = folder / f"{keep}.safetensors"
        assert run_child(out, keep, signal.SIGTERM) == 128 + signal.SIGTERM
        assert run_child(out, keep, signal.SIGKILL) == -signal.SIGKILL
        assert not out.exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
