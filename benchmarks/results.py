"""One JSON-lines file a machine; reruns append."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
# benchmarks/gpu.sh names another folder for what it measures.
_FOLDER = Path(os.environ.get("LOKI_KERNELS_RESULTS", RESULTS))


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
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "revision": revision,
        "command": "python -m " + " ".join([_module(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else sys.argv[0]


def append(row: dict[str, Any]) -> None:
    """Append one result to this machine's file."""
    row = {**describe_machine(), **row}
    name = re.sub(r"[^a-z0-9]+", "-", row["device"].lower()).strip("-")
    _FOLDER.mkdir(exist_ok=True)
    with open(_FOLDER / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
