"""Run under torchrun by test_team: one attribution by two processes, in all ways that there are.

    torchrun --nproc-per-node 2 -m tests.attribution.team_worker FOLDER BASE

Each process writes FOLDER/RANK.json: what it found for each case.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import loki_kernels as loki
from loki_kernels import attribute, team
from loki_kernels.attribution import job, log
from loki_kernels.cli import main as command
from tests.attribution.results import differing
from tests.models import build_model

RANK = int(os.environ["RANK"])
PROMPTS = [{"input_ids": [1 + i, 5, *range(2, 2 + i % 4)]} for i in range(11)]
OPTIONS = {"batch_size": 2, "steps": 2}

attributed: list[list[int]] = []
attribute_batch, compute = job.attribute_batch, job.Job._compute


def recording(self, planned, *arguments):
    scores = compute(self, planned, *arguments)
    attributed.append(planned.members)
    return scores


def failing(after: int, error: Exception):
    """An attribution of which process 1 raises after some batches."""

    def fail(*arguments):
        if RANK == 1 and len(attributed) >= after:
            raise error
        return attribute_batch(*arguments)

    return fail


def results(model, folder: Path, keep: str) -> dict[str, object]:
    alone = attribute(model, PROMPTS, keep=keep, share=False, **OPTIONS)
    found: dict[str, object] = {}
    for name, prompts, out in (
        ("memory", PROMPTS, None),
        ("file", PROMPTS, folder / f"{keep}.safetensors"),
        ("stream", iter(PROMPTS), None),
        ("one batch", PROMPTS[:1], None),
    ):
        attributed.clear()
        got = attribute(model, prompts, keep=keep, out=out, **OPTIONS)
        if name == "one batch":
            found[name] = len(got.targets)
            continue
        found[name] = {"same": not differing(got, alone), "batches": attributed[:]}
    out = folder / "killed.safetensors"
    read = log.Log._read
    for name in ("continued", "unseen"):
        attributed.clear()
        job.attribute_batch = failing(2, KeyError("killed"))
        found["failed"] = error_of(lambda: attribute(model, PROMPTS, keep=keep, out=out, **OPTIONS))
        before = len(attributed)
        job.attribute_batch = attribute_batch
        dist.barrier()
        attributed.clear()
        if name == "unseen" and RANK == 1:  # of what was left before, as on another machine
            log.Log._read = lambda _: None
        got = attribute(model, PROMPTS, keep=keep, out=out, **OPTIONS)
        log.Log._read = read
        found[name] = {
            "same": not differing(got, alone),
            "before": before,
            "after": len(attributed),
        }
        dist.barrier()
        out.unlink(missing_ok=True)
    return found


def error_of(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: Path, base: Path) -> None:
    os.environ["LOKI_KERNELS_CACHE"] = str(folder / "cache")
    dist.init_process_group("gloo")
    log._SECONDS_BETWEEN_COUNTS = 0
    team._PART = 100  # more than one part of what is added up
    job.Job._compute = recording
    model = build_model(device="cpu")
    found: dict[str, object] = {k: results(model, folder, k) for k in ("scores", "counts")}
    own = [*PROMPTS[:-1], {"input_ids": [60 + RANK]}]
    found["other prompts"] = error_of(lambda: attribute(model, own, **OPTIONS))
    found["other model"] = error_of(
        lambda: attribute(build_model(seed=RANK, device="cpu"), PROMPTS, **OPTIONS)
    )
    attributed.clear()
    job.attribute_batch = failing(1, torch.OutOfMemoryError("full"))
    found["memory"] = error_of(lambda: attribute(model, PROMPTS, **OPTIONS))
    job.attribute_batch = attribute_batch

    attributed.clear()
    with loki.patch(model, quota=25, analysis={"prompts": PROMPTS, **OPTIONS}) as handle:
        found["patch"] = {
            "rows": [layer.tolist() for layer in handle.rows],
            "batches": len(attributed),
        }
    attributed.clear()
    with loki.patch(model, quota=25, analysis={"prompts": PROMPTS, **OPTIONS}):
        found["patch again"] = len(attributed)

    questions = folder / "mine.jsonl"
    if RANK == 0:
        questions.write_text("".join(f'{{"text": "w{i} w7"}}\n' for i in range(20)))
    dist.barrier()
    attributed.clear()
    arguments = [str(base), str(folder / "command.safetensors"), "--batch-size", "4"]
    found["command"] = command(["attribute", *arguments, "--questions", str(questions)])
    found["command batches"] = len(attributed)
    (folder / f"{RANK}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
