"""The records: one JSON-lines file a machine, to which reruns append."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from loki_kernels import _native

RESULTS = Path(__file__).parent / "results"
# Evaluation texts and data, where they are: beside the repository.
SHARED = RESULTS.parents[2] / "shared" / "data"
# benchmarks/gpu.sh names another folder for what it measures.
_FOLDER = Path(os.environ.get("LOKI_KERNELS_RESULTS", RESULTS))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines."""
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.machine()


def describe_machine() -> dict[str, Any]:
    """Device, versions and git revision of this run."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    revision = os.environ.get("REVISION", "")  # of a copy without a history
    with contextlib.suppress(FileNotFoundError):  # a machine without git measures all the same
        revision = (
            revision
            or subprocess.run(
                ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
            ).stdout.strip()
        )
    described = {"device": device}
    if torch.cuda.is_available():
        described["driver"] = _driver()
        described["cuda"] = str(torch.version.cuda)
        described["cuda_kernels"] = "no" if _native.why_not("cuda") else "yes"
    return described | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "revision": revision,
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    except FileNotFoundError:
        return "unknown"


def file_of(device: str) -> Path:
    """Where this machine's records are."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return _FOLDER / f"{name}.jsonl"


def append_record(record: dict[str, Any], name: str | None = None) -> None:
    """Append a record, which `describe_machine` is part of, to ``name`` or its machine's file."""
    path = file_of(record["device"]) if name is None else _FOLDER / name
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
