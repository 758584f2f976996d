"""What this installation runs on, and what it runs with."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from ._version import __version__

_PACKAGES = ("torch", "transformers", "triton", "safetensors", "peft", "accelerate", "h5py")


def environment() -> dict[str, str]:
    """Versions, device, and which backends are live and why the others are not."""
    report = {"loki_kernels": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            report[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            report[package] = "not installed"
    if torch.cuda.is_available():
        report["device"] = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"
    else:
        report["device"] = f"CPU, {torch.get_num_threads()} threads" + (
            "" if torch.version.cuda else " (this torch is a CPU build)"
        )
    report["backend torch"] = "live"
    report["backend triton"] = "not live: this version has no Triton kernels yet"
    report["backend cuda"] = "not live: this version has no CUDA kernels yet"
    return report
