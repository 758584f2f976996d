"""Every Triton kernel compiled ahead of time for A100, H100 and B200; no GPU is needed.

Each config that a launch may pick is compiled as contiguous tensors would have it compiled. That
fails if it spills registers, needs more shared memory than a block gets, or leaves the tensor
cores unused. The whole matrix is kept in ``results/kernels.jsonl``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib
import io
import json
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from loki_kernels import ops
from loki_kernels.files import atomic_path

from ..records import RESULTS

OPS = Path(ops.__file__).parent
FILE = RESULTS / "kernels.jsonl"

KIB = 1024
# Compute capability -> bytes of shared memory a block can have (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability").
SHARED_LIMIT = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}
TENSOR_MEMORY_COLUMNS = 512

# The products alone: wgmma.fence or tcgen05.ld would also be there without one.
PRODUCTS = {"mma.sync": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}

# Multiples of 16 in real models: strides, and how many nodes there are.
_ALIGNED = re.compile("_(batch|head|row|token|position|sample|layer|point)$|^width$")

Result = dict[str, Any]


class Task(NamedTuple):
    """What a worker compiles; kernels themselves do not pickle."""

    op: str
    compilation: int
    config: int
    arch: int


def source_hash() -> str:
    """sha256 over all that is compiled: the kernels' code, and how each of them is specialised.

    What launches them may change without it.
    """
    digest = hashlib.sha256()
    for path in [OPS / "_triton.py", *sorted(OPS.glob("*/triton_impl.py"))]:
        for node in ast.parse(path.read_text("utf-8")).body:
            decorators = map(ast.unparse, getattr(node, "decorator_list", ()))
            jitted = any(name.startswith("triton.jit") for name in decorators)
            if jitted or isinstance(node, ast.Assign):  # kernels read the module's constants
                digest.update(ast.unparse(node).encode())
    for op in kernel_ops():
        for one in importlib.import_module(f"{ops.__name__}.{op}.triton_impl").compilations():
            configs = [(c.kwargs, c.num_warps, c.num_stages) for c in one.configs]
            digest.update(
                repr((op, sorted(one.types.items()), sorted(one.constants.items()))).encode()
            )
            digest.update(repr((one.dtype, one.tensor_cores, configs)).encode())
    return digest.hexdigest()


def kernel_ops() -> list[str]:
    """The ops with Triton kernels of their own."""
    paths = OPS.glob("*/triton_impl.py")
    return sorted(p.parent.name for p in paths if "def compilations(" in p.read_text("utf-8"))


def beyond_the_chip(result: Result) -> list[str]:
    """Registers spilled and shared memory that no block gets."""
    found = []
    if result["spilled"]:
        found.append(f"spills {result['spilled']} bytes")
    if result["shared"] > SHARED_LIMIT[result["arch"]]:
        found.append(
            f"{result['shared']} bytes of shared memory, of {SHARED_LIMIT[result['arch']]}"
        )
    return found


def failures(result: Result) -> list[str]:
    """What is wrong with a compiled kernel; empty if nothing is."""
    found = beyond_the_chip(result)
    if result["tensor_memory"] > TENSOR_MEMORY_COLUMNS:
        found.append(
            f"{result['tensor_memory']} columns of tensor memory, of {TENSOR_MEMORY_COLUMNS}"
        )
    if result["tf32"]:
        found.append("multiplies float32 as tf32")
    if result["tensor_cores"]:
        products = result["products"]
        # wgmma multiplies 64 results by four warps; smaller tiles are left to mma.sync.
        whole = result["tile"][0] >= 64 and result["warps"] >= 4
        if not products:
            found.append("no tensor-core instruction")
        elif result["arch"] == 90 and whole and "wgmma" not in products:
            found.append("no wgmma")
    return found


@functools.cache
def _compilations(op: str) -> tuple[Any, ...]:
    module = importlib.import_module(f"loki_kernels.ops.{op}.triton_impl")
    return tuple(module.compilations())


def _tasks(names: Sequence[str], quick: bool) -> Iterator[Task]:
    for op in names:
        seen = set()
        for i, compilation in enumerate(_compilations(op)):
            kernel = compilation.kernel.__name__
            if quick and (kernel in seen or compilation.dtype != "bf16"):
                continue
            seen.add(kernel)
            for j in range(1 if quick else len(compilation.configs)):
                yield from (Task(op, i, j, arch) for arch in SHARED_LIMIT)


def _short(constants: dict[str, Any]) -> str:
    """The constants that are not worked out from others."""
    parts = [
        name.lower() if value is True else f"{name.lower()}={value}"
        for name, value in constants.items()
        if value is not False and not name.startswith("BLOCK_") and not name.endswith("_PADDED")
    ]
    return " ".join(parts) or "-"


def _start_worker(cache: str) -> None:
    from triton import knobs

    # A cached kernel comes without ptxas's log.
    knobs.cache.dir = cache
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True


def _describe(task: Task) -> tuple[Any, Any, Result]:
    compilation = _compilations(task.op)[task.compilation]
    config = compilation.configs[task.config]
    result = {
        "op": task.op,
        "kernel": compilation.kernel.__name__,
        "dtype": compilation.dtype,
        "constants": _short(compilation.constants),
        "arch": task.arch,
        "tile": list(config.kwargs.values()),
        "warps": config.num_warps,
        "stages": config.num_stages,
        "tensor_cores": compilation.tensor_cores,
    }
    return compilation, config, result


def _source(compilation: Any, config: Any) -> Any:
    """The kernel as a launch on contiguous, aligned tensors specialises it."""
    from triton.compiler import ASTSource

    names = compilation.kernel.arg_names
    constants = {**compilation.constants, **config.kwargs}
    # A launch notes which integer arguments are multiples of 16.
    aligned = [
        i
        for i, name in enumerate(names)
        if name not in constants and (compilation.types[name][0] == "*" or _ALIGNED.search(name))
    ]
    return ASTSource(
        fn=compilation.kernel,
        signature={n: "constexpr" if n in constants else compilation.types[n] for n in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )


def compile_one(task: Task) -> Result:
    """One result of the table."""
    import triton
    from triton.backends.compiler import GPUTarget

    compilation, config, result = _describe(task)
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(
                _source(compilation, config),
                target=GPUTarget("cuda", task.arch, 32),
                options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        return result | {"failures": [f"does not compile: {type(error).__name__}: {reason}"]}
    ptx = compiled.asm["ptx"]
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    result |= {
        "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", log.getvalue())),
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "spilled": sum(int(n) for n in spills),
        "products": {n: c for n, text in PRODUCTS.items() if (c := ptx.count(text))},
        "tf32": ptx.count(".tf32"),
    }
    return result | {"failures": failures(result)}


def compile_all(tasks: Sequence[Task], jobs: int) -> Iterator[Result]:
    """Their results, in order."""
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), _start_worker, (cache,)
        ) as pool,
    ):
        for task, future in [(task, pool.submit(compile_one, task)) for task in tasks]:
            try:
                yield future.result()
            except BrokenProcessPool:
                reason = "the compiler died on this kernel or on one compiled beside it"
                yield _describe(task)[2] | {"failures": [reason]}


def _print(result: Result) -> None:
    tile = "x".join(str(n) for n in result["tile"])
    products = " ".join(f"{n}:{count}" for n, count in result.get("products", {}).items())
    numbers = "".join(f"{result.get(n, '?'):>9}" for n in ("registers", "shared", "spilled"))
    print(
        f"{result['op']:<24}{result['kernel']:<16}{result['dtype']:<5} {result['constants']:<46}"
        f"sm_{result['arch']:<4}{tile:>10} w{result['warps']} s{result['stages']}"
        f"{numbers}  {products}",
        flush=True,
    )


def write_table(file: Path, header: Result, results: Sequence[Result]) -> None:
    """Replace a kept table."""
    lines = [json.dumps(line, separators=(",", ":")) for line in (header, *results)]
    RESULTS.mkdir(exist_ok=True)
    with atomic_path(file) as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one config a kernel, in bfloat16")
    parser.add_argument("--op", action="append", choices=kernel_ops(), help="this op alone")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    import triton

    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET=1 interprets kernels; unset it to compile them.")
    header = {
        "triton": triton.__version__,
        "ptxas": triton.knobs.nvidia.ptxas.version,
        "ptxas_blackwell": triton.knobs.nvidia.ptxas_blackwell.version,
        "command": " ".join(["python -m benchmarks.ops.compile_triton", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sources": source_hash(),
    }
    tasks = list(_tasks(arguments.op or kernel_ops(), arguments.quick))
    results = []
    for result in compile_all(tasks, arguments.jobs):
        _print(result)
        results.append(result)
    failed = [result for result in results if result["failures"]]
    print(f"\n{len(results)} compiled, {len(failed)} failed")
    for result in failed:
        _print(result)
        print("    " + "; ".join(result["failures"]))
    if not (arguments.quick or arguments.op):
        if source_hash() != header["sources"]:
            raise SystemExit("The kernels changed while they were compiled; run this again.")
        write_table(FILE, header, results)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
