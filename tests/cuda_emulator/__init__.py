"""The kernels of ``csrc/*.cu``, compiled for the CPU: what Triton's interpreter is to Triton's.

Their source, launches and bindings are the real ones; `cuda_runtime.h` and `device.h` here stand in
for CUDA's and torch's. It finds wrong indices, missing barriers and wrong arithmetic, not what only
a GPU has: alignment, limits, races within a warp, speed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from loki_kernels import _native

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
INCLUDE = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"


def why_not() -> str | None:
    """What speaks against it here; None if nothing does."""
    if _native.why_not("cuda") is None:
        return "the real kernels are loaded, and a process holds one implementation of an operator"
    if shutil.which("g++") is None:
        return "there is no g++"
    if not (INCLUDE / "cuda_fp16.h").is_file():
        return f"CUDA's headers are not in {INCLUDE}"
    return None


@functools.cache
def load() -> ctypes.CDLL:
    """Compile it, unless this source already was, and give torch its operators."""
    library = _build()
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


def _build() -> Path:
    sources = [*sorted(CSRC.glob("*.cu")), CSRC / "cuda_bindings.cpp", HERE / "emulator.cpp"]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted([*CSRC.iterdir(), *HERE.glob("*.h"), Path(__file__), *sources]):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_emulator" / digest.hexdigest()[:16]
    library = folder / "cuda_emulated.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(dir=folder))  # pytest-xdist's workers all build at once
    torch_folder = Path(torch.__file__).parent
    options = ["-std=c++20", "-O2", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    for include in (HERE, CSRC, INCLUDE, torch_folder / "include"):
        options += ["-I", str(include)]

    def compile_one(source: Path) -> str:
        target = own / f"{source.name}.o"
        subprocess.run(
            ["g++", *options, "-x", "c++", "-c", str(source), "-o", str(target)], check=True
        )
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    linked = own / library.name
    # -Bsymbolic: where torch has brought CUDA's own runtime, the emulator's is called all the same
    link = ["-Wl,-Bsymbolic", "-L", str(torch_folder / "lib"), "-ltorch", "-ltorch_cpu"]
    subprocess.run(["g++", "-shared", *objects, "-o", str(linked), *link], check=True)
    linked.replace(library)
    shutil.rmtree(own)
    return library
