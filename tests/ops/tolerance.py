"""What the op tests share: a small case of each op, gradients, and how close is close enough."""

from __future__ import annotations

import torch

from loki_kernels.ops import _dispatch


def example(op):
    """The inputs of the op's self-check, in float32 on the device under test."""
    inputs, _ = _dispatch.example(op, torch.get_default_device(), torch.float32)
    return inputs


def in_float64(inputs):
    """The same numbers; whole ones, and what is no tensor, stay."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    return inputs | {name: x.double() for name, x in tensors.items() if x.is_floating_point()}


def exact(inputs):
    """The same numbers in float64, the rows as the weight holds them."""
    held = {"rows": inputs["rows"].to(inputs["weight"].dtype)} if "rows" in inputs else {}
    return in_float64(inputs | held)


def holding_rows(
    names, lead, in_features, out_features, k, bias=True, dtype=torch.float32, rows_dtype=None
):
    """Inputs with an unsorted index and a weight that already holds the rows.

    Those in ``names`` are ``[*lead, in_features]``.
    """
    torch.manual_seed(in_features + out_features + k)
    index = torch.randperm(out_features)[:k]
    rows = torch.randn(k, in_features).to(rows_dtype or dtype)
    weight = torch.randn(out_features, in_features).to(dtype)
    return {
        **{name: torch.randn(*lead, in_features).to(dtype) for name in names},
        "weight": weight.index_copy(0, index, rows.to(dtype)),
        "rows": rows,
        "index": index,
        "bias": torch.randn(out_features).to(dtype) if bias else None,
    }


def protected(inputs, count):
    """The same with that many directions left alone, of each expert where there are several."""
    *experts, _, width = inputs["weight"].shape
    basis = torch.linalg.qr(torch.randn(*experts, width, count, dtype=torch.float64))[0]
    return inputs | {"directions": basis.to(inputs["x"].dtype)}


def output_and_gradients(op, inputs, upstream, wanted, **options):
    """What ``op`` gives, and the gradients of what is ``wanted`` and there."""
    inputs = {n: x if x is None else x.detach() for n, x in inputs.items()}
    leaves = [inputs[n].requires_grad_() for n in wanted if inputs[n] is not None]
    y = op(**inputs, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def relative(got, want):
    """The error against a float64 answer, as a share of its norm."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


def assert_as_close(got, same, best, floor):
    """Ours no further from float64 than twice what plain torch in the same dtype is."""
    for g, s, e in zip(got, same, best, strict=True):
        assert g.shape == e.shape
        assert g.dtype == s.dtype
        assert relative(g, e) < 2 * relative(s, e) + floor


def assert_near_float64(run, op, reference, inputs, upstream, floor=1e-6, **options):
    """`assert_as_close` of an op to its reference, of the same numbers and in float64."""
    best = run(reference, exact(inputs), upstream, **options)
    same = run(reference, inputs, upstream, **options)
    assert_as_close(run(op, inputs, upstream, **options), same, best, floor)
