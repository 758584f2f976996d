"""``python -m benchmarks.frontier data | run | report``: the frontier of forgetting and learning.

``data`` tokenizes the evaluation texts and draws the model's samples, once. ``run`` trains what has
not been trained, several arms at once on a GPU, and appends to
``benchmarks/results/frontier/trainings.jsonl``. ``report`` compares and draws. ``--model`` names
another model than SmolLM2; its files lie in a folder of its name.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loki_kernels.cache import cache_folder
from loki_kernels.demo.model import NAME

from ..forgetting.precision import DEVICE
from ..records import RESULTS, SHARED, describe_machine, read_lines
from .arms import ARMS, Job
from .data import DOMAINS, LENGTH, PARTS, SOURCES, TASKS, Data, write_data
from .models import MODELS, RATE_SCALES
from .moments import Moments, linears, measure_moments
from .workers import MOMENTS, Pool

STEPS = 80
_TOGETHER = 10 if DEVICE == "cuda" else 1  # trainings as one model

# What the promise is about, and what a user would do instead.
DECISIVE = (
    "full",
    "LoRA",
    "down_proj protected, 110",
    "rows protected, 110",
    "full + replay",
    "full + KL",
    "LoRA + replay",
    "LoRA + KL",
)
# What could kill it: more weight on general text, another subspace, none, more directions, another
# form.
CONTROLS = (
    "full + 5 KL",
    "LoRA + 5 KL",
    "down_proj",
    "down_proj, random subspace, 110",
    "down_proj, another layer's, 110",
    "down_proj protected",
    "rows protected",
    "down_proj soft",
    "rows",
    "rows, random subspace",
    "rows, another layer's",
)
PUBLISHED = (
    "OSF",
    "CorDA",
    "LoRA-Null",
    "LoRA on the MLP",
    "SHiRA",
    "Super-Tuning, bottom",
)
_SEEDS = (1, 2)
_MIDDLE = (2, 3)  # of an arm's rates; shares of an update stand for lower ones


def plan(
    arms: Sequence[str],
    tasks: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    rates: Sequence[float] | None = None,
    places: Sequence[int] = (2, 1, 3, 0, 4),
) -> Iterator[Job]:
    """Every training of these, at ``rates`` or at an arm's own, middle ones first."""
    for place in places if rates is None else range(len(rates)):
        for seed in seeds:
            for name in arms:
                for task in tasks:
                    wanted = ARMS[name].rates if rates is None else rates
                    yield Job(name, ARMS[name], task, wanted[place], seed, steps)


def study() -> Iterator[Iterator[Job]]:
    """Everything in phases, what decides most first; no training twice.

    The 106 trainings of seed 0 were made with samples that are gone, so that none can join them.
    """
    of_gemma = "down_proj protected, 147"
    known = (*DECISIVE, *CONTROLS, *PUBLISHED, of_gemma)
    rest = [name for name in ARMS if name not in known]
    yield plan(DECISIVE, TASKS, _SEEDS, STEPS)
    yield plan(CONTROLS, TASKS, _SEEDS, STEPS)
    yield plan(DECISIVE, TASKS, range(3, 7), STEPS, places=_MIDDLE)
    yield plan(PUBLISHED, TASKS, _SEEDS, STEPS)
    yield plan(DECISIVE[:6], TASKS, [1], 5 * STEPS, places=_MIDDLE)
    yield plan(rest, TASKS, _SEEDS, STEPS)
    yield plan(DECISIVE[:6], TASKS, [2, 3], 5 * STEPS, places=_MIDDLE)


def groups(jobs: Sequence[Job], most: int) -> list[list[Job]]:
    """Jobs that can be trained as one model, where the first of them stands.

    No more than ``most``, and three fifths of it where everything is trained, which takes twice as
    much memory.
    """
    alike: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        alike.setdefault((job.arm_name, job.task, job.steps), []).append(job)
    found = []
    for members in alike.values():
        limit = max(1, 3 * most // 5) if members[0].arm.whole else most
        count = -(-len(members) // limit)
        ends = [len(members) * i // count for i in range(count + 1)]
        found += [members[start:end] for start, end in itertools.pairwise(ends)]
    return found


def _scaled(job: Job, scale: float) -> Job:
    return replace(job, rate=float(f"{job.rate * scale:.6g}"))


_SPEC = ("arm", "settings", "task", "rate", "seed", "steps")


def _key(record: dict[str, Any]) -> str:
    """What a training is told from others by: its job's `spec`, which its record has too."""
    return json.dumps({name: record[name] for name in _SPEC}, sort_keys=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Of what was trained twice the last, unless that alone is under a CPU's autocast."""
    kept: dict[str, dict[str, Any]] = {}
    for record in read_lines(path) if path.is_file() else ():
        key = _key(record)
        if "autocast" not in record or "autocast" in kept.get(key, record):
            kept[key] = record
    return list(kept.values())


def _sources(jobs: Sequence[Job], predict: bool = True) -> dict[str, dict[str, Any]]:
    """Name -> source, and what of it, of all moments that these ask for.

    With ``predict`` also what predicts their damage, which takes minutes on a CPU.
    """
    wanted: dict[str, dict[str, Any]] = {}
    if predict:
        wanted["samples"] = {
            "source": "samples",
            "texts": None,
            "weighted": False,
            "every": True,
            "sensitivity": True,
        }
    for arm in (job.arm for job in jobs):
        by_sensitivity = arm.rows != "random" or arm.row_steps
        if arm.protect is None and arm.start in (None, "svd") and not by_sensitivity:
            continue
        asked = wanted.setdefault(
            arm.moments,
            {
                "source": arm.source,
                "texts": arm.texts,
                "weighted": arm.weighted,
                "every": False,
                "sensitivity": False,
            },
        )
        asked["every"] |= arm.targets != "down_proj"
        asked["sensitivity"] |= by_sensitivity
    return wanted


def moments_of(
    model: Any, data: Data, jobs: Sequence[Job], predict: bool = True
) -> Iterator[tuple[str, Moments]]:
    """All moments that these ask for, by name; with ``predict`` as `_sources` has it."""
    for name, asked in _sources(jobs, predict).items():
        start = time.monotonic()
        yield (
            name,
            measure_moments(
                model,
                *data.texts_of(asked["source"], asked["texts"]),
                [n for n in linears(model) if asked["every"] or n.endswith("down_proj")],
                weighted=asked["weighted"],
                sensitivity=asked["sensitivity"],
            ),
        )
        print(f"moments of {name}: {time.monotonic() - start:.1f} s", flush=True)


def _write_moments(
    folder: Path, model: Any, data: Data, jobs: Sequence[Job], predict: bool
) -> None:
    for name, moments in moments_of(model, data, jobs, predict):
        tensors = {
            f"{part}:{layer}": tensor.cpu().clone()
            for part in ("values", "vectors", "sensitivity")
            for layer, tensor in getattr(moments, part).items()
        }
        save_file(tensors, folder / f"{name}{MOMENTS}")


def run(arguments: argparse.Namespace) -> None:
    if not arguments.rehearse and not arguments.data.is_file():
        raise SystemExit(f"{arguments.data} is not there; python -m benchmarks.frontier data.")
    path: Path = arguments.results
    records = read_records(path)
    # one under autocast is trained again where that is not asked for
    done = {_key(r) for r in records if arguments.bfloat16 or "autocast" not in r}
    measured = [] if arguments.rehearse else records  # a rehearsal's texts are no results'
    known = {(r["task"], r["seed"]): r["before"] for r in measured}
    drawn: dict[int, set[str | None]] = {}
    for record in measured:
        drawn.setdefault(record["seed"], set()).add(record.get("data"))
    planned: Iterable[Iterable[Job]] = study()
    if arguments.arms:
        arms = tuple(ARMS) if arguments.arms == ["all"] else arguments.arms
        tasks, seeds = arguments.tasks or TASKS, arguments.seeds or _SEEDS
        planned = [plan(arms, tasks, seeds, arguments.steps or STEPS, arguments.rates)]
    scale = 1.0 if arguments.rates else RATE_SCALES[arguments.model]
    phases = [
        [job for job in (_scaled(job, scale) for job in phase) if _key(job.spec()) not in done]
        for phase in planned
    ]
    if arguments.most is not None:
        phases = [list(itertools.chain.from_iterable(phases))[: arguments.most]]
    jobs = list(itertools.chain.from_iterable(phases))
    print(f"{len(jobs)} trainings to do", flush=True)
    start = time.monotonic()
    machine = describe_machine()
    kept = {k: machine[k] for k in ("device", "torch", "revision", "date")}
    if arguments.bfloat16:
        kept["autocast"] = "bfloat16"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, open(path, "a", encoding="utf-8") as file:
        folder = Path(scratch)
        if arguments.rehearse:
            model, tensors = _rehearsal()
            save_file(tensors, folder / "data.safetensors")
        else:
            shutil.copy(arguments.data, folder / "data.safetensors")
        data = Data.load(folder / "data.safetensors").to(DEVICE)
        kept["data"] = data.digest()
        _refuse_other_samples(kept["data"], jobs, drawn)
        if not arguments.rehearse:
            model, _ = MODELS[arguments.model]()
        model.save_pretrained(folder / "model")
        _write_moments(folder, model.to(DEVICE), data, jobs, arguments.predict or DEVICE == "cuda")
        del model, data
        parts = [group for phase in phases for group in groups(phase, _TOGETHER)]
        pool = Pool(folder, DEVICE, arguments.bfloat16, parts, arguments.processes)
        count = 0
        for record in pool.run(arguments.seconds - (time.monotonic() - start)):
            _refuse_other_texts(record, known)
            file.write(json.dumps(record | kept) + "\n")
            file.flush()
            count += 1
    print(f"{count} trainings in {time.monotonic() - start:.0f} s", flush=True)
    if pool.failed:
        raise SystemExit(f"{pool.failed} groups of trainings failed")


def _refuse_other_texts(record: dict[str, Any], known: dict[tuple[str, int], float]) -> None:
    """Stop before records of other texts, or of another base, come to those of a seed."""
    before = known.setdefault((record["task"], record["seed"]), record["before"])
    if abs(record["before"] - before) > 1e-3 * before:
        raise SystemExit(
            f"the base's loss on {record['task']} is {record['before']:.5g} here and {before:.5g} "
            "in the results so far: these are not the texts that they were measured on."
        )


def _refuse_other_samples(
    data: str, jobs: Sequence[Job], drawn: Mapping[int, Collection[str | None]]
) -> None:
    """Stop before trainings of one seed are measured, and protected, by other samples."""
    others = {job.seed for job in jobs if data not in drawn.get(job.seed, (data,))}
    if others:
        raise SystemExit(
            f"the trainings so far of seed {', '.join(map(str, sorted(others)))} are of other "
            f"samples than {data}'s: train other --seeds, or into other --results."
        )


_TINY = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 61,
}


def _rehearsal() -> tuple[Any, dict[str, Tensor]]:
    """A tiny random model, and random tokens in the place of texts."""
    torch.manual_seed(0)
    config = LlamaConfig(**_TINY, tie_word_embeddings=True, pad_token_id=2)
    tensors = {}
    for name in (*DOMAINS, *SOURCES, *(f"{t}/{part}" for t in TASKS for part in PARTS)):
        ids = torch.randint(config.vocab_size, (6, LENGTH))
        labels = ids.clone()
        labels[:, 0] = -100
        labels[2:, 200:] = -100
        tensors |= {f"{name}:ids": ids, f"{name}:labels": labels}
    return LlamaForCausalLM(config), tensors


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=__doc__)
    parser.add_argument("what", choices=("data", "run", "report"))
    parser.add_argument("--model", choices=tuple(MODELS), default=NAME)
    parser.add_argument("--data", type=Path, help="where the texts are kept as tokens")
    parser.add_argument("--shared", type=Path, default=SHARED, help="the evaluation texts")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, "all"), help="instead of the study")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="(default: both)")
    parser.add_argument("--seeds", nargs="+", type=int, help="(default: 1 and 2)")
    parser.add_argument("--steps", type=int, help=f"(default: {STEPS})")
    parser.add_argument("--rates", nargs="+", type=float, help="instead of each arm's own")
    parser.add_argument("--most", type=int, help="train no more than so many")
    parser.add_argument("--rehearse", action="store_true", help="with a tiny random model")
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="train under autocast, for GPUs and CPUs with AVX-512; what is measured is float32",
    )
    parser.add_argument("--processes", type=int, default=2, help="that train at a time")
    parser.add_argument(
        "--predict",
        action="store_true",
        help="predict what each training damages, which takes minutes on a CPU; a GPU always does",
    )
    arguments = parser.parse_args()
    if arguments.what == "run" and not arguments.arms:
        for name in ("tasks", "seeds", "steps", "rates"):
            if getattr(arguments, name) is not None:
                parser.error(f"--{name} goes with --arms; the study has its own.")
        if arguments.model != NAME:
            parser.error(f"the study is {NAME}'s; name --arms.")
    own = "" if arguments.model == NAME else arguments.model
    if arguments.data is None:
        arguments.data = cache_folder() / own / "frontier.safetensors"
    if arguments.results is None:
        arguments.results = RESULTS / "frontier" / own / "trainings.jsonl"
    if arguments.what == "data":
        arguments.data.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        model, tokenizer = MODELS[arguments.model]()
        drawn = RESULTS / "frontier" / own / "drawn.json"
        write_data(arguments.data, arguments.shared, drawn, model.to(DEVICE), tokenizer)
    elif arguments.what == "run":
        run(arguments)
    else:
        from .report import write_report

        write_report(arguments.results, arguments.model)
