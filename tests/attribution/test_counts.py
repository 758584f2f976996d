"""``attribute(keep="counts")``: the selection that the scores would have given, without them."""

from __future__ import annotations

import pytest
import torch

from loki_kernels import Attribution, AttributionCounts, attribute, select
from loki_kernels.attribution import integration
from loki_kernels.attribution.result import load_result
from loki_kernels.files import write_safetensors
from loki_kernels.ops import count_lowest, integrate_path


@pytest.mark.parametrize("criterion", ["signed", "magnitude"])
@pytest.mark.parametrize("site", ["down_proj", "ffn_neurons"])
@pytest.mark.parametrize("definition", ["published", "paper", "captum"])
def test_counts_give_the_selection_that_scores_give(definition, site, criterion, model, prompts):
    options = {"definition": definition, "site": site, "batch_size": 2}
    kept = attribute(model, prompts, **options)
    counted = attribute(
        model, prompts, keep="counts", quota=15.0, criterion=criterion, progress=True, **options
    )
    k = int(0.15 * kept.scores.shape[-1])
    assert torch.equal(counted.counts, count_lowest(kept.scores, k, criterion=criterion))
    assert select(counted) == select(kept, 15.0, criterion=criterion)
    assert torch.equal(counted.targets, kept.targets)
    assert torch.equal(counted.value, kept.value)
    assert (counted.completeness is None) == (kept.completeness is None)
    if kept.completeness is not None:
        torch.testing.assert_close(counted.completeness, kept.completeness)
        torch.testing.assert_close(counted.change, kept.change)


def test_counts_are_of_ten_percent_and_by_magnitude_by_default(model, prompts):
    counted = attribute(model, prompts, keep="counts")
    assert (counted.quota, counted.criterion) == (10.0, "magnitude")
    assert counted.counts.sum(-1).tolist() == [4 * len(prompts)] * 3
    assert repr(counted) == (
        "AttributionCounts(4 samples, 3 layers, 48 nodes, quota=10.0, criterion='magnitude')"
    )


def test_counts_file_round_trip(model, prompts, tmp_path):
    counted = attribute(model, prompts, keep="counts", quota=20, criterion="signed")
    path = tmp_path / "counts.safetensors"
    counted.save(path)
    loaded = AttributionCounts.load(path)
    assert loaded.run == counted.run
    assert (loaded.quota, loaded.criterion) == (20.0, "signed")
    for name in ("counts", "targets", "value", "completeness", "change"):
        assert torch.equal(getattr(loaded, name), getattr(counted, name))
    assert select(loaded) == select(counted)
    with pytest.raises(ValueError, match="not a loki-kernels-attribution file"):
        Attribution.load(path)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        counted.save(tmp_path / "counts.json")


def test_a_damaged_file_of_counts_is_said_to_be_one(tmp_path):
    """And not that it holds no scores."""
    path = tmp_path / "counts.safetensors"
    write_safetensors(path, {"counts": torch.ones(1, 4)}, {"format": "loki-kernels-counts"})
    with pytest.raises(ValueError, match="is damaged"):
        load_result(path)
    write_safetensors(path, {"x": torch.ones(1)}, {"format": "other"})
    with pytest.raises(ValueError, match="not a loki-kernels-attribution or loki-kernels-counts"):
        load_result(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quota": 5}, "quota=10.0, not 5"),
        ({"criterion": "signed"}, "criterion='magnitude', not 'signed'"),
        ({"strategy": "global_lowest"}, "strategy='layer_balanced', not 'global_lowest'"),
    ],
)
def test_counts_answer_one_question(options, message, model, prompts):
    with pytest.raises(ValueError, match=message):
        select(attribute(model, prompts, keep="counts"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "rows"}, "keep='rows' is unknown"),
        ({"quota": 5}, "belong to keep='counts'"),
        ({"criterion": "signed"}, "belong to keep='counts'"),
        ({"keep": "counts", "criterion": "lowest"}, "criterion='lowest' is unknown"),
        ({"keep": "counts", "quota": 0}, "quota must be a percentage"),
        ({"keep": "counts", "out": "counts.h5"}, "must end in .safetensors"),
    ],
)
def test_bad_options_for_counts_raise(options, message, model, prompts):
    with pytest.raises(ValueError, match=message):
        attribute(model, prompts, **options)


def test_counting_nan_scores_names_the_prompt(model, prompts, monkeypatch):
    def undefined(gradients, *args, **options):
        return integrate_path(gradients * float("nan"), *args, **options)

    monkeypatch.setattr(integration, "integrate_path", undefined)
    with pytest.raises(ValueError, match="the scores of prompt 2 in layer 0 hold NaN"):
        attribute(model, prompts, keep="counts", batch_size=1)
