"""``python -m benchmarks.upstream CHECKOUT``: PEFT's MetaMathQA comparison, on a CPU.

CHECKOUT is a clone of github.com/huggingface/peft. Its ``run.py`` trains, generates and measures
forgetting; model, texts and counts are those of two cores. A table of its results is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import loki_kernels as loki
from loki_kernels.demo.model import load_samples, load_smollm2

from ..records import SHARED, read_lines

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# PEFT's folders of settings, in its checkout, and those proposed to it, beside this file.
PEERS = ("full-finetuning/llama-3.2-3B-lr_0.00001", "lora/llama-3.2-3B-rank32")
OURS = tuple(f"loki/llama-3.2-3B-{name}" for name in ("40-rows", "10-percent", "protected"))
# What of PEFT's code is changed in the copy that runs: (file, what it says, what it says here).
CHANGES = (
    ("utils.py", 'if device not in ["cuda", "xpu"]:', 'if device not in ["cpu"]:'),
    ("run.py", "assert 1 < wiki_loss_before < 2", "assert 0 < wiki_loss_before < 20"),
)


def prepare(checkout: Path, folder: Path) -> None:
    """A copy of the benchmark that runs without a GPU.

    Raises:
        SystemExit: where the checkout has no such benchmark, or says something else by now.
    """
    source = checkout / "method_comparison" / "MetaMathQA"
    if not (source / "run.py").is_file():
        raise SystemExit(f"{checkout} is no checkout of PEFT: {source / 'run.py'} is not there.")
    for name in ("run.py", "utils.py", "data.py", "default_training_params.json"):
        shutil.copy(source / name, folder / name)
    for name, old, new in CHANGES:
        text = (folder / name).read_text(encoding="utf-8")
        if old not in text:
            raise SystemExit(
                f"{name} of this PEFT no longer says {old!r}; CHANGES needs an update."
            )
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")
    for name in ("results", "temporary_results", "cancelled_results"):
        (folder / name).mkdir()


def texts(shared: Path, questions: int) -> dict[str, Any]:
    """GSM8K's solutions to train on, in MetaMathQA's form, others to test on, and wikitext."""
    records = list(read_lines(shared / "general" / "gsm8k_test.jsonl"))
    train = []
    for record in records[2 * questions :]:
        solution, _, answer = record["answer"].rpartition("#### ")
        query, response = record["question"], f"{solution}The answer is: {answer}"
        train.append(
            {"type": "GSM", "query": query, "original_question": query, "response": response}
        )
    held_out = [{k: r[k] for k in ("question", "answer")} for r in records[: 2 * questions]]
    wiki = (shared / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    length = 3000  # characters: some 700 tokens, of the benchmark's 768 at most
    return {
        "train": train,
        "valid": held_out[:questions],
        "test": held_out[questions:],
        "wiki": [wiki[i * length : (i + 1) * length] for i in range(questions)],
    }


def copy_experiment(
    checkout: Path, folder: Path, name: str, training: dict[str, Any], hidden_size: int
) -> str:
    """A folder of settings at this scale; its path as ``run.py`` wants it."""
    home = HERE if name in OURS else checkout / "method_comparison" / "MetaMathQA"
    experiment = Path("experiments") / name
    shutil.copytree(home / experiment, folder / experiment)
    file = folder / experiment / "training_params.json"
    own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(training | own), encoding="utf-8")
    if name.endswith("40-rows"):  # whose quota is of 3,072 rows
        file = folder / experiment / "adapter_config.json"
        adapter = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(adapter | {"quota": 4050 / hidden_size}), encoding="utf-8")
    return str(experiment)


def summary(folder: Path) -> dict[str, Any]:
    """What PEFT wrote of the one run in ``folder``."""
    files = [*folder.glob("temporary_results/*.json"), *folder.glob("cancelled_results/*.json")]
    result = json.loads(files[0].read_text(encoding="utf-8"))
    train = result["train_info"]
    if train["status"] != "success":
        raise SystemExit(
            f"PEFT's run ended as {train['status']}: {result['run_info']['error_msg']}"
        )
    last = train["metrics"][-1]
    return {
        "trained": train["num_trainable_params"],
        "train loss": last["train loss"],
        "test accuracy": last["test accuracy"],
        "forgetting": last["forgetting"],
        "seconds": train["train_time"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upstream", description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--shared", type=Path, default=SHARED, help="the evaluation texts")
    parser.add_argument("--settings", nargs="+", choices=(*PEERS, *OURS), default=(*PEERS, *OURS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--questions", type=int, default=8, help="to validate, and to test with")
    parser.add_argument("--tokens", type=int, default=200, help="generated at most")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, tokenizer = load_smollm2()
        tokenizer.save_pretrained(folder / "model")
        model.save_pretrained(folder / "model")
        hidden_size = model.config.hidden_size
        protection = folder / "protection.safetensors"
        if any("protected" in name for name in arguments.settings):
            loki.estimate_protection(model, load_samples()).save(protection)
        del model
        (folder / "texts.json").write_text(
            json.dumps(texts(arguments.shared, arguments.questions)), encoding="utf-8"
        )
        training = {
            "model_id": str(folder / "model"),
            "dtype": "float32",
            "max_steps": arguments.steps,
            "eval_steps": arguments.steps,
            "batch_size_eval": arguments.questions,
            "generation_kwargs": {"max_new_tokens": arguments.tokens},
        }
        print("| setting | trained | train loss | test accuracy | forgetting | s |")
        print("|---|--:|--:|--:|--:|--:|", flush=True)
        for number, name in enumerate(arguments.settings):
            copy = folder / str(number)
            copy.mkdir()
            prepare(arguments.checkout, copy)
            if protection.is_file():
                shutil.copy(protection, copy)
            experiment = copy_experiment(arguments.checkout, copy, name, training, hidden_size)
            script = Path(__file__).with_name("process.py")
            paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
            run = subprocess.run(
                [sys.executable, str(script), str(folder / "texts.json"), experiment],
                cwd=copy,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
                capture_output=True,
                text=True,
            )
            if run.returncode:
                raise SystemExit(f"{name}: {run.stderr[-3000:]}")
            row = summary(copy)
            print(
                f"| {name} | {row['trained']:,} | {row['train loss']:.3f} | "
                f"{row['test accuracy']:.0%} | {row['forgetting']:.4f} | {row['seconds']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
