from __future__ import annotations

import json
import os
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loki_kernels import Attribution, RowSelection, ranking, select
from loki_kernels.files import check_writable, write_safetensors
from loki_kernels.ranking import rows_per_layer
from loki_kernels.selection import random_rows

RANKED = ["layer_balanced", "layer_balanced_highest", "global_lowest", "global_highest"]
few = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
row_lists = st.lists(
    st.lists(st.integers(0, 2**31 - 1), unique=True, max_size=6), min_size=1, max_size=4
).filter(any)


def slow_select(scores, quota, strategy, criterion):
    """The definition, one node at a time."""
    samples, layers, width = scores.shape
    k = max(1, Fraction(str(quota)) * width // 100)
    nodes = [(layer, j) for layer in range(layers) for j in range(width)]
    if strategy.startswith("global"):
        groups, take = [nodes], layers * k
    else:
        groups, take = [[n for n in nodes if n[0] == layer] for layer in range(layers)], k
    sign = -1 if strategy.endswith("highest") else 1
    rows = [[] for _ in range(layers)]
    for group in groups:
        counts = dict.fromkeys(group, 0)
        for sample in range(samples):

            def rank(node, sample=sample):
                value = float(scores[sample, node[0], node[1]])
                return (sign * (abs(value) if criterion == "magnitude" else value), node)

            for node in sorted(group, key=rank)[:take]:
                counts[node] += 1
        for layer, j in sorted(group, key=lambda node: (-counts[node], node))[:take]:
            rows[layer].append(j)
    return [sorted(layer) for layer in rows]


def as_lists(selected):
    return [layer.tolist() for layer in selected]


def make_scores(seed=0, shape=(5, 3, 17), tied=False):
    generator = torch.Generator().manual_seed(seed)
    if tied:
        return torch.randint(-3, 4, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("criterion", ["signed", "magnitude"])
@pytest.mark.parametrize("strategy", RANKED)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quota", [0.1, 13, 29, 50.0, 99.9, 100])
def test_equals_the_definition(strategy, criterion, tied, quota):
    scores = make_scores(1, tied=tied)
    selected = select(scores, quota, strategy, criterion)
    assert as_lists(selected) == slow_select(scores, quota, strategy, criterion)
    assert all(layer.dtype == torch.int64 for layer in selected)


@few
@given(
    st.integers(0, 10**6),
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 8)),
    st.sampled_from(RANKED),
    st.sampled_from(["signed", "magnitude"]),
    st.integers(1, 100),
)
def test_equals_the_definition_on_any_shape(seed, shape, strategy, criterion, quota):
    scores = make_scores(seed, shape, tied=True)
    want = slow_select(scores, quota, strategy, criterion)
    assert as_lists(select(scores, quota, strategy, criterion)) == want


def test_strategies_differ():
    """Otherwise the comparisons above could pass with one strategy for all."""
    scores = make_scores()
    found = {
        str(as_lists(select(scores, 29, strategy, criterion)))
        for strategy in RANKED
        for criterion in ("signed", "magnitude")
    }
    assert len(found) == 8


@pytest.mark.parametrize("strategy", RANKED)
@pytest.mark.parametrize("criterion", ["signed", "magnitude"])
def test_ties_go_to_the_lower_index(strategy, criterion):
    selected = select(torch.zeros(3, 2, 10), 30, strategy, criterion)
    want = [[0, 1, 2, 3, 4, 5], []] if "global" in strategy else [[0, 1, 2], [0, 1, 2]]
    assert as_lists(selected) == want


def test_counts_rank_before_scores():
    """Node 1 is lowest twice, node 0 once by far: the vote decides, not the sum."""
    scores = torch.tensor([[[-100.0, 0, 1]], [[0, -1, 1]], [[0, -1, 1]]])
    assert as_lists(select(scores, 34, criterion="signed")) == [[1]]


def test_magnitude_ignores_the_sign_and_is_the_default():
    scores = torch.tensor([[[-9.0, 0.5, 3.0, -0.1]]])
    assert as_lists(select(scores, 25)) == [[3]]
    assert as_lists(select(scores, 25, criterion="signed")) == [[0]]
    assert as_lists(select(scores, 25, "layer_balanced_highest")) == [[0]]
    assert as_lists(select(scores, 25, "layer_balanced_highest", "signed")) == [[2]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", RANKED)
def test_other_dtypes_and_strides(strategy, dtype):
    scores = make_scores(2, (3, 17, 5), tied=True).to(dtype).permute(2, 0, 1)
    assert not scores.is_contiguous()
    want = slow_select(scores, 29, strategy, "magnitude")
    assert as_lists(select(scores, 29, strategy)) == want


@pytest.mark.parametrize("criterion", ["signed", "magnitude"])
@pytest.mark.parametrize("strategy", RANKED)
@pytest.mark.parametrize("elements", [1, 51, 51 * 2, 51 * 3 + 1])
def test_counting_in_chunks_changes_nothing(strategy, criterion, elements, monkeypatch):
    scores = make_scores(tied=True)
    at_once = select(scores, 29, strategy, criterion)
    sizes = []
    count_lowest = ranking.count_lowest

    def spy(part, *args, **options):
        sizes.append(len(part))
        return count_lowest(part, *args, **options)

    monkeypatch.setattr(ranking, "count_lowest", spy)
    monkeypatch.setattr(ranking, "_CHUNK_ELEMENTS", elements)
    assert select(scores, 29, strategy, criterion) == at_once
    assert max(sizes) == max(1, elements // 51)
    assert sum(sizes) == 5


def test_scores_are_left_alone():
    scores = make_scores()
    before = scores.clone()
    for strategy in RANKED:
        select(scores, 29, strategy, "magnitude")
    assert torch.equal(scores, before)


# quota


@pytest.mark.parametrize(
    ("quota", "width", "k"),
    [
        (29, 100, 29),
        (29.0, 100, 29),
        (57, 100, 57),
        (0.29, 10000, 29),
        (1.1, 1000, 11),
        (10.0, 576, 57),
        (100, 7, 7),
        (99.99, 7, 6),
        (1e-9, 7, 1),
        (Fraction(100, 3), 3, 1),
        (Fraction(200, 3), 3, 2),
    ],
)
def test_quota(quota, width, k):
    assert rows_per_layer(quota, width) == k


@given(st.integers(1, 10_000), st.integers(1, 100_000))
@settings(max_examples=50)
def test_quota_of_hundredths_is_exact(hundredths, width):
    want = max(1, int(Fraction(hundredths, 10_000) * width))
    assert rows_per_layer(hundredths / 100, width) == want
    assert rows_per_layer(Fraction(hundredths, 100), width) == want


@given(st.fractions(0, 100).filter(bool), st.integers(1, 100_000))
@settings(max_examples=50)
def test_quota_fraction_is_exact(quota, width):
    k = rows_per_layer(quota, width)
    assert 1 <= k <= width
    assert k <= max(1, quota * width / 100) < k + 1


@pytest.mark.parametrize(
    "quota", [0, 0.0, -1, -1e-9, 100.001, 1000, float("nan"), float("inf"), True, "ten"]
)
def test_quota_out_of_range_raises(quota):
    with pytest.raises(ValueError, match="quota"):
        rows_per_layer(quota, 100)
    with pytest.raises(ValueError, match="quota"):
        select(torch.zeros(1, 1, 100), quota)


# random


def test_random_is_the_same_everywhere():
    want = [[1, 8, 12, 13], [9, 12, 15, 16], [6, 11, 15, 16]]
    assert random_rows(3, 20, 4, 0) == want
    assert as_lists(select(torch.zeros(1, 3, 20), 20, "random")) == want


def test_random_depends_on_the_seed_alone():
    a, b = make_scores(0), make_scores(1)
    state = random.getstate()
    assert select(a, 29, "random", seed=3) == select(b, 29, "random", seed=3)
    assert select(a, 29, "random", seed=3) != select(a, 29, "random", seed=4)
    assert random.getstate() == state


@given(st.integers(1, 4), st.integers(1, 30), st.integers(), st.data())
@settings(max_examples=50)
def test_random_rows_are_distinct_and_in_range(layers, width, seed, data):
    k = data.draw(st.integers(1, width))
    rows = random_rows(layers, width, k, seed)
    assert len(rows) == layers
    for layer in rows:
        assert layer == sorted(set(layer))
        assert len(layer) == k
        assert set(layer) <= set(range(width))


# select's info and errors


def test_info_says_how():
    scores = make_scores()
    run = {"site": "ffn_neurons", "definition": "paper"}
    attribution = Attribution(
        scores=scores, targets=torch.zeros(5, dtype=torch.int64), value=torch.zeros(5), run=run
    )
    selected = select(attribution, 29, "global_lowest", "magnitude")
    assert selected == select(scores, 29, "global_lowest", "magnitude")
    assert selected.info == {
        "quota": 29.0,
        "strategy": "global_lowest",
        "criterion": "magnitude",
        "width": 17,
        "site": "ffn_neurons",
        "attribution": run,
    }
    assert select(scores).info["site"] == "down_proj"
    assert select(scores, strategy="random", seed=7).info["seed"] == 7


@pytest.mark.parametrize("shape", [(5,), (3, 5), (1, 2, 3, 5), (0, 2, 5), (2, 0, 5), (2, 2, 0)])
@pytest.mark.parametrize("strategy", [*RANKED, "random"])
def test_scores_of_another_shape_raise(shape, strategy):
    with pytest.raises(ValueError, match="scores must be"):
        select(torch.zeros(shape), strategy=strategy)


@pytest.mark.parametrize("strategy", RANKED)
@pytest.mark.parametrize("criterion", ["signed", "magnitude"])
def test_nan_raises(strategy, criterion):
    scores = make_scores()
    scores[4, 2, 16] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        select(scores, 29, strategy, criterion)


def test_unknown_strategy_and_criterion_raise():
    with pytest.raises(ValueError, match=r"strategy='lowest'.*layer_balanced"):
        select(make_scores(), strategy="lowest")
    with pytest.raises(ValueError, match=r"criterion='absolute'.*magnitude"):
        select(make_scores(), criterion="absolute")


# RowSelection


def test_is_a_sequence_of_sorted_tensors():
    selected = RowSelection([[5, 1], [], torch.tensor([3, 2], dtype=torch.int32)])
    assert as_lists(selected) == [[1, 5], [], [2, 3]]
    assert all(layer.dtype == torch.int64 for layer in selected)
    assert len(selected) == 3
    assert selected[-1].tolist() == [2, 3]
    assert as_lists(selected[1:]) == [[], [2, 3]]
    with pytest.raises(IndexError):
        selected[3]


def test_counts_and_repr():
    selected = RowSelection([[5, 1], [], [2]])
    assert selected.counts == [2, 0, 1]
    assert repr(selected) == "RowSelection(3 layers, 0 to 2 rows each)"
    assert repr(RowSelection([[5, 1], [0, 2]])) == "RowSelection(2 layers, 2 rows each)"


def test_equality():
    selected = RowSelection([[5, 1], [2]], {"quota": 1})
    assert selected == RowSelection([[1, 5], [2]])
    assert selected != RowSelection([[1, 5], [3]])
    assert selected != RowSelection([[1, 5], [2, 3]])
    assert selected != RowSelection([[1, 5]])
    assert selected != [[1, 5], [2]]
    with pytest.raises(TypeError, match="unhashable"):
        hash(selected)


def test_info_is_a_copy():
    info = {"quota": 1}
    selected = RowSelection([[1]], info)
    info["quota"] = 2
    assert selected.info == {"quota": 1}
    assert RowSelection([[1]]).info == {}


@few
@given(row_lists, row_lists)
def test_overlap_equals_sets(a, b):
    b = (b * 4)[: len(a)]
    if not any(b):
        return
    shared = sum(len(set(x) & set(y)) for x, y in zip(a, b, strict=True))
    want = shared / max(sum(map(len, a)), sum(map(len, b)))
    assert RowSelection(a).overlap(RowSelection(b)) == want
    assert RowSelection(b).overlap(RowSelection(a)) == want
    assert RowSelection(a).overlap(RowSelection(a)) == 1


def test_overlap_examples():
    a = RowSelection([[0, 1], [2, 3]])
    assert a.overlap(RowSelection([[1, 7], [3, 0]])) == 0.5
    assert a.overlap(RowSelection([[2, 3], [0, 1]])) == 0
    assert a.overlap(RowSelection([[1], []])) == 0.25
    with pytest.raises(ValueError, match="2 and 1 layers"):
        a.overlap(RowSelection([[0]]))


BAD_ROWS = [
    [],
    [[]],
    [[], []],
    [[1, 1]],
    [[3, 1, 2, 1]],
    [[-1]],
    [[0], [-(2**40)]],
    [[2**31]],
    [[1.0]],
    [[1.5]],
    [[True]],
    [[0, False]],
    [[None]],
    [["1"]],
    [[[1]]],
    [[{}]],
    [[float("nan")]],
    [1, 2],
    {0: [1]},
]


@pytest.mark.parametrize("rows", BAD_ROWS, ids=str)
def test_unsound_rows_raise(rows):
    with pytest.raises(ValueError, match="row"):
        RowSelection(rows)


@pytest.mark.parametrize(
    "layer",
    [
        torch.tensor([1.0]),
        torch.tensor([True]),
        torch.tensor([[1]]),
        torch.tensor(1),
        torch.tensor([-1]),
        torch.tensor([2, 2]),
        np.array([1.0]),
        np.array([-1]),
    ],
    ids=str,
)
def test_unsound_tensors_raise(layer):
    with pytest.raises(ValueError, match="layer 1"):
        RowSelection([[0], layer])


# files


@few
@given(
    row_lists,
    st.dictionaries(
        st.text(max_size=5).filter(lambda key: key not in ("rows", "format")),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner),
            max_leaves=4,
        ),
        max_size=3,
    ),
)
def test_save_and_load(tmp_path, rows, info):
    path = tmp_path / "rows.json"
    saved = RowSelection(rows, info)
    saved.save(path)
    loaded = RowSelection.load(path)
    assert loaded == saved
    assert loaded.info == info
    assert json.loads(path.read_text())["rows"] == [sorted(layer) for layer in rows]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize("strategy", [*RANKED, "random"])
def test_selected_rows_survive_the_file(tmp_path, strategy):
    selected = select(make_scores(), 29, strategy)
    selected.save(str(tmp_path / "rows.json"))
    loaded = RowSelection.load(str(tmp_path / "rows.json"))
    assert loaded == selected
    assert loaded.info == selected.info


def test_plain_list_of_lists(tmp_path):
    path = tmp_path / "positions.json"
    path.write_text("[[9, 2], [], [4]]")
    loaded = RowSelection.load(path)
    assert as_lists(loaded) == [[2, 9], [], [4]]
    assert loaded.info == {}


def test_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        RowSelection.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "content",
    [
        *(json.dumps(rows) for rows in BAD_ROWS),
        *(json.dumps({"rows": rows}) for rows in BAD_ROWS),
        "",
        " \n",
        "{}",
        "null",
        "3",
        '"[[1]]"',
        "[1, 2]",
        "[[1], 2]",
        "[[1], null]",
        '[[1], {"rows": [1]}]',
        '{"rows": null}',
        '{"rows": 3}',
        '{"rows": {"0": [1]}}',
        '{"row": [[1]]}',
        "[[1e400]]",
        "[[1]] [[2]]",
        "[[1],]",
        "[[01]]",
        "[" * 100_000,
        f"[[{'1' * 5000}]]",
    ],
    ids=lambda content: content[:20],
)
def test_damaged_content_raises_value_error(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"."):
        RowSelection.load(path)


@pytest.mark.parametrize("content", ["{}", "[[1, 1]]", "[[1", "[[-1]]"])
def test_error_names_the_file(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"rows\.json"):
        RowSelection.load(path)


def test_truncated_at_every_byte_raises(tmp_path):
    path = tmp_path / "rows.json"
    RowSelection([[1, 20], [3]], {"model": "é"}).save(path)
    complete = path.read_bytes().rstrip()
    for length in range(len(complete)):
        path.write_bytes(complete[:length])
        with pytest.raises(ValueError, match=r"."):
            RowSelection.load(path)
    path.write_bytes(complete)
    assert as_lists(RowSelection.load(path)) == [[1, 20], [3]]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rows", "x"]), inner)
    ),
    max_leaves=8,
)


@few
@given(
    st.text()
    | st.binary()
    | st.text('[]{}",:0123456789.-e \n', max_size=30)
    | json_values.map(json.dumps)
    | json_values.map(lambda value: json.dumps([[value], [0]]))
)
def test_any_content_loads_soundly_or_raises_value_error(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        loaded = RowSelection.load(path)
    except ValueError:
        return
    parsed = json.loads(content)
    rows = parsed["rows"] if isinstance(parsed, dict) else parsed
    assert as_lists(loaded) == [sorted(layer) for layer in rows]
    assert all(type(j) is int and j >= 0 for layer in rows for j in layer)
    assert all(len(layer) == len(set(layer)) for layer in rows)


def test_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "rows.json"
    RowSelection([[1]]).save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        RowSelection([[2]], {"model": object()}).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    """The disk fills up while the temporary file is written."""

    def write_text(self, text, **_):
        with open(self, "w") as file:
            file.write(text[:5])
        raise OSError("no space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", write_text)
    with pytest.raises(OSError, match="no space"):
        RowSelection([[1]]).save(tmp_path / "rows.json")
    assert list(tmp_path.iterdir()) == []


def test_save_to_an_impossible_place_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        RowSelection([[1]]).save(tmp_path / "none" / "rows.json")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        RowSelection([[1]]).save(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes among its files")
def test_what_is_replaced_is_an_ordinary_file(tmp_path):
    """Not the link to one, nor a device, as /dev/null is to whoever may replace it."""
    real, link, pipe = (tmp_path / name for name in ("real.json", "link.json", "pipe.json"))
    real.touch()
    real.chmod(0o640)
    link.symlink_to(real)
    RowSelection([[1]]).save(link)
    assert link.is_symlink()
    assert RowSelection.load(real) == RowSelection([[1]])
    assert real.stat().st_mode & 0o777 == 0o640
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="is a device or a pipe"):
        RowSelection([[1]]).save(pipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in (real, link, pipe)
    )
    astray = tmp_path / "astray.json"
    astray.symlink_to(tmp_path / "gone" / "rows.json")
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        check_writable(astray, ".json")  # before any work


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_a_new_file_has_the_mode_that_others_of_this_user_have(umask, tmp_path):
    """Also where safetensors, since 0.8, puts a file of 0600 in its place."""
    before = os.umask(umask)
    try:
        RowSelection([[1]]).save(tmp_path / "rows.json")
        write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {})
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path
