"""``loki-kernels plot``: pictures and a page that loads nothing else."""

from __future__ import annotations

import base64
import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import loki_kernels as loki
from loki_kernels import Attribution, AttributionCounts, RowSelection, plots, ranking, report
from loki_kernels.cli import main

PNG = b"\x89PNG\r\n"


@pytest.fixture
def files(tmp_path):
    """Scores, counts and two selections of them."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 4, 30, generator=generator)
    about = {
        "targets": torch.zeros(6, dtype=torch.int64),
        "value": torch.rand(6, generator=generator),
        "completeness": 1e-7 * torch.randn(6, 4, generator=generator),
        "change": torch.randn(6, 4, generator=generator),
        "run": {"model": "<b>tiny & small</b>", "definition": "published", "steps": 7},
    }
    attribution = Attribution(scores=scores, **about)
    attribution.save(tmp_path / "scores.safetensors")
    counts = torch.randint(0, 7, (4, 30), generator=generator)
    AttributionCounts(counts, 10, "magnitude", **about).save(tmp_path / "counts.safetensors")
    loki.select(attribution, 20).save(tmp_path / "mine.json")
    loki.select(attribution, 20, "global_lowest").save(tmp_path / "global.json")
    names = ("scores.safetensors", "counts.safetensors", "mine.json", "global.json")
    return [str(tmp_path / name) for name in names]


class Page(HTMLParser):
    """What a page refers to, and whether its elements are closed."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.links, self.open, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_of_everything(files, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert main(["plot", *files, str(out)]) == 0
    assert "mine.json" in capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.tags.count("h1") == 3
    assert page.tags.count("img") == 3 + 2 + 2
    assert not {"script", "link", "b", "iframe"} & set(page.tags)
    for link in page.links:
        head, data = link.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(PNG)
    assert not re.search(r"https?:|url\(|@import", text)
    assert "default-src 'none'" in text
    assert "&lt;b&gt;tiny &amp; small&lt;/b&gt;" in text
    assert "6 prompts, 4 layers, 30 nodes a layer; " in text
    assert "Two random ones would share 0.20 at most." in text


@pytest.mark.parametrize("kind", range(4))
def test_a_picture_of_each_kind(files, tmp_path, kind):
    out = tmp_path / "report.png"
    assert main(["plot", files[kind], str(out), "--quota", "20"]) == 0
    assert out.read_bytes().startswith(PNG)


def test_scores_are_summed_up_in_one_pass(monkeypatch):
    scores = torch.randn(7, 3, 10, generator=torch.Generator().manual_seed(0))
    whole, sizes = report._digest(scores, 20)
    torch.testing.assert_close(sizes, scores.abs().sum(-1))
    for kind, (title, shares) in enumerate(whole.items()):
        criterion = "magnitude" if "magnitude" in title else "signed"
        counts = ranking.count_extreme(scores, 2, kind == 0, criterion)
        assert torch.equal(shares, counts / 7)
    monkeypatch.setattr(ranking, "_CHUNK_ELEMENTS", 60)
    in_parts, sizes_in_parts = report._digest(scores, 20)
    assert torch.equal(sizes, sizes_in_parts)
    for title, shares in whole.items():
        assert torch.equal(shares, in_parts[title])


def test_layers_without_an_ffn_stay_blank(tmp_path, monkeypatch):
    """Their scores are all zero, and ties would make nodes of them extreme."""
    drawn = []
    monkeypatch.setattr(plots, "draw_heatmap", lambda _figure, shares: drawn.append(shares))
    scores = torch.randn(6, 3, 30)
    scores[:, 1] = 0
    about = {"targets": torch.zeros(6, dtype=torch.int64), "value": torch.rand(6)}
    run = {"without_ffn": [1]}
    result = Attribution(scores=scores, run=run, **about)
    result.heatmap(tmp_path / "a.png")
    counted = AttributionCounts(torch.ones(3, 30).long(), 10, "magnitude", run=run, **about)
    for section in (result, counted):
        pictures = report._result_section("a", section, 10).pictures
        drawn.append(pictures[0].draw.keywords["shares"])
    for shares in drawn:
        for share in shares.values():
            assert share.isnan().any(1).tolist() == [False, True, False]
    assert len(drawn) == 3


def test_of_plain_row_files_nothing_is_said_of_chance(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.json").write_text("[[1, 2], [3]]")
    files = [tmp_path / name / "rows.json" for name in ("a", "b")]
    report.plot_files(files, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "random ones" not in text
    for file in files:
        assert f"{file}: 3 rows" in text


def test_what_is_wrong_raises_before_anything_is_written(files, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    with pytest.raises(ValueError, match=r"must end in \.png or \.html"):
        report.plot_files(files, tmp_path / "report.pdf")
    with pytest.raises(ValueError, match="quota"):
        report.plot_files(files, out, 0)
    with pytest.raises(FileNotFoundError):
        report.plot_files([tmp_path / "none.safetensors"], out)
    with pytest.raises(ValueError, match="no file"):
        report.plot_files([], out)
    RowSelection([[1]]).save(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"layers: mine\.json 4, other\.json 1"):
        report.plot_files([files[2], tmp_path / "other.json"], out)
    empty = Attribution(torch.zeros(0, 2, 3), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    empty.save(tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="holds no prompt"):
        report.plot_files([tmp_path / "empty.safetensors"], out)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"loki-kernels\[plot\]"):
        report.plot_files(files, out)
    assert not out.exists()


def test_the_heatmap_shows_the_highest_and_the_lowest(tmp_path, monkeypatch):
    """By sorting; what is drawn of it is a picture."""
    drawn = {}
    monkeypatch.setattr(plots, "draw_heatmap", lambda _figure, shares: drawn.update(shares))
    scores = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    plots.plot_heatmap(scores, tmp_path / "map.png", 25.0, without_ffn=[1])
    order = scores.argsort(-1)
    for shares, chosen in zip(drawn.values(), (order[..., -2:], order[..., :2]), strict=True):
        want = torch.zeros(5, 3, 8).scatter_(-1, chosen, 1.0).mean(0)
        want[1] = float("nan")
        torch.testing.assert_close(shares, want, equal_nan=True)
    assert ["highest" in title for title in drawn] == [True, False]


@pytest.mark.parametrize("width", [8, 4096])
def test_no_node_is_lost_between_the_pixels(width):
    """One extreme node of 4,096: of nearest neighbours a third of the columns would be drawn."""
    shares = torch.zeros(3, width)
    shares[2, width - 3] = 1.0
    shares[1] = float("nan")
    figure = plots.import_matplotlib()(figsize=(10, 6), dpi=150, layout="constrained")
    plots.draw_heatmap(figure, {"a": shares})
    figure.savefig(io.BytesIO(), format="png")
    axis = figure.axes[0]
    (image,) = axis.images
    drawn, (left, right, bottom, _) = image.get_array().filled(float("nan")), image.get_extent()
    assert drawn.shape[1] <= axis.get_window_extent().width
    assert np.isnan(drawn).all(1).tolist() == [False, True, False]
    assert drawn[0].max() == 0
    (at,) = drawn[2].nonzero()[0]
    each = (right - left) / drawn.shape[1]
    assert at == (width - 3) // each
    assert (bottom, axis.get_xlim()) == (2.5, (-0.5, width - 0.5))
    assert axis.get_xlabel() == ("node" if each == 1 else "node (the maximum of 4 neighbours)")
