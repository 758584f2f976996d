"""Run PEFT's ``run.py`` where there is no GPU and no Hub: ``process.py TEXTS EXPERIMENT``.

The working directory is a copy of ``method_comparison/MetaMathQA``. What differs from PEFT's own
run is here and in `prepare`, and docs/upstream.md lists it.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import peft.utils
import torch

import loki_kernels.peft  # noqa: F401  (makes PEFT know the method)


def replace_hub(texts: dict[str, Any]) -> None:
    """``datasets.load_dataset`` gives the texts that `prepare` wrote, under the names PEFT uses."""
    train, valid, test = (datasets.Dataset.from_list(texts[p]) for p in ("train", "valid", "test"))
    tables = {
        "meta-math/MetaMathQA": datasets.DatasetDict({"train": train}),
        "openai/gsm8k": datasets.DatasetDict({"train": valid, "test": test}),
        "HuggingFaceFW/finewiki": SimpleNamespace(
            take=lambda count: [{"text": text} for text in texts["wiki"][:count]]
        ),
    }
    datasets.load_dataset = lambda name, *_, **__: tables[name]


def replace_accelerator() -> None:
    """A CPU in an accelerator's place: its memory is not counted."""
    peft.utils.infer_device = lambda: "cpu"
    nothing: dict[str, Any] = {
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
        "manual_seed_all": lambda seed: None,
        "max_memory_reserved": lambda: 0,
        "memory_allocated": lambda: 0,
        "memory_reserved": lambda: 0,
        "get_device_name": lambda index: "CPU",
    }
    for name, function in nothing.items():
        setattr(torch.cpu, name, function)


def main() -> None:
    texts, experiment = sys.argv[1:]
    replace_hub(json.loads(Path(texts).read_text(encoding="utf-8")))
    replace_accelerator()
    sys.path.insert(0, ".")
    utils = importlib.import_module("utils")  # PEFT's, of the working directory
    utils.get_peft_branch = lambda: "not a checkout"  # so that the result is a test's
    utils.get_peft_worktree_is_dirty = lambda: True
    sys.argv = ["run.py", "-v", experiment]
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
