"""Every CUDA kernel compiled by nvcc for A100, H100 and B200; no GPU is needed.

Fails on a register spill or on more shared memory than a block gets. The table is kept in
``results/cuda_kernels.jsonl``.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from ..records import RESULTS
from .compile_triton import KIB, Result, beyond_the_chip, write_table

CSRC = Path(__file__).parents[2] / "csrc"
FILE = RESULTS / "cuda_kernels.jsonl"
FLAGS = ("-O3", "-std=c++17", "-lineinfo")  # as in setup.py
TARGETS = {80: "80", 90: "90a", 100: "100"}
# The keys of the widest layer: 4 bytes a node.
DYNAMIC_SHARED = {"count_lowest": 128 * KIB}

_ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<arch>\d+)a?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def ops() -> list[str]:
    return sorted(path.stem for path in CSRC.glob("*.cu"))


def source_hash() -> str:
    """sha256 over everything nvcc compiles, and how."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for pattern in ("*.cu", "*.cuh", "*.h"):
        for path in sorted(CSRC.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def parse(op: str, log: str) -> Iterator[Result]:
    """The results in what ``ptxas -v`` printed."""
    for entry in _ENTRY.finditer(log):
        static = re.search(r"(\d+) bytes smem", entry["rest"])
        result = {
            "op": op,
            "kernel": entry["symbol"],
            "arch": int(entry["arch"]),
            "registers": int(entry["registers"]),
            "shared": int(static[1] if static else 0) + DYNAMIC_SHARED.get(op, 0),
            "spilled": int(entry["stores"]) + int(entry["loads"]),
        }
        yield result | {"failures": beyond_the_chip(result)}


def compile_op(nvcc: str, op: str) -> list[Result]:
    targets = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in TARGETS.values()]
    source = str(CSRC / f"{op}.cu")
    run = subprocess.run(
        [nvcc, *FLAGS, *targets, "-Xptxas", "-v", "-c", source, "-o", "/dev/null"],
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        raise SystemExit(f"{op}.cu does not compile:\n{run.stdout}{run.stderr}")
    results = list(parse(op, run.stderr + run.stdout))
    names = _demangle([result["kernel"] for result in results])
    return [result | {"kernel": name} for result, name in zip(results, names, strict=True)]


def _demangle(symbols: Sequence[str]) -> list[str]:
    """``kernel<types>`` of each symbol, where c++filt is there to tell."""
    if shutil.which("c++filt") is None:
        return list(symbols)
    text = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout
    short = re.compile(r"(\w+)_kernel(<[^(]*>)?")
    found = [short.search(line) for line in text.splitlines()]
    return ["".join(part or "" for part in match.groups()) for match in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-write", action="store_true", help="leave the kept table alone")
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("nvcc is not on the PATH.")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    header = {
        "nvcc": re.search(r"V([\d.]+)", version)[1],
        "flags": " ".join(FLAGS),
        "command": "python -m benchmarks.ops.compile_cuda",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sources": source_hash(),
    }
    with ThreadPoolExecutor(2) as pool:
        results = [x for found in pool.map(lambda op: compile_op(nvcc, op), ops()) for x in found]
    for result in results:
        print(
            f"sm_{result['arch']:<4}{result['registers']:>4} registers"
            f"{result['shared']:>8} B shared"
            f"{result['spilled']:>4} B spilled  {result['kernel']}"
        )
    failed = [result for result in results if result["failures"]]
    print(f"\n{len(results)} compiled, {len(failed)} failed")
    for result in failed:
        reasons = "; ".join(result["failures"])
        print(f"{result['kernel']} sm_{result['arch']}: {reasons}", file=sys.stderr)
    if not arguments.no_write:
        write_table(FILE, header, results)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
