"""Scores and selections as one picture, or as one page that loads nothing else."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attribution import Attribution, AttributionCounts
from .attribution.result import definition_of, load_result
from .files import atomic_path, check_writable
from .ops import count_lowest
from .options import DEFAULT_QUOTA
from .plots import draw_heatmap, draw_matrix, draw_profile, draw_rows, import_matplotlib, shares_of
from .ranking import in_parts, rows_per_layer
from .selection import RowSelection

_WIDTH = 10.0  # inches
_DPI = 150
_HIGHEST = "among the {:g} % highest"
_LOWEST = "among the {:g} % lowest"
_SMALLEST = "among the {:g} % smallest in magnitude"
_BAND = "the line is the median over the prompts, the band goes from their 10th to 90th percentile"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; background: #fff; }
h1 { margin-top: 4rem; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; }
figure { margin: 2rem 0; }
figcaption, .facts { color: #57606a; }
img { max-width: 100%; height: auto; }
details { margin: 1rem 0; overflow-x: auto; }
summary { cursor: pointer; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #d0d7de; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class _Picture:
    title: str
    caption: str
    height: float  # inches
    draw: Callable[[Any], None]


@dataclass(frozen=True)
class _Section:
    title: str
    facts: str
    pictures: list[_Picture]
    columns: dict[str, Tensor]  # of the table, [N, L]
    about: dict[str, Any]


def plot_files(
    files: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    quota: float = DEFAULT_QUOTA,
) -> None:
    """Draw what attributions and selections look like.

    Of scores: how often each node is among the highest, the lowest and the smallest, what share of
    the scores each layer has, and completeness. Of counts: what there is of it. Of row files: the
    rows of each layer, and how much each two of them overlap. Scores are gone through once, a part
    at a time.

    Args:
        files: files of `Attribution` or `AttributionCounts`, and row files (``.json``).
        out: ``.png``, or ``.html`` for a page that needs no server and no other file.
        quota: percentage of a layer's nodes that counts as extreme, in (0, 100].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another suffix, a quota out of range, a file that is something else, or row
            files of another number of layers.
        ImportError: without the ``plot`` extra.
    """
    check_writable(out, ".png", ".html")
    suffix = Path(out).suffix
    import_matplotlib()
    rows_per_layer(quota, 1)
    if not files:
        raise ValueError("there is no file to draw.")
    paths = [Path(file) for file in files]
    names = [p.name if [q.name for q in paths].count(p.name) == 1 else str(p) for p in paths]
    selections: dict[str, RowSelection] = {}
    results: dict[str, Attribution | AttributionCounts] = {}
    for name, path in zip(names, paths, strict=True):
        if path.suffix == ".json":
            selections[name] = RowSelection.load(path)
        else:
            results[name] = load_result(path)
    if len({len(selection) for selection in selections.values()}) > 1:
        layers = ", ".join(f"{name} {len(rows)}" for name, rows in selections.items())
        raise ValueError(f"selections of different models cannot be compared; layers: {layers}.")
    sections = [_result_section(name, result, quota) for name, result in results.items()]
    if selections:
        sections.append(_selections_section(selections))
    with atomic_path(out) as temporary:
        if suffix == ".png":
            temporary.write_bytes(
                _png([(f"{s.title}: {p.title.lower()}", p) for s in sections for p in s.pictures])
            )
        else:
            temporary.write_text(_page(sections), encoding="utf-8")


def _result_section(name: str, result: Attribution | AttributionCounts, quota: float) -> _Section:
    if not len(result.targets):
        raise ValueError(f"{name} holds no prompt.")
    pictures: list[_Picture] = []
    columns: dict[str, Tensor] = {}  # of the table, [N, L]
    without = result.run.get("without_ffn", ())
    if isinstance(result, Attribution):
        width = result.scores.shape[2]
        shares, sizes = _digest(result.scores, quota, without)
        columns["share of the |scores|"] = sizes / sizes.sum(1, keepdim=True).clamp_min(1e-30)
        profile = partial(
            draw_profile, lines=dict(columns), label="share of the |scores|", log=False
        )
        caption = "What share of a prompt's |scores| lies in each layer"
        pictures.append(_Picture("Layers", f"{caption}: {_BAND}.", 4, profile))
    else:
        width = result.counts.shape[1]
        kind = _SMALLEST if result.criterion == "magnitude" else _LOWEST
        shares = {kind.format(result.quota): shares_of(result.counts, len(result.targets), without)}
    caption = "For what share of the prompts a node is among the extreme ones of its layer."
    heatmap = _Picture(
        "Nodes", caption, 0.5 + 3 * len(shares), partial(draw_heatmap, shares=shares)
    )
    pictures.insert(0, heatmap)
    if result.completeness is not None and result.change is not None:
        sums = {
            "what scores should add up to, |F(z) − F(baseline)|": result.change.abs(),
            "what they miss of it, |completeness|": result.completeness.abs(),
        }
        columns |= sums
        lines = partial(draw_profile, lines=sums, label="|F|", log=True)
        caption = (
            "The further the second line lies below the first, the more exact is the path integral"
        )
        pictures.append(_Picture("Completeness", f"{caption}: {_BAND}.", 4, lines))
    run = result.run
    said = {**run, "definition": definition_of(run)}
    facts = [
        f"{len(result.targets):,} prompts, {next(iter(shares.values())).shape[0]} layers, "
        f"{width:,} nodes a layer",
        *(f"{key} {said[key]}" for key in ("model", "definition", "steps") if key in run),
        f"median F(z) {float(result.value.nanmedian()):.3g}",
    ]
    return _Section(name, "; ".join(facts) + ".", pictures, columns, run)


def _digest(
    scores: Tensor, quota: float, without_ffn: Sequence[int] = ()
) -> tuple[dict[str, Tensor], Tensor]:
    """Shares ``[L, D]`` of the prompts by title, and each prompt's sums of |scores| ``[N, L]``."""
    samples, layers, width = scores.shape
    k = rows_per_layer(quota, width)
    highest, lowest, smallest = torch.zeros(3, layers, width, dtype=torch.int64)
    sizes = []
    for part in in_parts(scores):
        count_lowest(-part, k, highest)
        count_lowest(part, k, lowest)
        count_lowest(part, k, smallest, criterion="magnitude")
        sizes.append(part.abs().sum(-1, dtype=torch.float64).float())
    counts = {_HIGHEST: highest, _LOWEST: lowest, _SMALLEST: smallest}
    shares = {
        title.format(quota): shares_of(count, samples, without_ffn)
        for title, count in counts.items()
    }
    return shares, torch.cat(sizes)


def _selections_section(selections: dict[str, RowSelection]) -> _Section:
    names, chosen = list(selections), list(selections.values())
    facts = "; ".join(f"{name}: {sum(rows.counts):,} rows" for name, rows in selections.items())
    counts = {name: rows.counts for name, rows in selections.items()}
    pictures = [_Picture("Rows", "Rows of each layer.", 4, partial(draw_rows, counts=counts))]
    if len(chosen) > 1:
        matrix = torch.tensor([[a.overlap(b) for b in chosen] for a in chosen])
        caption = "Rows that two selections share, over the larger one's."
        width = chosen[0].info.get("width")
        if isinstance(width, int) and all(rows.info.get("width") == width for rows in chosen):
            pairs = itertools.combinations(chosen, 2)
            share = max(_overlap_by_chance(a.counts, b.counts, width) for a, b in pairs)
            caption += f" Two random ones would share {share:.2f} at most."
        draw = partial(draw_matrix, names=names, shares=matrix)
        pictures.append(_Picture("Overlap", caption, max(4, 2 + 0.5 * len(names)), draw))
    columns = {name: torch.tensor([rows.counts]) for name, rows in selections.items()}
    about = {name: rows.info for name, rows in selections.items()}
    return _Section("Selections", f"{facts}.", pictures, columns, about)


def _overlap_by_chance(a: Sequence[int], b: Sequence[int], width: int) -> float:
    """Of two random selections that have so many rows in each layer of ``width``."""
    return sum(x * y / width for x, y in zip(a, b, strict=True)) / max(sum(a), sum(b))


def _png(figures: Sequence[tuple[str, _Picture]]) -> bytes:
    """Pictures, each with its title, below each other."""
    heights = [picture.height for _, picture in figures]
    size = (_WIDTH, sum(heights))
    figure = import_matplotlib()(figsize=size, dpi=_DPI, layout="constrained")
    parts = figure.subfigures(len(figures), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, picture) in zip(parts, figures, strict=True):
        if title:
            part.suptitle(title, fontsize=11)
        picture.draw(part)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _page(sections: Sequence[_Section]) -> str:
    title = html.escape(", ".join(section.title for section in sections))
    body = "\n".join(_html_section(section) for section in sections)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE}</style>
{body}
</html>
"""


def _html_section(section: _Section) -> str:
    text = html.escape
    lines = [f"<h1>{text(section.title)}</h1>", f'<p class="facts">{text(section.facts)}</p>']
    for picture in section.pictures:
        data = base64.b64encode(_png([("", picture)])).decode()
        lines += [
            f"<h2>{text(picture.title)}</h2>",
            f'<figure><img src="data:image/png;base64,{data}" alt="{text(picture.title)}">',
            f"<figcaption>{text(picture.caption)}</figcaption></figure>",
        ]
    medians = [np.median(values.numpy(), axis=0) for values in section.columns.values()]
    head = "".join(f"<th>{text(name)}</th>" for name in ("layer", *section.columns))
    rows = (
        "".join(f"<td>{value:.4g}</td>" for value in (layer, *values))
        for layer, values in enumerate(zip(*medians, strict=True))
    )
    lines += [
        "<details><summary>The lines in numbers</summary><table>",
        f"<tr>{head}</tr>",
        *(f"<tr>{row}</tr>" for row in rows),
        "</table></details>",
        "<details><summary>How it was made</summary>",
        f"<pre>{text(json.dumps(section.about, indent=2))}</pre></details>",
    ]
    return "\n".join(lines)
