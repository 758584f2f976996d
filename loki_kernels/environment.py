"""What this installation runs on, and what it runs with."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import _native
from ._version import __version__

_PACKAGES = ("torch", "transformers", "triton", "safetensors", "peft", "accelerate", "h5py")


def environment() -> dict[str, str]:
    """Versions, device, and how the compiled code was made."""
    report = {"loki_kernels": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            report[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            report[package] = "not installed"
    report["device"] = _device()
    report["build"] = _build()
    return report


def _device() -> str:
    if torch.cuda.is_available():
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return f"{torch.cuda.get_device_name()} ({kind})"
    cpu = f"CPU, {torch.get_num_threads()} threads"
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is not None:
        return f"{other.type}; {cpu}"
    known = torch.version.cuda or torch.version.hip
    return cpu if known else f"{cpu} (this torch is a CPU build)"


def _build() -> str:
    """How the compiled code was made."""
    info = _native.build_info()
    if info is None:
        return "pure Python, nothing is compiled"
    parts = [f"C++ by {info['compiler']} {info['flags']}", f"against torch {info['torch']}"]
    if info["cuda"]:
        parts.insert(0, f"CUDA {info['cuda']} for {info['architectures']}")
    if info["revision"]:
        parts.append(f"git {info['revision']}")
    return ", ".join(parts)
