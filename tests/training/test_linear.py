from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from loki_kernels import LokiLinear
from tests import models
from tests.tiny_training import optimizer_of


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def make_layers(bias=True, dtype=torch.float32, rank=None, rows=(0, 3, 8)):
    torch.manual_seed(0)
    linear = nn.Linear(7, 9, bias=bias).to(models.DEVICE, dtype)
    return copy.deepcopy(linear), LokiLinear(linear, torch.tensor(rows), rank)


def random_input(*shape):
    return models.to_device(torch.randn(*shape, 7))


def dense_weight(layer: LokiLinear, original: nn.Linear) -> torch.Tensor:
    """The weight the layer must act as, built without its own methods."""
    weight = original.weight.detach().clone()
    update = layer.update if layer.rank is None else layer.delta_a @ layer.delta_b
    weight[layer.index] = (weight[layer.index] + update.detach()).to(weight.dtype)
    return weight


def assert_acts_as_its_rows(layer, original):
    x = random_input(2, 5).to(original.weight.dtype)
    want = functional.linear(x, dense_weight(layer, original), original.bias)
    torch.testing.assert_close(layer(x), want)
    if layer.rank is None:
        assert torch.equal(layer.weight, dense_weight(layer, original))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [None, 2])
def test_starts_as_the_linear_it_replaces(bias, rank):
    original, layer = make_layers(bias, rank=rank)
    x = random_input(4)
    assert torch.equal(layer(x), original(x))
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == (
        {"update"} if rank is None else {"delta_a", "delta_b"}
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [None, 2])
def test_what_is_trained_is_no_coarser_than_float32(dtype, rank):
    _, layer = make_layers(dtype=dtype, rank=rank)
    want = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {want}


def test_small_steps_survive_a_bfloat16_weight():
    """A step of 1e-5 is lost in a bfloat16 weight of .3, and a hundred of them are not."""
    original, layer = make_layers(dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([layer.update], lr=1e-5, weight_decay=0.0)
    for _ in range(100):
        layer(random_input(8).abs().bfloat16()).float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (layer.update.abs() > 5e-4).float().mean() > 0.9
    assert not torch.equal(layer.merged_weight(), original.weight)


def test_gradients_scale_in_float16():
    _, layer = make_layers(dtype=torch.float16)
    optimizer = torch.optim.SGD([layer.update], lr=0.1)
    scaler = torch.amp.GradScaler(models.DEVICE.type, init_scale=8.0)
    scaler.scale(layer(random_input(4).half()).float().sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert layer.update.abs().max() > 0


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_weight_decay_pulls_to_the_base(optimizer):
    original, layer = make_layers()
    layer.update.data.fill_(1.0)
    step = optimizer([layer.update], lr=0.1, weight_decay=0.5)
    for _ in range(200):
        layer.update.grad = torch.zeros_like(layer.update)
        step.step()
    torch.testing.assert_close(layer.merged_weight(), original.weight.data, atol=1e-3, rtol=0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_follows_the_optimizer(compiled, rank, dtype):
    """AdamW with weight decay, two forwards before each backward, against a dense weight."""
    original, layer = make_layers(rank=rank, dtype=dtype)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    optimizer = optimizer_of(layer, lr=0.1)
    for _ in range(3):
        x = random_input(3, 5).to(dtype)
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
    optimizer = torch.optim.SGD([layer.update], lr=0.1)
    for _ in range(4):
        run(random_input(3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1


@pytest.mark.parametrize("before", [False, True])
def test_compiled_after_eager(before):
    """The weight holds what an eager forward pass wrote, which is no longer the update."""
    original, layer = make_layers()
    layer.update.data.normal_()
    if before:
        layer(random_input(2))
    assert layer.written is before
    layer.update.data.mul_(2.0)
    x = random_input(3)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    want = functional.linear(x, dense_weight(layer, original), original.bias)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert layer.update.grad.abs().max() > 0


def test_sees_writes_that_bump_no_version():
    original, layer = make_layers()
    layer(random_input(2))
    layer.update.data.add_(1.0)
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
    emptied = copy.deepcopy(layer).to("meta").to_empty(device=layer.index.device)
    assert torch.equal(emptied.index, layer.index)  # a device without numbers takes none


FACTORS = {None: ["update"], 2: ["delta_a", "delta_b"]}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_goes_on_bit_for_bit(dtype, rank, assign):
    original, layer = make_layers(dtype=dtype, rank=rank)
    for _, parameter in layer.trained_parameters():
        parameter.data.normal_()
    state = copy.deepcopy(layer.state_dict())
    assert set(state) == {"weight", "bias", "index", *FACTORS[rank]}
    assert torch.equal(state["weight"], dense_weight(layer, original))
    _, fresh = make_layers(dtype=dtype, rank=rank)
    fresh.load_state_dict(copy.deepcopy(state), assign=assign)
    for name, parameter in fresh.trained_parameters():
        assert torch.equal(parameter, state[name])
    x = random_input(4).to(dtype)
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(fresh.merged_weight(), state["weight"])


@pytest.mark.parametrize("rank", [None, 2])
def test_what_is_merged_alone_is_no_state_to_train_from(rank):
    _, layer = make_layers(dtype=torch.bfloat16, rank=rank)
    for _, parameter in layer.trained_parameters():
        parameter.data.normal_()
    state = layer.state_dict()
    merged = {name: state[name].clone() for name in ("weight", "bias")}
    plain = nn.Linear(7, 9).to(models.DEVICE, torch.bfloat16)
    plain.load_state_dict(merged)
    _, fresh = make_layers(dtype=torch.bfloat16, rank=rank)
    x = random_input(4).bfloat16()
    fresh.load_state_dict(merged)
    with pytest.raises(RuntimeError, match=r"handle\.trainer_callback\(\)"):
        fresh(x)
    if rank is None:
        with torch.no_grad():
            assert torch.equal(fresh(x), plain(x))
        assert torch.equal(fresh.merged_weight(), merged["weight"])
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), layer(x))
    fresh.load_state_dict(merged)  # the update it already has
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("rank", [None, 2])
def test_updates_that_are_loaded_after_merged_weights_can_be_trained_from(rank):
    """As of an average of state dicts: the base is known, and the update by now."""
    _, layer = make_layers(dtype=torch.bfloat16, rank=rank)
    _, other = make_layers(dtype=torch.bfloat16, rank=rank)
    for _, parameter in (*layer.trained_parameters(), *other.trained_parameters()):
        parameter.data.normal_()
    _, fresh = make_layers(dtype=torch.bfloat16, rank=rank)
    fresh.load_state_dict({n: other.state_dict()[n] for n in ("weight", "bias")}, strict=False)
    updates = dict(layer.trained_parameters())
    if rank is not None:
        fresh.load_state_dict({"delta_a": updates["delta_a"]}, strict=False)
    x = random_input(4).bfloat16()
    with pytest.raises(RuntimeError, match="not the update itself"):
        fresh(x)
    fresh.load_state_dict(updates, strict=False)
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(fresh.merged_weight(), layer.merged_weight())


def test_merged_weights_of_no_update_are_the_base():
    original, layer = make_layers(rank=2)
    layer.load_state_dict(original.state_dict())
    x = random_input(2)
    assert torch.equal(layer(x), original(x))


def test_a_state_of_other_rows_or_another_base_is_refused():
    _, layer = make_layers()
    layer.update.data.normal_()
    state = copy.deepcopy(layer.state_dict())
    _, other = make_layers(rows=(0, 3, 7))
    with pytest.raises(RuntimeError, match="rows that were trained are others"):
        other.load_state_dict(state)
    assert torch.equal(other.update, torch.zeros_like(other.update))
    merged = nn.Linear(7, 9).to(models.DEVICE)
    merged.load_state_dict({name: state[name] for name in ("weight", "bias")})
    again = LokiLinear(merged, [0, 3, 8])
    with pytest.raises(RuntimeError, match="of other base weights"):
        again.load_state_dict(state)
    assert torch.equal(again.update, torch.zeros_like(again.update))


def test_strict_loading():
    _, layer = make_layers()
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="Missing"):
        layer.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match="Unexpected"):
        layer.load_state_dict({**state, "rows": layer.update})
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({**state, "weight": torch.zeros(9, 8)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({**state, "update": torch.zeros(3, 8)})


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    _, layer = make_layers()
    x = random_input(3).requires_grad_()
    layer(x).square().sum().backward()
    want = layer.update.grad.clone()
    layer.update.grad = None
    torch.utils.checkpoint.checkpoint(
        layer, x, use_reentrant=use_reentrant
    ).square().sum().backward()
    assert torch.equal(layer.update.grad, want)


@pytest.mark.parametrize("rank", [None, 2])
def test_rows_are_merged_in_float32_inside_autocast(rank):
    layer = LokiLinear(models.to_device(nn.Linear(11, 6)), torch.tensor([1, 4]), rank)
    for _, parameter in layer.trained_parameters():
        nn.init.normal_(parameter)
    want = layer.merged_rows()
    with torch.autocast(models.DEVICE.type, torch.bfloat16):
        assert torch.equal(layer.merged_rows(), want)


def test_autocast_trains_in_float32():
    original, layer = make_layers()
    x = random_input(16)
    with torch.autocast(models.DEVICE.type, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.update.grad.dtype == torch.float32
    original.weight.requires_grad_(True)
    original(x).square().sum().backward()
    want = original.weight.grad[layer.index]
    assert (layer.update.grad - want).norm() < 0.02 * want.norm()


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
        LokiLinear(linear, torch.tensor(rows), rank)
    assert linear.weight.requires_grad
    with pytest.raises(TypeError, match="not a Conv1d"):
        LokiLinear(nn.Conv1d(1, 1, 1), [0])


def test_rows_that_a_state_dict_passed_over_are_not_merged():
    """Of a low rank, whose weight is the base: the update is not that of what was loaded."""
    _, layer = make_layers(rank=2)
    layer.passed_over = True
    with pytest.raises(RuntimeError, match="has nothing of these rows"):
        layer.merged_rows()
