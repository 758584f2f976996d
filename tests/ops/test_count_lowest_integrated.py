from __future__ import annotations

import pytest
import torch

from loki_kernels.ops import count_lowest_integrated, integrate_path
from loki_kernels.ops.count_lowest_integrated.reference import count_lowest_integrated_reference
from tests.ops.tolerance import example

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# samples, points, width
SIZES = [(1, 1, 1), (3, 7, 63), (5, 2, 129), (2, 50, 500)]


def make(samples, points, width, dtype=torch.float32, span="baseline", per_row=True):
    """Whole numbers: scores are exact in every dtype and order of summation, and many are equal."""
    torch.manual_seed(samples + points + width)
    inputs = {
        "gradients": torch.randint(-4, 5, (samples, points, width)).to(dtype),
        "weights": 2.0 ** torch.randint(-2, 2, (samples, points) if per_row else (points,)),
        "z": torch.randint(-4, 5, (samples, width)).to(dtype),
        "baseline": torch.randint(-4, 5, (samples, width)).to(dtype),
    }
    dropped = {"none": ("z", "baseline"), "z": ("baseline",), "baseline": ()}[span]
    return inputs | dict.fromkeys(dropped)


def assert_equal(got, want):
    assert got.counts.dtype == torch.int64
    assert got.sums.dtype == torch.float64
    assert torch.equal(got.counts, want[0])
    assert torch.equal(got.sums, want[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("criterion", ["signed", "magnitude"])
@pytest.mark.parametrize("span", ["none", "z", "baseline"])
@pytest.mark.parametrize("size", SIZES)
def test_equals_reference(size, span, criterion, dtype):
    inputs = make(*size, dtype, span)
    width = size[-1]
    for k in {0, 1, width // 3, width}:
        got = count_lowest_integrated(**inputs, k=k, criterion=criterion)
        assert_equal(got, count_lowest_integrated_reference(**inputs, k=k, criterion=criterion))
        assert got.counts.sum() == k * size[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ranks_what_integrate_path_gives(dtype):
    """With numbers that round: a node can only change sides if it lies on the threshold."""
    torch.manual_seed(0)
    gradients, z = torch.randn(9, 7, 257).to(dtype), torch.randn(9, 257).to(dtype)
    weights, k = torch.rand(9, 7), 60
    exact = integrate_path(gradients.double(), weights, z.double())
    threshold = exact.sort(-1).values[:, k - 1 : k]
    near = ((exact - threshold).abs() < 1e-5).any(0)
    got = count_lowest_integrated(gradients, weights, z, None, k)
    want = (exact <= threshold).sum(0)
    assert near.sum() < 20
    assert torch.equal(got.counts[~near], want[~near])
    torch.testing.assert_close(got.sums, exact.sum(-1), rtol=1e-5, atol=1e-4)


def test_one_weight_row_for_all_samples():
    inputs = make(3, 7, 63, per_row=False)
    assert_equal(
        count_lowest_integrated(**inputs, k=9), count_lowest_integrated_reference(**inputs, k=9)
    )


def test_one_baseline_for_all_samples():
    inputs = make(3, 7, 63)
    inputs["baseline"] = inputs["baseline"][0]
    assert_equal(
        count_lowest_integrated(**inputs, k=9), count_lowest_integrated_reference(**inputs, k=9)
    )


def test_non_contiguous():
    inputs = {n: x.mT.contiguous().mT for n, x in make(3, 7, 63).items()}
    inputs["gradients"] = inputs["gradients"].repeat_interleave(2, 1)[:, ::2]
    assert not any(x.is_contiguous() for x in inputs.values())
    counts = torch.zeros(2 * 63, dtype=torch.int64)[::2]
    got = count_lowest_integrated(**inputs, k=9, counts=counts)
    assert got.counts is counts
    assert_equal(got, count_lowest_integrated_reference(**inputs, k=9))


def test_rows_wider_than_the_narrow_kernel():
    inputs = make(2, 2, 8193)
    assert_equal(
        count_lowest_integrated(**inputs, k=999),
        count_lowest_integrated_reference(**inputs, k=999),
    )


def test_adds_to_counts_in_place():
    inputs = make(3, 7, 63)
    counts = torch.arange(63)
    want = count_lowest_integrated_reference(**inputs, k=9, counts=counts.clone())
    assert torch.equal(count_lowest_integrated(**inputs, k=9, counts=counts).counts, want[0])


@pytest.mark.parametrize("k", [0, 5])
def test_a_sample_with_nan_counts_nothing_and_says_so(k):
    inputs = make(3, 7, 63)
    inputs["gradients"][1, 3, 62] = float("nan")
    got = count_lowest_integrated(**inputs, k=k)
    assert got.sums.isnan().tolist() == [False, True, False]
    others = {n: x[[0, 2]] for n, x in inputs.items()}
    assert torch.equal(got.counts, count_lowest_integrated(**others, k=k).counts)


def test_infinities_of_both_signs_are_ranked():
    gradients = torch.zeros(1, 1, 5)
    gradients[0, 0, 1], gradients[0, 0, 3] = float("inf"), -float("inf")
    got = count_lowest_integrated(gradients, torch.ones(1), None, None, 1)
    assert got.counts.tolist() == [0, 0, 0, 1, 0]
    assert got.sums.isnan().all()


@pytest.mark.parametrize("shape", [(0, 7, 63), (3, 0, 63)])
def test_nothing_to_sum(shape):
    inputs = make(*shape)
    assert_equal(
        count_lowest_integrated(**inputs, k=9), count_lowest_integrated_reference(**inputs, k=9)
    )


def test_inputs_are_left_alone():
    inputs = make(3, 7, 63)
    before = {n: x.clone() for n, x in inputs.items()}
    count_lowest_integrated(**inputs, k=9)
    assert all(torch.equal(inputs[n], before[n]) for n in inputs)


def test_registration():
    *inputs, k = example("count_lowest_integrated").values()
    counts = torch.zeros(129, dtype=torch.int64)
    torch.library.opcheck(
        torch.ops.loki_kernels.count_lowest_integrated.default, (*inputs, k, counts, True, None)
    )


def test_compiles_whole():
    torch._dynamo.reset()
    inputs = example("count_lowest_integrated")
    compiled = torch.compile(count_lowest_integrated, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(**inputs), count_lowest_integrated_reference(**inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradients": torch.zeros(3, 63)}, "gradients must be"),
        ({"weights": torch.zeros(6)}, "weights must be"),
        ({"z": torch.zeros(3, 62)}, "z must be"),
        ({"baseline": torch.zeros(62)}, "baseline must be"),
        ({"k": 64}, r"k must lie in \[0, 63\]"),
        ({"criterion": "lowest"}, "criterion must be"),
        ({"counts": torch.zeros(63)}, "counts must be int64"),
        ({"counts": torch.zeros(62, dtype=torch.int64)}, "counts must be int64"),
    ],
)
def test_bad_input_raises(change, message):
    with pytest.raises(ValueError, match=message):
        count_lowest_integrated(**make(3, 7, 63) | {"k": 9} | change)
