from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

import loki_kernels
from loki_kernels import LokiLinear
from tests import models


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def make_layers(bias=True, dtype=torch.float32, rank=None, rows_dtype=None, rows=(0, 3, 8)):
    torch.manual_seed(0)
    linear = nn.Linear(7, 9, bias=bias).to(models.DEVICE, dtype)
    return copy.deepcopy(linear), LokiLinear.from_linear(
        linear, torch.tensor(rows), rank, rows_dtype
    )


def random_input(*shape):
    return models.to_device(torch.randn(*shape, 7))


def dense_weight(layer: LokiLinear, original: nn.Linear) -> torch.Tensor:
    """The weight the layer must act as, built without its own methods."""
    weight = original.weight.detach().clone()
    if layer.rank is None:
        weight[layer.index] = layer.rows.detach().to(weight.dtype)
    else:
        weight[layer.index] += (layer.delta_a @ layer.delta_b).detach().to(weight.dtype)
    return weight


def assert_acts_as_its_rows(layer, original):
    x = random_input(2, 5).to(original.weight.dtype)
    want = functional.linear(x, dense_weight(layer, original), original.bias)
    torch.testing.assert_close(layer(x), want)
    if layer.rank is None:
        assert torch.equal(layer.weight[layer.index], layer.rows.to(layer.weight.dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [None, 2])
def test_starts_as_the_linear_it_replaces(bias, rank):
    original, layer = make_layers(bias, rank=rank)
    x = random_input(4)
    assert torch.equal(layer(x), original(x))
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == (
        {"rows"} if rank is None else {"delta_a", "delta_b"}
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("rows_dtype", [None, torch.float64])
def test_follows_the_optimizer(compiled, rank, rows_dtype):
    """AdamW with weight decay, two forwards before each backward, against a dense weight."""
    original, layer = make_layers(rank=rank, rows_dtype=rows_dtype)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    optimizer = torch.optim.AdamW(
        [p for p in layer.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    for _ in range(3):
        x = random_input(3, 5)
        loss = run(x).square().mean() + run(x.flip(0)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        want = functional.linear(x, dense_weight(layer, original), original.bias)
        torch.testing.assert_close(run(x), want)
        with torch.no_grad():
            torch.testing.assert_close(run(x), want)
    assert not torch.allclose(dense_weight(layer, original), original.weight)
    frozen = [r for r in range(9) if r not in (0, 3, 8)]
    assert torch.equal(layer.merged_weight()[frozen], original.weight[frozen])


def test_compiles_once_for_many_steps():
    _, layer = make_layers()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(layer, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD([layer.rows], lr=0.1)
    for _ in range(4):
        run(random_input(3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1


def test_sees_writes_that_bump_no_version():
    original, layer = make_layers()
    layer(random_input(2))
    layer.rows.data.add_(1.0)
    assert_acts_as_its_rows(layer, original)
    with torch.no_grad():
        assert_acts_as_its_rows(layer, original)


@pytest.mark.parametrize("rank", [None, 2])
def test_follows_to_and_deepcopy(rank):
    original, layer = make_layers(rank=rank)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.5)
    moved = copy.deepcopy(layer).to(torch.float64)
    assert_acts_as_its_rows(moved, original.double())
    assert moved(random_input(2).double()).dtype == torch.float64


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_is_a_linears(assign):
    original, layer = make_layers()
    layer.rows.data.add_(0.5)
    state = layer.state_dict()
    assert list(state) == ["weight", "bias"]
    assert torch.equal(state["weight"], dense_weight(layer, original))
    plain = nn.Linear(7, 9)
    plain.load_state_dict(state)

    _, fresh = make_layers()
    fresh.load_state_dict(copy.deepcopy(state), assign=assign)
    assert torch.equal(fresh.rows, layer.rows)
    assert_acts_as_its_rows(fresh, original)
    with pytest.raises(RuntimeError, match="Missing"):
        fresh.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match="Unexpected"):
        fresh.load_state_dict({**state, "rows": layer.rows})
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict({**state, "weight": torch.zeros(9, 8)})


def test_low_rank_state_dict_holds_the_product():
    original, layer = make_layers(rank=2)
    layer.delta_a.data.normal_()
    state = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(state["weight"], dense_weight(layer, original))
    _, fresh = make_layers(rank=2)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.merged_weight(), state["weight"])
    assert torch.equal(fresh.weight, original.weight)
    _, small = make_layers(rank=1)
    with pytest.raises(RuntimeError, match="more than rank 1"):
        small.load_state_dict(state)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    _, layer = make_layers()
    x = random_input(3).requires_grad_()
    layer(x).square().sum().backward()
    want = layer.rows.grad.clone()
    layer.rows.grad = None
    torch.utils.checkpoint.checkpoint(
        layer, x, use_reentrant=use_reentrant
    ).square().sum().backward()
    assert torch.equal(layer.rows.grad, want)


def test_autocast_trains_in_float32():
    original, layer = make_layers()
    x = random_input(16)
    with torch.autocast(models.DEVICE.type, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.rows.grad.dtype == torch.float32
    original.weight.requires_grad_(True)
    original(x).square().sum().backward()
    want = original.weight.grad[layer.index]
    assert (layer.rows.grad - want).norm() < 0.02 * want.norm()


def test_reset_rows():
    for rank in (None, 2):
        original, layer = make_layers(rank=rank)
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.5)
        layer(random_input(2))
        layer.reset_rows()
        assert torch.equal(layer.merged_weight(), original.weight)


@pytest.mark.parametrize(
    ("rows", "rank", "message"),
    [
        ([9], None, "out of range"),
        ([-1], None, "out of range"),
        ([1, 1], None, "given twice"),
        ([0.5], None, "must be integers"),
        ([[1]], None, "must be integers"),
        ([1], 0, "rank must be"),
        ([1], 1.5, "rank must be"),
    ],
)
def test_bad_rows(rows, rank, message):
    linear = nn.Linear(7, 9)
    with pytest.raises(ValueError, match=message):
        LokiLinear.from_linear(linear, torch.tensor(rows), rank)
    assert linear.weight.requires_grad
    with pytest.raises(TypeError, match="not a Conv1d"):
        LokiLinear.from_linear(nn.Conv1d(1, 1, 1), [0])


def test_the_old_name_is_the_same_class():
    with pytest.warns(DeprecationWarning, match=r"loki_kernels\.LokiLinear now"):
        assert loki_kernels.LoKILinear is LokiLinear
