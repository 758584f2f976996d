from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch import library as torch_library

from loki_kernels.ops import TargetProbability, target_probability
from loki_kernels.ops.target_probability.reference import target_probability_reference
from tests.ops.tolerance import assert_near_float64, example, in_float64

# `import ... as` would give the function, which the package puts in its module's place
module = importlib.import_module("loki_kernels.ops.target_probability.torch_impl")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 2), (3, 63, 129), (129, 7, 63), (2, 129, 500)]
OPTIONS = [
    {},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"logit_scale": 1 / 3, "softcap": 2.0},
]
MIXES = [mix for mix in itertools.product([0, 1], repeat=3) if any(mix)]


def make(tokens, width, vocabulary, bias=True, dtype=torch.float32):
    torch.manual_seed(tokens + width + vocabulary)
    return {
        "hidden": torch.randn(tokens, width).to(dtype),
        "weight": (2 * torch.randn(vocabulary, width) / width**0.5).to(dtype),
        "target": torch.randint(0, vocabulary, (tokens,)),
        "bias": torch.randn(vocabulary).to(dtype) if bias else None,
    }


def run(op, inputs, upstream, **options):
    """The three outputs and the gradient of their sum weighted by ``upstream``."""
    hidden = inputs["hidden"].detach().requires_grad_()
    outputs = op(**(inputs | {"hidden": hidden}), **options)
    used = [(y, g.to(y.dtype)) for y, g in zip(outputs, upstream, strict=True) if g is not None]
    (gradient,) = torch.autograd.grad([y for y, _ in used], hidden, [g for _, g in used])
    return [*(y.detach() for y in outputs), gradient]


def assert_two_references(inputs, mix=(1, 1, 1), floor=1e-6, **options):
    upstream = [torch.randn(len(inputs["hidden"])) if used else None for used in mix]
    pair = target_probability, target_probability_reference
    assert_near_float64(run, *pair, inputs, upstream, floor, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_reference(size, options, bias, dtype):
    floor = 1e-12 if dtype == torch.float64 else 1e-6
    if dtype.itemsize == 2:  # the rounding errors of one or two tokens are too few to compare
        size = (max(size[0], 63), *size[1:])
    assert_two_references(make(*size, bias=bias, dtype=dtype), floor=floor, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mix", MIXES)
def test_gradient_of_each_output_and_every_mix(mix, options, dtype):
    floor = 1e-12 if dtype == torch.float64 else 1e-6
    assert_two_references(make(63, 63, 129, dtype=dtype), mix, floor, **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("output", range(3))
def test_gradcheck(output, options):
    inputs = make(3, 5, 7, dtype=torch.float64)
    hidden = inputs.pop("hidden").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: target_probability(h, **inputs, **options)[output], hidden
    )


def test_worked_example():
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 9.0], [3.0, 9.0]]).log1p()
    got = target_probability(hidden, weight, torch.tensor([1]))
    assert isinstance(got, TargetProbability)
    assert got.probability.item() == pytest.approx(0.8)
    assert got.logit.item() == pytest.approx(torch.tensor(4.0).log().item())
    assert got.log_probability.item() == pytest.approx(torch.tensor(0.8).log().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_dtype(dtype):
    want = torch.float64 if dtype == torch.float64 else torch.float32
    got = target_probability(**make(3, 5, 7, dtype=dtype))
    assert {y.dtype for y in got} == {want}


@pytest.mark.parametrize("elements", [1, 63, 129, 129 * 4, 129 * 10 - 1])
@pytest.mark.parametrize("options", OPTIONS)
def test_chunks_equal_the_whole(elements, options, monkeypatch):
    inputs = make(10, 63, 129, dtype=torch.float64)
    upstream = torch.randn(3, 10)
    whole = run(target_probability, inputs, upstream, **options)
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setitem(module.CHUNK_ELEMENTS, torch.get_default_device().type, elements)
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *a: (calls.append(len(a[0])), linear(*a))[1]
    )
    chunked = run(target_probability, inputs, upstream, **options)
    size = max(1, elements // 129)
    assert max(calls) == size
    assert sum(calls) == 10
    for c, w in zip(chunked, whole, strict=True):
        torch.testing.assert_close(c, w)


@pytest.mark.parametrize("grad", [True, False])
def test_no_tokens(grad):
    inputs = make(0, 5, 7)
    inputs["hidden"].requires_grad_(grad)
    got = target_probability(**inputs)
    assert [y.shape for y in got] == [(0,)] * 3
    if grad:
        got.probability.sum().backward()
        assert inputs["hidden"].grad.shape == (0, 5)


def test_without_gradient():
    inputs = make(9, 63, 129, dtype=torch.float64)
    got = target_probability(**inputs)
    assert not any(y.requires_grad for y in got)
    for g, w in zip(got, target_probability_reference(**inputs), strict=True):
        torch.testing.assert_close(g, w)


def test_differentiable_in_hidden_alone():
    inputs = make(3, 5, 7)
    for name in ("hidden", "weight", "bias"):
        inputs[name].requires_grad_()
    target_probability(**inputs).logit.sum().backward()
    assert inputs["hidden"].grad is not None
    assert inputs["weight"].grad is None
    assert inputs["bias"].grad is None
    inputs["hidden"].requires_grad_(False)
    assert not any(y.requires_grad for y in target_probability(**inputs))


@pytest.mark.parametrize("options", OPTIONS)
def test_non_contiguous(options):
    inputs = make(20, 63, 129)
    inputs["hidden"] = inputs["hidden"].t().contiguous().t()[::2]
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    inputs["target"] = inputs["target"][::2]
    assert not inputs["hidden"].is_contiguous()
    assert not inputs["weight"].is_contiguous()
    assert_two_references(inputs, **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_is_written_over(options):
    inputs = make(9, 63, 129)
    before = {name: x.clone() for name, x in inputs.items()}
    hidden = inputs["hidden"].requires_grad_()
    outputs = target_probability(**inputs, **options)
    kept = [y.detach().clone() for y in outputs]
    loss = sum(y.sum() for y in outputs)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, second)
    assert all(torch.equal(inputs[name], before[name]) for name in before)
    assert all(torch.equal(y, k) for y, k in zip(outputs, kept, strict=True))


def test_large_logits_stay_finite():
    inputs = make(9, 63, 129)
    inputs["weight"] *= 1000
    upstream = torch.ones(3, 9)
    got = run(target_probability, inputs, upstream)
    assert all(torch.isfinite(y).all() for y in got)
    assert_two_references(inputs)


@pytest.mark.parametrize("offset", [-100.0, -20.0, 0.0, 20.0, 100.0])
@pytest.mark.parametrize("ahead", [8.0, 14.0, 30.0])
def test_tokens_that_the_model_is_sure_of(ahead, offset):
    """1 - p, by which all of the gradient of log p goes, to the digits that the logits have."""
    inputs = make(9, 63, 129)
    inputs["bias"] = torch.full((129,), offset)
    logits = torch.nn.functional.linear(inputs["hidden"], inputs["weight"])
    inputs["target"] = logits.argmax(-1)
    inputs["bias"][inputs["target"]] += ahead
    inputs["target"] = (logits + inputs["bias"]).argmax(-1)
    upstream = [None, None, torch.ones(9)]
    got = run(target_probability, inputs, upstream)
    best = run(target_probability_reference, in_float64(inputs), upstream)
    # float32 logits of `ahead + offset` are rounded, once more where the bias is added
    spacing = 2.0**-23 * (abs(offset) + ahead + 8)
    for result, want in zip(got[2:], best[2:], strict=True):
        size = want.abs() if want.ndim == 1 else want.abs().amax(1, True)
        assert ((result.double() - want).abs() <= 4 * spacing * size).all()


def test_logits_of_tokens_that_are_ruled_out():
    """A head may give -inf for padding of its vocabulary, and for all tokens but one."""
    inputs = make(3, 5, 7)
    inputs["target"] = torch.tensor([1, 1, 2])
    inputs["bias"][3:] = float("-inf")
    upstream = torch.ones(3, 3)
    best = run(target_probability_reference, in_float64(inputs), upstream)
    for got, want in zip(run(target_probability, inputs, upstream), best, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    inputs["bias"][[0, 2]] = float("-inf")
    got = target_probability(**inputs | {"target": torch.tensor([1, 1, 1])})
    assert got.probability.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("gradient", [True, False])
def test_registration(gradient):
    inputs = example("target_probability")
    inputs["hidden"].requires_grad_(gradient)
    torch_library.opcheck(
        torch.ops.loki_kernels.target_probability.default, (*inputs.values(), gradient, None)
    )


def test_compiles_whole():
    torch._dynamo.reset()
    inputs = example("target_probability")
    compiled = torch.compile(target_probability, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(3, len(inputs["hidden"]))
    got = run(compiled, inputs, upstream)
    for g, w in zip(got, run(target_probability, inputs, upstream), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("hidden", (5,)),
        ("hidden", (1, 3, 5)),
        ("hidden", (3, 6)),
        ("weight", (7, 6)),
        ("weight", (5,)),
        ("weight", (1, 7, 5)),
        ("target", (2,)),
        ("target", (3, 1)),
        ("target", ()),
        ("bias", (6,)),
        ("bias", (1,)),
    ],
)
def test_shapes_that_do_not_fit_raise(name, shape):
    inputs = make(3, 5, 7)
    inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    with pytest.raises(ValueError, match=r"fit|must be"):
        target_probability(**inputs)


@pytest.mark.parametrize("token", [7, 4500])
def test_a_nan_logit_makes_the_probability_nan(token):
    """Wherever it is; Triton's kernel takes 4,096 logits at a time."""
    inputs = make(3, 5, 5000, bias=False) | {"target": torch.tensor([1, 4200, 4999])}
    inputs["weight"][token] = float("nan")
    outputs = target_probability(**inputs)
    assert outputs.probability.isnan().all()
    assert outputs.log_probability.isnan().all()
    assert outputs.logit.isfinite().all()
