"""``python -m benchmarks.frontier data | run | report``: the frontier of forgetting and learning.

``data`` tokenizes the evaluation texts and draws the model's samples, once. ``run`` trains what has
not been trained, several arms at once on a GPU, and appends to
``benchmarks/results/frontier/trainings.jsonl``. ``report`` compares and draws. ``--model`` names
another model than SmolLM2; its files lie in a folder of its name.
"""

from __future__ import annotations

import argparse
import json
import queue
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loki_kernels.attribution.cache import cache_folder
from loki_kernels.demo.model import NAME

from ..records import RESULTS, SHARED, describe_machine
from .arms import ARMS
from .data import DOMAINS, LENGTH, PARTS, SOURCES, TASKS, Data, write_data
from .models import MODELS
from .moments import Moments, linears, measure_moments
from .train import Job, Laboratory, train

STEPS = 80
_MOMENTS = ".moments.safetensors"


# What the promise is about, and what a user would do instead.
DECISIVE = (
    "full",
    "LoRA",
    "down_proj protected",
    "rows protected",
    "full + replay",
    "full + KL",
    "LoRA + replay",
    "LoRA + KL",
)
PUBLISHED = (
    "OSF",
    "CorDA",
    "LoRA-Null",
    "LoRA-Null, A fixed",
    "LoRA on the MLP",
    "SHiRA",
    "Super-Tuning, bottom",
)
_MIDDLE = (2, 1)  # of an arm's rates


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


def study() -> Iterator[Job]:
    """Everything, what decides most first; no training twice."""
    seeds = (0, 1)
    rest = [name for name in ARMS if name not in (*DECISIVE, *PUBLISHED)]
    yield from plan(DECISIVE, TASKS, seeds, STEPS)
    yield from plan(DECISIVE, TASKS, range(2, 6), STEPS, places=_MIDDLE)
    yield from plan(PUBLISHED, TASKS, seeds, STEPS)
    yield from plan(DECISIVE[:6], TASKS, [0], 5 * STEPS, places=_MIDDLE)
    yield from plan(rest, TASKS, seeds, STEPS)
    yield from plan(DECISIVE[:6], TASKS, [1, 2], 5 * STEPS, places=_MIDDLE)


def groups(jobs: Sequence[Job], most: int) -> list[list[Job]]:
    """Jobs that can be trained as one model, where the first of them stands.

    No more than ``most``, and half as many where everything is trained, which takes twice as much
    memory.
    """
    alike: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        alike.setdefault((job.arm_name, job.task, job.steps), []).append(job)
    found = []
    for members in alike.values():
        size = max(1, most // 2) if members[0].arm.whole else most
        found += [members[i : i + size] for i in range(0, len(members), size)]
    return found


def _key(spec: dict[str, Any]) -> str:
    return json.dumps(spec, sort_keys=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _sources(jobs: Sequence[Job], predicting: bool = True) -> dict[str, dict[str, Any]]:
    """Name -> source, and what of it, of all moments that these ask for.

    With ``predicting`` also what predicts their damage, which takes minutes on a CPU.
    """
    wanted: dict[str, dict[str, Any]] = {}
    if predicting:
        wanted["samples"] = {
            "source": "samples",
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
                "weighted": arm.weighted,
                "every": False,
                "sensitivity": False,
            },
        )
        asked["every"] |= arm.targets != "down_proj"
        asked["sensitivity"] |= by_sensitivity
    return wanted


def _write_moments(folder: Path, model: Any, data: Data, jobs: Sequence[Job]) -> None:
    on_gpu = next(model.parameters()).is_cuda
    for name, asked in _sources(jobs, predicting=on_gpu).items():
        start = time.monotonic()
        layers = [n for n in linears(model) if asked["every"] or n.endswith("down_proj")]
        moments = measure_moments(
            model,
            data.ids[asked["source"]],
            data.labels[asked["source"]],
            layers,
            weighted=asked["weighted"],
            sensitivity=asked["sensitivity"],
        )
        tensors = {
            f"{part}:{layer}": tensor.cpu().clone()
            for part in ("values", "vectors", "sensitivity")
            for layer, tensor in getattr(moments, part).items()
        }
        save_file(tensors, folder / f"{name}{_MOMENTS}")
        print(f"moments of {name}: {time.monotonic() - start:.1f} s", flush=True)


def _read_moments(folder: Path, device: str) -> dict[str, Moments]:
    read = {}
    for path in folder.glob(f"*{_MOMENTS}"):
        moments = Moments({}, {}, {})
        for key, tensor in load_file(path, device=device).items():
            part, _, layer = key.partition(":")
            getattr(moments, part)[layer] = tensor
        read[path.name.removesuffix(_MOMENTS)] = moments
    return read


def _laboratory(folder: Path, device: str, texts: int | None) -> Laboratory:
    torch.set_float32_matmul_precision("high")  # TF32 products on a GPU; storage stays float32
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).to(device)
    data = Data.load(folder / "data.safetensors").to(device)
    if texts is not None:
        data.measured_on(texts)
    return Laboratory(base, data, _read_moments(folder, device))


def _work(folder: Path, device: str, texts: int | None, jobs: Any, results: Any) -> None:
    """A process: takes groups of jobs until there are none, and halves what does not fit."""
    if device == "cuda":
        torch.set_num_threads(2)
    lab = _laboratory(folder, device, texts)
    halves: list[list[Job]] = []
    while True:
        try:
            group = halves.pop() if halves else jobs.get_nowait()
        except queue.Empty:
            results.put(None)
            return
        start = time.monotonic()
        found, error = [], None
        try:
            found = train(group, lab)
        except torch.OutOfMemoryError:
            error, middle = traceback.format_exc(), len(group) // 2
            if middle:
                halves += [group[:middle], group[middle:]]
                error = None
        except Exception:
            error = traceback.format_exc()
        if error is not None:
            results.put({"error": error, "jobs": [job.spec() for job in group]})
        seconds = round((time.monotonic() - start) / len(group), 2)
        for job, figures in zip(group, found, strict=False):
            results.put(job.spec() | figures | {"seconds": seconds})
        if device == "cuda":
            torch.cuda.empty_cache()  # the other processes' as much as this one's


def run(arguments: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not arguments.rehearse and not arguments.data.is_file():
        raise SystemExit(f"{arguments.data} is not there; python -m benchmarks.frontier data.")
    path: Path = arguments.results
    done = {
        _key({k: r[k] for k in ("arm", "settings", "task", "rate", "seed", "steps")})
        for r in read_records(path)
    }
    if arguments.arms:
        arms = tuple(ARMS) if arguments.arms == ["all"] else arguments.arms
        jobs = list(plan(arms, arguments.tasks, arguments.seeds, arguments.steps, arguments.rates))
    else:
        jobs = list(study())
    jobs = [job for job in jobs if _key(job.spec()) not in done][: arguments.most]
    print(f"{len(jobs)} trainings to do", flush=True)
    start = time.monotonic()
    machine = describe_machine()
    kept = {k: machine[k] for k in ("device", "torch", "revision", "date")}
    if arguments.texts is not None:
        kept["texts"] = arguments.texts
    path.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, open(path, "a", encoding="utf-8") as file:
        folder = Path(scratch)
        if arguments.rehearse:
            model, tensors = _rehearsal()
            save_file(tensors, folder / "data.safetensors")
        else:
            shutil.copy(arguments.data, folder / "data.safetensors")
            model, _ = MODELS[arguments.model]()
        model.save_pretrained(folder / "model")
        data = Data.load(folder / "data.safetensors").to(device)
        _write_moments(folder, model.to(device), data, jobs)
        del model, data
        waiting, results = context.Queue(), context.Queue()
        for group in groups(jobs, arguments.group if device == "cuda" else 1):
            waiting.put(group)
        workers = [
            context.Process(
                target=_work, args=(folder, device, arguments.texts, waiting, results), daemon=True
            )
            for _ in range(arguments.processes if device == "cuda" else 1)
        ]
        for worker in workers:
            worker.start()
        running, count, failed = len(workers), 0, 0
        while running:
            left = arguments.seconds - (time.monotonic() - start)
            try:
                record = results.get(timeout=min(max(0.1, left), 5.0))
            except queue.Empty:
                killed = [worker.exitcode for worker in workers if worker.exitcode]
                if killed:
                    print(f"a process was killed ({killed[0]}); perhaps by full memory", flush=True)
                if killed or left <= 0:
                    print("out of time" if left <= 0 else "the rest is not trained", flush=True)
                    break
                continue
            if record is None:
                running -= 1
            elif "error" in record:
                print(record["error"][-3000:], [j["arm"] for j in record["jobs"]], flush=True)
                failed += 1
                if failed > 8:
                    break
            else:
                file.write(json.dumps(record | kept) + "\n")
                file.flush()
                count += 1
        for worker in workers:
            worker.kill()
        print(f"{count} trainings in {time.monotonic() - start:.0f} s", flush=True)


def _rehearsal() -> tuple[Any, dict[str, Tensor]]:
    """A tiny random model, and random tokens in the place of texts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=61,
        tie_word_embeddings=True,
    )
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
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--most", type=int, help="train no more than so many")
    parser.add_argument(
        "--texts", type=int, help="measure on so many sequences of each text, into another file"
    )
    parser.add_argument("--rehearse", action="store_true", help="with a tiny random model")
    parser.add_argument("--processes", type=int, default=2, help="on a GPU")
    parser.add_argument("--group", type=int, default=10, help="trainings as one model, on a GPU")
    arguments = parser.parse_args()
    own = "" if arguments.model == NAME else arguments.model
    if arguments.data is None:
        arguments.data = cache_folder() / own / "frontier.safetensors"
    if arguments.texts is not None and arguments.results is None:
        raise SystemExit("--texts: name the --results, since other texts give other figures.")
    if arguments.results is None:
        arguments.results = RESULTS / "frontier" / own / "trainings.jsonl"
    if arguments.what == "data":
        arguments.data.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        model, tokenizer = MODELS[arguments.model]()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        write_data(arguments.data, arguments.shared, model.to(device), tokenizer)
    elif arguments.what == "run":
        run(arguments)
    else:
        from .report import write_report

        write_report(arguments.results, arguments.model)
