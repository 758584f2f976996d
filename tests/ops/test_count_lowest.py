from __future__ import annotations

import pytest
import torch
from torch import library as torch_library

from loki_kernels.ops import count_lowest
from loki_kernels.ops.count_lowest.reference import count_lowest_reference
from tests.ops.tolerance import example

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tied_scores(shape, dtype=torch.float32):
    """Few distinct values of both signs, so that most ranks are decided by index."""
    torch.manual_seed(sum(shape))
    return torch.randint(-4, 5, shape).to(dtype) / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("criterion", ["signed", "magnitude"])
@pytest.mark.parametrize("width", [1, 63, 129, 500])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_reference(dtype, criterion, width, tied):
    shape = (3, 2, width)
    scores = tied_scores(shape, dtype) if tied else torch.randn(shape).to(dtype)
    for k in {0, 1, width // 3, width - 1, width}:
        got = count_lowest(scores, k, criterion=criterion)
        want = count_lowest_reference(scores, k, criterion=criterion)
        assert got.dtype == torch.int64
        assert torch.equal(got, want)
        assert got.sum() == 3 * 2 * k


def test_worked_example():
    scores = torch.tensor([[[3.0, -5.0, 0.0, -5.0], [1.0, 1.0, 1.0, 1.0]]])
    assert count_lowest(scores, 1).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert count_lowest(scores, 3).tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]
    assert count_lowest(scores, 2, criterion="magnitude").tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]


def test_signed_zeros_tie():
    scores = torch.tensor([[[0.0, -0.0, 0.0]], [[-0.0, 0.0, -0.0]]])
    assert count_lowest(scores, 1).tolist() == [[2, 0, 0]]


@pytest.mark.parametrize("criterion", ["signed", "magnitude"])
def test_infinities_are_ranked(criterion):
    inf = float("inf")
    scores = torch.tensor([[[inf, -inf, 0.0, inf, -inf, 1.0]]])
    for k in range(7):
        got = count_lowest(scores, k, criterion=criterion)
        assert torch.equal(got, count_lowest_reference(scores, k, criterion=criterion))


def test_non_contiguous_scores():
    scores = tied_scores((63, 7, 3)).permute(2, 1, 0)[:, ::2]
    assert not scores.is_contiguous()
    assert torch.equal(count_lowest(scores, 20), count_lowest_reference(scores, 20))


def test_layers_of_a_wider_tensor():
    """Read where they are: the nodes are side by side, samples and layers are not."""
    scores = tied_scores((4, 6, 140))[::2, 1::2, 3:132]
    assert torch.equal(count_lowest(scores, 20), count_lowest_reference(scores, 20))


@pytest.mark.parametrize("criterion", ["signed", "magnitude"])
@pytest.mark.parametrize("width", [2049, 11008, 12288, 32768, 32769])
def test_wide_layers(width, criterion):
    """Wider than the ties a kernel ranks at once; about 48 KiB of keys; as wide as it takes; wider:
    torch runs."""
    scores = tied_scores((1, 2, width))
    for k in (1, width // 2, width):
        got = count_lowest(scores, k, criterion=criterion)
        assert torch.equal(got, count_lowest_reference(scores, k, criterion=criterion))


def test_a_kernel_asked_for_by_name_says_its_limit(backend):
    scores = torch.zeros(1, 1, 32769)
    if backend not in ("triton", "cuda"):
        assert count_lowest(scores, 1, backend=backend).sum() == 1  # any width
        return
    with pytest.raises(RuntimeError, match="up to 32768 scores a layer, not 32769"):
        count_lowest(scores, 1, backend=backend)


@pytest.mark.parametrize("k", [0, 2])
def test_no_samples_count_nothing(k):
    assert torch.equal(count_lowest(torch.zeros(0, 2, 5), k), torch.zeros(2, 5, dtype=torch.int64))


@pytest.mark.parametrize("k", [0, 4])
def test_adds_to_counts_in_place(k):
    scores = tied_scores((6, 2, 9))
    counts = torch.arange(18).view(2, 9)
    want = count_lowest_reference(scores, k, counts.clone())
    returned = count_lowest(scores, k, counts)
    assert returned is counts
    assert torch.equal(counts, want)


def test_two_halves_equal_the_whole():
    scores = tied_scores((8, 2, 9))
    counts = count_lowest(scores[:3], 4)
    count_lowest(scores[3:], 4, counts)
    assert torch.equal(counts, count_lowest(scores, 4))


def test_scores_are_left_alone():
    scores = tied_scores((3, 2, 9))
    before = scores.clone()
    count_lowest(scores, 4, criterion="magnitude")
    assert torch.equal(scores, before)


@pytest.mark.parametrize("k", [-1, 10])
def test_k_outside_the_width_raises(k):
    with pytest.raises(ValueError, match=r"k must lie in \[0, 9\]"):
        count_lowest(torch.zeros(2, 3, 9), k)


@pytest.mark.parametrize("shape", [(9,), (3, 9), (1, 2, 3, 9)])
def test_scores_of_another_shape_raise(shape):
    with pytest.raises(ValueError, match="scores must be"):
        count_lowest(torch.zeros(shape), 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_nan_raises_and_counts_stay(dtype):
    scores = torch.zeros(2, 3, 9, dtype=dtype)
    scores[1, 2, 8] = float("nan")
    counts = torch.zeros(3, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match="NaN"):
        count_lowest(scores, 1, counts)
    assert counts.sum() == 0


def test_unknown_criterion_raises():
    with pytest.raises(ValueError, match="criterion"):
        count_lowest(torch.zeros(2, 3, 9), 1, criterion="lowest")


@pytest.mark.parametrize(
    "counts",
    [
        torch.zeros(9, 3, dtype=torch.int64),
        torch.zeros(1, 9, dtype=torch.int64),
        torch.zeros(27, dtype=torch.int64),
        torch.zeros(3, 9, dtype=torch.int32),
        torch.zeros(3, 9),
    ],
)
def test_other_counts_raise(counts):
    with pytest.raises(ValueError, match="counts must be int64"):
        count_lowest(torch.zeros(2, 3, 9), 1, counts)


def test_counts_that_are_not_contiguous():
    scores = tied_scores((6, 2, 9))
    counts = torch.zeros(9, 4, dtype=torch.int64).t()[::2]
    count_lowest(scores, 4, counts)
    assert torch.equal(counts, count_lowest_reference(scores, 4))


@pytest.mark.parametrize("criterion", ["signed", "magnitude"])
def test_every_bit_pattern_is_ranked(criterion):
    """Neighbouring floats of every exponent, both signs and subnormal ones among them."""
    bits = torch.arange(-(1 << 31), 1 << 31, 8_675_309).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[~values.isnan()].repeat_interleave(2)
    values[1::2] = torch.nextafter(values[1::2], torch.tensor(0.0))
    scores = values[torch.randperm(len(values), device="cpu").to(values.device)]
    scores = scores.view(1, 1, -1)
    for k in (1, 100, 500, 900):
        got = count_lowest(scores, k, criterion=criterion)
        assert torch.equal(got, count_lowest_reference(scores, k, criterion=criterion))


def test_registration():
    inputs = example("count_lowest")
    counts = torch.zeros(3, 129, dtype=torch.int64)
    torch_library.opcheck(
        torch.ops.loki_kernels.count_lowest.default, (*inputs.values(), counts, True, None)
    )


def test_compiles_whole():
    """The op; the public function's NaN check needs the numbers."""
    torch._dynamo.reset()
    inputs = example("count_lowest")

    def count(scores, k):
        counts = torch.zeros(3, 129, dtype=torch.int64)
        torch.ops.loki_kernels.count_lowest(scores, k, counts, False, None)
        return counts

    compiled = torch.compile(count, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), count_lowest_reference(**inputs))


@pytest.mark.parametrize("criterion", ["signed", "magnitude"])
def test_threads_that_count_into_one_layer(criterion):
    """The C++ kernel's threads share a layer's counts where there are more of them than layers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        scores = tied_scores((256, 1, 500))
        got = count_lowest(scores, 100, criterion=criterion)
        assert torch.equal(got, count_lowest_reference(scores, 100, criterion=criterion))
    finally:
        torch.set_num_threads(threads)
