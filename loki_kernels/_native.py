"""The compiled code of this installation: which of it is here, and why the rest is not.

``setup.py`` builds up to three modules from ``csrc/``: ``_cuda`` and ``_cpp``, which hold
implementations of operators whose schemas the ops' ``cuda_impl.py`` and ``cpp_impl.py`` define, and
``_build_info``. What it did not build it explains in ``_build.json``, where a wheel that serves all
Pythons has the build information too. Nothing is compiled here.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Literal

import torch
from torch import library as torch_library

Library = Literal["cuda", "cpp"]

_FOLDER = Path(__file__).parent
REPORT = "_build.json"
COMMAND = (
    "pip install 'setuptools>=77' ninja pybind11 && "
    "pip install --no-build-isolation --no-deps --force-reinstall ."
)

_schemas: dict[Library, torch_library.Library] = {}


def define(library: Library, schema: str) -> Callable[..., None]:
    """The operator ``loki_kernels_<library>::<schema>``, which compiled code implements.

    ``schema`` ends in ``-> ()``. The compiled operator returns a message where it fails, since it
    must not throw (``csrc/failure.hpp``); what is returned here raises it as a RuntimeError.
    """
    if library not in _schemas:
        _schemas[library] = torch_library.Library(f"loki_kernels_{library}", "DEF")
    _schemas[library].define(f"{schema.removesuffix('()')}str")
    namespace = getattr(torch.ops, f"loki_kernels_{library}")
    operator = getattr(namespace, schema.partition("(")[0])

    def call(*arguments: Any) -> None:
        message = operator(*arguments)
        if message:
            raise RuntimeError(message)

    return call


@functools.cache
def why_not(library: Library) -> str | None:
    """Load the compiled ``library``; None if that went well, else why not and how to get it."""
    for suffix in EXTENSION_SUFFIXES:
        path = _FOLDER / f"_{library}{suffix}"
        if not path.is_file():
            continue
        try:
            torch.ops.load_library(path)
        except OSError as error:
            return (
                f"{path.name} does not load with torch {torch.__version__}: "
                f"{error.__cause__ or error} To compile it anew, from a clone: {COMMAND}"
            )
        return None
    reason = _report().get(library, "the package runs from a folder that was never installed.")
    return f"not compiled: {reason} To compile it, from a clone: {COMMAND}"


def _report() -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads((_FOLDER / REPORT).read_text(encoding="utf-8"))
        return report
    except FileNotFoundError:
        return {}


def build_info() -> dict[str, Any] | None:
    """How the compiled code was built; None where there is none."""
    try:
        module = importlib.import_module(f"{__package__}._build_info")
    except ImportError:
        return _report().get("build")
    names = ("revision", "torch", "compiler", "flags", "cuda", "architectures")
    return {name: getattr(module, name) for name in names}
