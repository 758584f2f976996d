"""The ops' peers: who is timed, who is not, and that what calls them asks for the op's results."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional

from benchmarks import measure
from benchmarks.__main__ import SUITES
from benchmarks.ops import peers, shared_prefix_attention
from benchmarks.report import table_line
from loki_kernels.ops.shared_prefix_attention.reference import shared_prefix_attention_reference


def test_they_are_a_suite():
    assert importlib.import_module(f"benchmarks.{SUITES['peers']}") is peers


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    monkeypatch.setattr(measure, "ceilings", lambda: measure.Ceilings(1e12, 1e10))


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for the libraries, which need a GPU; what each was asked for."""
    asked = []

    def cross_entropy(hidden, weight, target, **options):
        asked.append(options)
        return functional.cross_entropy(hidden @ weight.T, target, reduction=options["reduction"])

    silu_mul = SimpleNamespace(apply=lambda a, b: functional.silu(a) * b)
    modules = {
        "liger_kernel": {},
        "liger_kernel.ops": {"LigerSiLUMulFunction": silu_mul},
        "liger_kernel.transformers": {},
        "liger_kernel.transformers.functional": {"liger_fused_linear_cross_entropy": cross_entropy},
        "flashinfer": {"top_k": torch.topk},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_every_peer_that_runs_has_a_record(libraries, capsys, monkeypatch):
    if measure.DEVICE.type == "cuda":  # there FlexAttention compiles for half a minute
        few = tuple(op for op in peers.OPS if op != "shared_prefix_attention")
        monkeypatch.setattr(peers, "OPS", few)
    found = list(peers.run("dry"))
    said = capsys.readouterr().out
    for op in peers.OPS:
        module = importlib.import_module(f"benchmarks.ops.{op}")
        own = [record for record in found if record["case"]["op"] == op]
        timed = {record["peer"] for record in own}
        assert timed >= {"ours", "torch"}
        for name in module.PEERS:
            if op == "shared_prefix_attention":
                assert f"{name}: not run, {op} samples=2" in said
            elif name == "torch_linear_cross_entropy":  # newer than the oldest torch
                assert (name in timed) == hasattr(functional, "linear_cross_entropy")
            else:
                assert name in timed
                assert f"\n{name}: " in f"\n{said}"
        steps = {"forward", "both"} if op != "count_lowest" else {"forward"}
        assert {record["case"]["step"] for record in own} == steps
    assert all(table_line(x).startswith(f"| {x['case']['op']} | ") for x in found)
    # a chunk of 40 logits a row of 8 values: five times as much
    assert {"reduction": "none", "chunk_mem_const": 5} in libraries


def test_a_library_that_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(peers, "OPS", ("count_lowest",))
    timed = {record["peer"] for record in peers.run("dry")}
    assert timed == {"ours", "torch", "topk"}
    assert "flashinfer: not run, count_lowest samples=2" in capsys.readouterr().out


def test_a_wrong_peer_is_not_timed(monkeypatch, capsys):
    module = importlib.import_module("benchmarks.ops.gated_product")
    wrong = {
        "scaled": lambda inputs: lambda gate, up: functional.silu(gate) * up * 1.1,
        "gradless": lambda inputs: lambda gate, up: functional.silu(gate.detach()) * up + 0 * gate,
        "flat": lambda inputs: lambda gate, up: (functional.silu(gate) * up).flatten(),
    }
    monkeypatch.setattr(module, "PEERS", wrong)
    monkeypatch.setattr(peers, "OPS", ("gated_product",))
    found = {record["peer"] for record in peers.run("dry")}
    assert found - {"compiled"} == {"ours", "torch", "eager"}
    said = capsys.readouterr().out
    for name, reason in (
        ("scaled", "result 0 is off by 0.1"),
        ("gradless", "result 1 is off by 1 "),
        ("flat", "result 0 is [15], not [3, 5]"),
    ):
        line = next(x for x in said.splitlines() if x.startswith(f"{name}: not timed, "))
        assert reason in line


@pytest.mark.parametrize("peer", ["flex", "flex_and_self"])
def test_flex_attention_is_asked_for_the_same(peer, monkeypatch):
    """Its forward pass alone: on a CPU it has no other."""
    monkeypatch.setattr(shared_prefix_attention, "DEVICE", torch.device("cpu"))
    shape = {"samples": 3, "points": 7, "prefix": 20, "heads": 4, "kv_heads": 2, "dim": 16}
    case = shared_prefix_attention.make_case(**shape, ragged=True)
    inputs = {
        name: x.cpu().float() if x.is_floating_point() else x.cpu()
        for name, x in case.inputs.items()
    }
    assert inputs["prefix_lengths"].tolist() == [10, 15, 20]
    got = shared_prefix_attention.PEERS[peer](inputs)(**inputs)
    torch.testing.assert_close(got, shared_prefix_attention_reference(**inputs))
