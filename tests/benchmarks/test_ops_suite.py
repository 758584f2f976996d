"""The benchmarks of the ops: what is timed is right, and every op's file makes a case."""

from __future__ import annotations

import importlib

import pytest
import torch

from benchmarks import measure
from benchmarks.ops import suite
from loki_kernels import ops


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    monkeypatch.setattr(measure, "ceilings", lambda: measure.Ceilings(1e12, 1e10))


def test_every_backend_has_a_record():
    found = list(suite.run("dry"))
    assert {record["case"]["op"] for record in found} == set(suite.OPS)
    for op in suite.OPS:
        module = importlib.import_module(f"benchmarks.ops.{op}")
        own = [record for record in found if record["case"]["op"] == op]
        backends = suite.backends_of(getattr(module, "BACKENDS_OF", op)) or ["torch"]
        assert "torch" in backends
        assert {record["peer"] for record in own} >= set(backends)
        assert ("backward" in {record["case"]["step"] for record in own}) == bool(
            module.make_case(**module.SHAPES["dry"][0]).differentiable
        )
    for record in found:
        assert record["suite"] == "ops"
        assert record["floor_s"] > 0
        assert record["host_s"]["p50"] > 0
        assert record["device_s"]["p50"] > 0


def test_a_wrong_backend_is_not_timed(monkeypatch):
    module = importlib.import_module("benchmarks.ops.gated_product")
    case = module.make_case(tokens=3, width=5)
    suite.check_results("gated_product", {"ours": ops.gated_product}, case)

    def wrong(gate, up):
        return ops.gated_product(gate, up) * 1.1

    with pytest.raises(SystemExit, match="result 0 of gated_product on wrong is off"):
        suite.check_results("gated_product", {"wrong": wrong}, case)


def test_an_op_that_disagrees_ends_no_other(monkeypatch, capsys):
    exact = ops.gated_product
    monkeypatch.setattr(ops, "gated_product", lambda *a, **o: 1.1 * exact(*a, **o))
    monkeypatch.setattr(suite, "OPS", ("gated_product", "count_lowest"))
    assert {record["case"]["op"] for record in suite.run("dry")} == {"count_lowest"}
    said = capsys.readouterr().out
    assert "not measured: gated_product tokens=3 width=5 dtype=" in said
    with pytest.raises(SystemExit, match=r"^not measured: gated_product [^;]*$"):
        measure.finish()


def test_the_least_work_of_an_update_is_one_product():
    """Tokens, in_features and out_features of SmolLM2's layer; the gradient of its own besides."""
    module = importlib.import_module("benchmarks.ops.row_delta_linear")
    dense = 2 * 64 * 1536 * 576
    for rows, own in ((57, 2 * 64 * 57 * 1536), (576, dense)):
        case = module.make_case(64, 1536, 576, rows=rows, rank=0)
        assert case.forward.flops == dense
        assert case.backward.flops == dense + own


def test_bfloat16_is_judged_by_what_rounding_costs(monkeypatch):
    for name in ("benchmarks.ops.suite", "benchmarks.ops.sync_rows"):
        monkeypatch.setattr(f"{name}.DTYPE", torch.bfloat16)
    monkeypatch.setattr(suite.normal, "__kwdefaults__", {"dtype": torch.bfloat16})
    for op in suite.OPS:
        module = importlib.import_module(f"benchmarks.ops.{op}")
        case = module.make_case(**module.SHAPES["dry"][0])
        suite.check_results(op, {"ours": getattr(ops, op)}, case)
