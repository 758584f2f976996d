"""``loki-kernels doctor`` tells a working installation from one that is not."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from loki_kernels import doctor
from loki_kernels.cli import main
from loki_kernels.ops import _dispatch


def test_a_working_installation_passes(capsys):
    generator = torch.random.get_rng_state()
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line[4:6] == "  "]  # DeepSpeed logs to stdout
    checks = {line[6:22].strip(): line[:4] for line in lines}
    assert list(checks) == [
        "versions",
        "device",
        *(f"kernels, {backend}" for backend in _dispatch.BACKENDS),
        "peft",
        "cache",
        "fine-tune",
    ]
    ours = ("device", "kernels, torch", "peft", "fine-tune")
    assert all(checks[name] == "pass" for name in ours), lines
    assert any("no other, the checkpoint gives the same logits" in line for line in lines)
    assert torch.equal(generator, torch.random.get_rng_state())


def test_what_fails_is_named_and_the_rest_goes_on(capsys, monkeypatch):
    module = _dispatch._module("count_lowest", "torch")
    monkeypatch.setattr(module, "forward", lambda *_: torch.zeros(3, 2))
    monkeypatch.setattr(doctor, "_fine_tune", lambda: "done")
    assert main(["doctor"]) == 1
    out, error = capsys.readouterr()
    assert "FAIL  kernels, torch   RuntimeError: count_lowest in torch.float32: " in out
    assert "pass  fine-tune        done" in out
    assert error.endswith("loki-kernels doctor: failed: kernels, torch.\n")


@pytest.mark.parametrize(
    ("requirement", "status", "words"),
    [
        ("torch>=99", "FAIL", "pip install -U 'torch>=99'"),
        ("no-such-package", "FAIL", "no-such-package is not installed (pip install"),
        ("no-such-package>=1; extra == 'demo'", "pass", "loki_kernels"),
        ("torch>=99; extra == 'demo'", "FAIL", "torch>=99"),
    ],
)
def test_versions_are_held_to_what_the_package_asks_for(requirement, status, words, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: [requirement])
    check = doctor._check("versions", doctor._versions)
    assert check.status == status
    assert words in check.detail


def test_a_cpu_build_of_torch_beside_a_gpu_is_said(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    check = doctor._check("device", doctor._device)
    assert check.status == "FAIL"
    assert "there is GPU 0: NVIDIA H100, but torch" in check.detail
