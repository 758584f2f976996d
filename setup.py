"""Compiles ``csrc/`` where that is possible; everything else is in pyproject.toml.

    pip install --no-build-isolation .

With a CUDA torch and nvcc this builds the CUDA kernels, for the visible GPU or
``TORCH_CUDA_ARCH_LIST``; with a C++ compiler and any torch, the C++ ones. What cannot be built is
left out, and the reason kept for ``loki-kernels env``. ``LOKI_KERNELS_SKIP_CUDA=1`` leaves the CUDA
kernels out, ``LOKI_KERNELS_FORCE_CUDA=1`` fails without them.

``LOKI_KERNELS_WHEEL=1`` (``make wheels``) makes one wheel for all Pythons from 3.11 on: it fails
where something does not compile, and has no pybind11 module, which would tie it to one Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
REPORT = "_build.json"  # read by loki_kernels/_native.py
ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
ARCHITECTURES_BEFORE_12_8 = "8.0;8.6;8.9;9.0+PTX"  # what older nvcc knows
# The oldest torch whose stable ABI the binaries ask for: 2.11, as 0x02 0b 00 ...
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CUDA_OPS = [path.stem for path in sorted(ROOT.glob("csrc/*.cu"))]

SKIP = os.environ.get("LOKI_KERNELS_SKIP_CUDA") == "1"
FORCE = os.environ.get("LOKI_KERNELS_FORCE_CUDA") == "1"
WHEEL = os.environ.get("LOKI_KERNELS_WHEEL") == "1"

reasons: dict[str, str] = {}  # library -> why it is not built
wheel_info: dict[str, str] = {}  # what `_build_info` says elsewhere


def why_no_compiled_code() -> str | None:
    try:
        import torch  # noqa: F401
    except ImportError:
        return "pip built the package without sight of torch (an isolated build)."
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 was not installed when the package was."
    if not cxx():
        return f"there was no C++ compiler ({os.environ.get('CXX', 'c++')})."
    return None


def cxx() -> list[str]:
    """The C++ compiler and its options: ``$CXX`` or c++, else g++; empty without any."""
    commands = os.environ.get("CXX", "c++").split(), ["g++"]
    return next((command for command in commands if shutil.which(command[0])), [])


def why_no_cuda() -> str | None:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if SKIP:
        return "LOKI_KERNELS_SKIP_CUDA=1 was set."
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install one with CUDA."
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME is None or not nvcc.is_file():
        return "nvcc was not found; install the CUDA toolkit or set CUDA_HOME."
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", text)
    if version is None or version[1] != torch.version.cuda.split(".")[0]:
        found = ".".join(version.groups()) if version else "unknown"
        return (
            f"nvcc {found} does not fit torch's CUDA {torch.version.cuda}; install that nvcc, or "
            "point CUDA_HOME to it."
        )
    # a wheel is for others' GPUs too; an empty variable is none, as for torch
    if (WHEEL or not torch.cuda.is_available()) and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        old = tuple(map(int, version.groups())) < (12, 8)
        os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES_BEFORE_12_8 if old else ARCHITECTURES
    return None


def extensions() -> list:
    """What can be compiled here; the rest goes into `reasons`."""
    reason = why_no_compiled_code()
    if reason is not None:
        if WHEEL:
            raise SystemExit(f"LOKI_KERNELS_WHEEL=1, but nothing can be compiled: {reason}")
        reasons.update(cuda=reason, cpp=reason)
        return []
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    flags = ["-O3", "-std=c++20", TORCH_TARGET]
    found = [
        CppExtension(
            "loki_kernels._cpp",
            ["csrc/count_lowest.cpp", "csrc/glibc.cpp"],
            extra_compile_args={"cxx": flags},
            py_limited_api=True,
        )
    ]
    reason = why_no_cuda()
    if reason is not None:
        reasons["cuda"] = reason
    else:
        found.append(
            CUDAExtension(
                "loki_kernels._cuda",
                [
                    "csrc/cuda_bindings.cpp",
                    "csrc/glibc.cpp",
                    *(f"csrc/{op}.cu" for op in CUDA_OPS),
                ],
                include_dirs=[str(ROOT / "csrc")],
                extra_compile_args={
                    "cxx": [*flags, "-DUSE_CUDA"],
                    "nvcc": ["-O3", "-std=c++17", "-lineinfo"],
                },
                py_limited_api=True,
            )
        )
    if WHEEL:
        wheel_info.update(build_info(flags), compiler=compiler_version())
        return found
    found.append(build_info_extension(flags))
    for extension in found:
        extension.optional = True
    return found


def build_info(flags: list[str]) -> dict[str, str]:
    import torch

    cuda = "cuda" not in reasons
    revision = ""
    with contextlib.suppress(FileNotFoundError):  # there is no git
        revision = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if cuda and not architectures:
        major, minor = torch.cuda.get_device_capability()
        architectures = f"{major}.{minor}"
    return {
        "revision": revision,
        "torch": torch.__version__,
        "flags": " ".join(flags),
        "cuda": torch.version.cuda if cuda else "",
        "architectures": architectures if cuda else "",
    }


def build_info_extension(flags: list[str]) -> Extension:
    import pybind11

    folder = ROOT / "build" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"#define LOKI_{n.upper()} {json.dumps(v)}\n" for n, v in build_info(flags).items()]
    (folder / "build_info.h").write_text("".join(lines), encoding="utf-8")
    return Extension(
        "loki_kernels._build_info",
        ["csrc/build_info.cpp"],
        include_dirs=[str(folder), pybind11.get_include()],
        extra_compile_args=["-std=c++17"],
        language="c++",
    )


def compiler_version() -> str:
    command = [*cxx(), "-dumpfullversion", "-dumpversion"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def wheel_options() -> dict[str, str]:
    """The tags of a wheel: all Pythons from 3.11 on; its build says the CUDA version it is for."""
    if not WHEEL:
        return {}
    options = {"py_limited_api": "cp311"}
    if wheel_info.get("cuda"):
        options["build_number"] = f"1cu{wheel_info['cuda'].replace('.', '')}"
    return options


@contextlib.contextmanager
def left_out_if_it_fails(library: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if WHEEL:
            raise
        summary = str(error).partition("\n")[0]
        reasons.setdefault(library, f"compiling it failed ({summary}; pip install -v shows more).")
        print(f"{library} left out: {error}", file=sys.stderr)


def remove_older_builds(folder: Path) -> None:
    """pip builds where the last build's results still lie, which the package would load."""
    for library in ("cuda", "cpp", "build_info"):
        for path in (folder / "loki_kernels").glob(f"_{library}.*.so"):
            path.unlink()


def write_report(folder: Path) -> None:
    package = folder / "loki_kernels"
    package.mkdir(parents=True, exist_ok=True)
    report = reasons | ({"build": wheel_info} if WHEEL else {})
    (package / REPORT).write_text(json.dumps(report) + "\n", encoding="utf-8")
    if FORCE and "cuda" in reasons:
        raise SystemExit(f"LOKI_KERNELS_FORCE_CUDA=1, but not compiled: {reasons['cuda']}")


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        remove_older_builds(folder)  # build_ext, which comes after this, makes them anew
        write_report(folder)


commands: dict[str, type] = {"build_py": BuildPython}
ext_modules = extensions()
if ext_modules:
    from torch.utils.cpp_extension import BuildExtension

    class BuildCompiled(BuildExtension):
        """A library that does not compile is left out; the package works without it."""

        def build_extension(self, ext) -> None:
            with left_out_if_it_fails(ext.name.rpartition("._")[2]):
                super().build_extension(ext)

        def build_extensions(self) -> None:
            everything = self.extensions
            for ext in everything:  # torch's check of the compiler must not stop the others
                self.extensions = [ext]
                with left_out_if_it_fails(ext.name.rpartition("._")[2]):
                    super().build_extensions()
            self.extensions = everything

        def run(self) -> None:
            inplace = self.inplace
            super().run()
            write_report(ROOT if inplace else Path(self.build_lib))

    commands["build_ext"] = BuildCompiled

setup(ext_modules=ext_modules, cmdclass=commands, options={"bdist_wheel": wheel_options()})
