from __future__ import annotations

import pytest
import torch
from torch import library as torch_library

from loki_kernels.ops import shared_prefix_attention
from loki_kernels.ops.shared_prefix_attention.reference import (
    shared_prefix_attention_reference,
)
from tests.ops.tolerance import assert_as_close, example, in_float64

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HEADS = [(1, 1), (4, 4), (4, 2), (6, 1)]  # multi-head, grouped, multi-query
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 1.5},
    "window": {"window": 4},
    "sinks": {"sinks": True},
    "ragged": {"prefix_lengths": (0, 9, 5)},
    "all": {
        "scale": 0.7,
        "softcap": 1.5,
        "window": 4,
        "sinks": True,
        "prefix_lengths": (9, 0, 3),
    },
}


def make(heads=4, kv_heads=2, batch=3, points=5, prefix=9, dim=7, dtype=torch.float64):
    torch.manual_seed(heads + points + prefix + dim)
    shapes = {
        "q": (batch, heads, points, dim),
        "k": (batch, kv_heads, points, dim),
        "v": (batch, kv_heads, points, dim),
        "prefix_k": (batch, kv_heads, prefix, dim),
        "prefix_v": (batch, kv_heads, prefix, dim),
    }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def resolve(options, heads, dtype):
    """Options with the tensors they stand for."""
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-1, 2, heads).to(dtype)
    if "prefix_lengths" in options:
        options["prefix_lengths"] = torch.tensor(options["prefix_lengths"])
    return options


def naive(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    prefix_lengths=None,
    scale=None,
    softcap=None,
    window=None,
    sinks=None,
):
    """Each sample, head and point by itself, over a list of the keys it may see."""
    batch, heads, points, dim = q.shape
    groups = heads // k.shape[1]
    out = []
    for b in range(batch):
        length = prefix_k.shape[2] if prefix_lengths is None else int(prefix_lengths[b])
        visible = list(range(length))
        if window is not None:
            visible = [position for position in visible if position > length - window]
        for h in range(heads):
            g = h // groups
            for n in range(points):
                keys = torch.cat([prefix_k[b, g, visible], k[b, g, n : n + 1]])
                values = torch.cat([prefix_v[b, g, visible], v[b, g, n : n + 1]])
                scores = (keys * q[b, h, n]).sum(-1) * (dim**-0.5 if scale is None else scale)
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1]])
                weights = scores.softmax(0)
                out.append((weights[: len(keys), None] * values).sum(0))
    return torch.stack(out).view(batch, heads, points, dim)


def run(op, inputs, options, upstream):
    own = {name: inputs[name].detach().requires_grad_() for name in ("q", "k", "v")}
    y = op(**(inputs | own), **options)
    return [y.detach(), *torch.autograd.grad(y, list(own.values()), upstream.to(y.dtype))]


def assert_equals_naive(inputs, options):
    upstream = torch.randn(inputs["q"].shape).to(inputs["q"].dtype)
    exact = run(naive, in_float64(inputs), in_float64(options), upstream)
    same = run(naive, inputs, options, upstream)
    got = run(shared_prefix_attention, inputs, options, upstream)
    floor = 1e-12 if inputs["q"].dtype == torch.float64 else 1e-6
    assert_as_close(got, same, exact, floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_equals_naive(heads, kv_heads, options, dtype):
    inputs = make(heads, kv_heads, dtype=dtype)
    assert_equals_naive(inputs, resolve(options, heads, dtype))


@pytest.mark.parametrize(
    ("batch", "points", "prefix", "dim"),
    [(1, 1, 1, 1), (1, 1, 129, 63), (1, 63, 3, 8), (2, 2, 63, 5), (1, 2, 500, 16)],
)
def test_odd_sizes(batch, points, prefix, dim):
    for dtype in (torch.float64, torch.float32):
        inputs = make(4, 2, batch, points, prefix, dim, dtype)
        assert_equals_naive(inputs, {"window": 17, "softcap": 2.0})


@pytest.mark.parametrize("window", [1, 2, 5, 9, 10, 11, 1000])
@pytest.mark.parametrize("prefix_lengths", [None, (0, 9, 4), (1, 1, 1)])
def test_every_window_edge(window, prefix_lengths):
    options = {"window": window}
    if prefix_lengths is not None:
        options["prefix_lengths"] = prefix_lengths
    assert_equals_naive(make(points=2), resolve(options, 4, torch.float64))


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"window": 3}])
def test_alone_a_point_sees_itself(options):
    """Empty prefix, length 0 and a window of 1: the output is the point's own value."""
    empty, full = make(prefix=0), make()
    for inputs, extra in (
        (empty, {}),
        (empty, {"prefix_lengths": torch.zeros(3, dtype=torch.int64)}),
        (full, {"prefix_lengths": torch.zeros(3, dtype=torch.int64)}),
        (full, {"window": 1}),
    ):
        got = shared_prefix_attention(**inputs, **(options | extra))
        torch.testing.assert_close(got, inputs["v"].repeat_interleave(2, 1))
    assert_equals_naive(empty, options)


def test_empty_prefix_with_sinks():
    inputs = make(prefix=0)
    assert_equals_naive(inputs, resolve({"sinks": True}, 4, torch.float64))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"points": 0}])
def test_no_points(sizes):
    inputs = make(**sizes)
    assert shared_prefix_attention(**inputs).shape == inputs["q"].shape


@pytest.mark.parametrize("name", ["plain", "all"])
def test_non_contiguous(name):
    inputs = make(dtype=torch.float32)
    inputs = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in inputs.items()}
    assert not any(x.is_contiguous() for x in inputs.values())
    assert_equals_naive(inputs, resolve(OPTIONS[name], 4, torch.float32))


def test_expanded_prefix():
    """One prefix for all samples, by a stride of 0."""
    inputs = make()
    for n in ("prefix_k", "prefix_v"):
        inputs[n] = inputs[n][:1].expand(3, -1, -1, -1)
    assert_equals_naive(inputs, {})


def test_strided_lengths_and_sinks():
    inputs = make(dtype=torch.float32)
    options = resolve(OPTIONS["all"], 4, torch.float32)
    for name, x in options.items():
        if isinstance(x, torch.Tensor):
            table = torch.full((len(x), 2), 1, dtype=x.dtype)
            table[:, 0] = x
            options[name] = table[:, 0]
            assert not options[name].is_contiguous()
    assert_equals_naive(inputs, options)


def test_points_do_not_see_each_other():
    inputs = make()
    want = shared_prefix_attention(**inputs)
    for name in ("q", "k", "v"):
        inputs[name][:, :, 2] += 1
    got = shared_prefix_attention(**inputs)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(got[:, :, others], want[:, :, others])
    assert not torch.allclose(got[:, :, 2], want[:, :, 2])


def test_padding_is_not_read():
    inputs, lengths = make(), torch.tensor([0, 4, 8])
    want = shared_prefix_attention(**inputs, prefix_lengths=lengths)
    for b, length in enumerate(lengths):
        inputs["prefix_k"][b, :, length:] = 1e30
        inputs["prefix_v"][b, :, length:] = 1e30
    got = shared_prefix_attention(**inputs, prefix_lengths=lengths)
    torch.testing.assert_close(got, want)


def test_prefix_gets_no_gradient():
    inputs = {n: x.requires_grad_() for n, x in make().items()}
    shared_prefix_attention(**inputs).sum().backward()
    assert {n for n, x in inputs.items() if x.grad is not None} == {"q", "k", "v"}


@pytest.mark.parametrize("name", ["plain", "all"])
def test_gradcheck(name):
    inputs = make(heads=2, kv_heads=1, batch=3, points=2, dim=2)
    own = [inputs.pop(n).requires_grad_() for n in ("q", "k", "v")]
    options = resolve(OPTIONS[name], 2, torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v: shared_prefix_attention(q, k, v, **inputs, **options), own
    )


def test_large_scores_stay_finite():
    inputs = make(dtype=torch.float32)
    inputs["q"] *= 1e4
    for y in run(shared_prefix_attention, inputs, {}, torch.ones_like(inputs["q"])):
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_dimensions(dim, dtype):
    inputs = make(batch=2, points=3, prefix=33, dim=dim, dtype=dtype)
    assert_equals_naive(inputs, {"prefix_lengths": torch.tensor([33, 17])})


@pytest.mark.parametrize("heads", [(7, 1), (14, 2), (9, 3), (32, 1)])
def test_groups_that_are_no_power_of_two(heads):
    inputs = make(*heads, batch=2, points=5, dtype=torch.float32)
    assert_equals_naive(inputs, {})


@pytest.mark.parametrize(("heads", "dim"), [(32, 128), (2, 256)])
def test_what_no_tile_holds_runs_on_torch(heads, dim, backend):
    """In float32, 32 query heads of dimension 128, or any of 256: both steps choose alike."""
    inputs = make(heads, 1, batch=1, points=2, dim=dim, dtype=torch.float32)
    assert_equals_naive(inputs, {})
    if backend == "triton":
        with pytest.raises(RuntimeError, match="no tile of its kernel holds"):
            shared_prefix_attention(**inputs, backend="triton")


def test_more_samples_than_a_grid_holds_run_on_torch(backend):
    if backend != "triton":
        pytest.skip("the limit is Triton's")
    q = torch.zeros(1, 2, 1, 16).expand(65536, -1, -1, -1)
    prefix = torch.zeros(1, 2, 3, 16).expand(65536, -1, -1, -1)
    assert shared_prefix_attention(q, q, q, prefix, prefix).shape == q.shape
    with pytest.raises(RuntimeError, match="takes up to 65535 samples, not 65536"):
        shared_prefix_attention(q, q, q, prefix, prefix, backend="triton")


@pytest.mark.parametrize(("points", "prefix"), [(1, 129), (63, 1), (129, 63), (2, 500), (1, 8192)])
def test_sizes(points, prefix):
    inputs = make(batch=1, points=points, prefix=prefix, dim=16, dtype=torch.float32)
    assert_equals_naive(inputs, {"window": 100, "softcap": 5.0})


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_equals_naive(name):
    """The definition the kernels are held to is itself right."""
    inputs, options = make(), resolve(OPTIONS[name], 4, torch.float64)
    upstream = torch.randn_like(inputs["q"])
    want = run(naive, inputs, options, upstream)
    got = run(shared_prefix_attention_reference, inputs, options, upstream)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_registration(name):
    inputs, options = make(dtype=torch.float32), resolve(OPTIONS[name], 4, torch.float32)
    own = [inputs[n].requires_grad_() for n in ("q", "k", "v")]
    torch_library.opcheck(
        torch.ops.loki_kernels.shared_prefix_attention.default,
        (
            *own,
            inputs["prefix_k"],
            inputs["prefix_v"],
            options.get("prefix_lengths"),
            options.get("sinks"),
            0.7,
            options.get("softcap"),
            options.get("window"),
            None,
        ),
    )


def test_compiles_whole():
    torch._dynamo.reset()
    inputs = example("shared_prefix_attention")
    compiled = torch.compile(shared_prefix_attention, fullgraph=True, backend="aot_eager")
    upstream = torch.randn_like(inputs["q"])
    got = run(compiled, inputs, {}, upstream)
    for g, w in zip(got, run(shared_prefix_attention, inputs, {}, upstream), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (3, 2, 4, 7)}, "k and v"),
        ({"k": (3, 2, 5, 8)}, "k and v"),
        ({"k": (2, 2, 5, 7)}, "k and v"),
        ({"v": (3, 2, 4, 7)}, "k and v"),
        ({"v": (3, 4, 5, 7)}, "k and v"),
        ({"k": (3, 3, 5, 7), "v": (3, 3, 5, 7)}, "multiple"),
        ({"k": (3, 8, 5, 7), "v": (3, 8, 5, 7)}, "multiple"),
        ({"prefix_k": (3, 2, 8, 7)}, "prefix_v"),
        ({"prefix_v": (3, 2, 8, 7)}, "prefix_v"),
        ({"prefix_k": (1, 2, 9, 7)}, "prefix_k"),
        ({"prefix_k": (3, 4, 9, 7), "prefix_v": (3, 4, 9, 7)}, "prefix_k"),
        ({"prefix_k": (3, 2, 9, 6)}, "prefix_k"),
        ({"prefix_lengths": (2,)}, "prefix_lengths"),
        ({"prefix_lengths": (3, 1)}, "prefix_lengths"),
        ({"sinks": (3,)}, "sinks"),
        ({"q": (3, 4, 5)}, "q must have 4 dimensions"),
        ({"k": (3,)}, "k must have 4 dimensions"),
        ({"prefix_k": (3,)}, "prefix_k must have 4 dimensions"),
    ],
)
def test_shapes_that_do_not_fit_raise(changes, message):
    inputs = make() | {name: torch.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(**inputs)


@pytest.mark.parametrize("window", [0, -3])
def test_window_below_one_raises(window):
    with pytest.raises(ValueError, match="window"):
        shared_prefix_attention(**make(), window=window)
