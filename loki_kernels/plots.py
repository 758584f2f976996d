"""Results people would rather see than read."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import import_extra
from .files import atomic_path, check_writable
from .ops import count_lowest
from .ranking import in_parts, rows_per_layer

_COLORS = ("#3b6ea5", "#c1622d")
_LEAST = 1e-12
_PLOTTED = 0.77  # of a figure's width is a heatmap's: .79 beside a colour bar at 900 pixels


def plot_heatmap(
    scores: Tensor, path: str | os.PathLike[str], quota: float, without_ffn: Sequence[int] = ()
) -> None:
    """Layers x nodes, how often each is among the highest and lowest ``quota`` % of its layer.

    Args:
        scores: ``[N, L, D]``.
        path: a ``.png`` file.
        quota: percentage, in (0, 100].
        without_ffn: layers that have no nodes, which stay blank.

    Raises:
        ValueError: for another suffix or a quota out of range.
        ImportError: without the ``plot`` extra.
    """
    samples, layers, width = scores.shape
    k = rows_per_layer(quota, width)
    with picture(path, 10, 6, dpi=150) as figure:
        highest, lowest = torch.zeros(2, layers, width, dtype=torch.int64, device=scores.device)
        for part in in_parts(scores):  # read once: it may be larger than memory
            count_lowest(-part, k, highest)
            count_lowest(part, k, lowest)
        panels = {
            f"among the {quota:g} % {kind}": shares_of(counts, samples, without_ffn)
            for kind, counts in (("highest", highest), ("lowest", lowest))
        }
        draw_heatmap(figure, panels)


def shares_of(counts: Tensor, samples: int, without_ffn: Sequence[int]) -> Tensor:
    """``[L, D]``, NaN in layers without an FFN, whose scores are all zero."""
    shares = counts / samples
    shares[list(without_ffn)] = math.nan
    return shares


def import_matplotlib() -> Any:
    """matplotlib's figure, which needs no screen."""
    return import_extra("matplotlib.figure", "plot", "pictures need matplotlib").Figure


@contextlib.contextmanager
def picture(
    path: str | os.PathLike[str], width: float, height: float, dpi: int = 120
) -> Iterator[Any]:
    """An empty figure of so many inches, which is written to ``path`` at the end.

    Raises:
        ValueError: if the path does not end in ``.png``.
        ImportError: without the ``plot`` extra.
    """
    check_writable(path, ".png")
    figure = import_matplotlib()(figsize=(width, height), dpi=dpi, layout="constrained")
    yield figure
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def draw_heatmap(figure: Any, shares: Mapping[str, Tensor]) -> None:
    """Layers x nodes, a panel for each title: the share of prompts ``[L, D]``, NaN left blank.

    Of more nodes than pixels several neighbours are one column, of their maximum: else most of the
    nodes would not be drawn, and the few extreme ones are what is looked for.
    """
    axes = figure.subplots(len(shares), 1, sharex=True, squeeze=False)[:, 0]
    pixels = int(_PLOTTED * figure.bbox.width)
    image, each = None, 1
    for axis, (title, share) in zip(axes, shares.items(), strict=True):
        layers, width = share.shape
        each = -(-width // pixels)
        drawn = _maxima(share, each)
        nodes = each * drawn.shape[1]
        image = axis.imshow(
            drawn.numpy(), aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest",
            extent=(-0.5, nodes - 0.5, layers - 0.5, -0.5),
        )  # fmt: skip
        axis.set_xlim(-0.5, width - 0.5)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("layer")
    axes[-1].set_xlabel("node" if each == 1 else f"node (the maximum of {each} neighbours)")
    figure.colorbar(image, ax=axes, label="share of prompts")


def _maxima(values: Tensor, each: int) -> Tensor:
    """The maxima of ``each`` neighbours of ``[L, D]``, the last of fewer; NaN stays."""
    missing = -values.shape[1] % each
    filled = torch.nn.functional.pad(values, (0, missing), value=-math.inf)
    maxima: Tensor = filled.view(len(values), -1, each).amax(-1)
    return maxima


def draw_profile(figure: Any, lines: Mapping[str, Tensor], label: str, *, log: bool) -> None:
    """Each layer's median over the samples, and a band from their 10th to their 90th percentile.

    Args:
        figure: to draw on.
        lines: by title, ``[N, L]``.
        label: of what they are.
        log: draw the logarithm; what is below 1e-12 is drawn there.
    """
    axis = figure.subplots()
    for (title, values), color in zip(lines.items(), _COLORS, strict=False):
        shown = values.clamp_min(_LEAST) if log else values
        low, middle, high = np.quantile(shown.numpy(), (0.1, 0.5, 0.9), axis=0)
        axis.fill_between(range(len(middle)), low, high, color=color, alpha=0.2, linewidth=0)
        axis.plot(middle, color=color, marker=".", label=title)
    if log:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    _label_layers(axis, label)
    if len(lines) > 1:
        axis.legend()


def draw_rows(figure: Any, counts: Mapping[str, Sequence[int]]) -> None:
    """How many rows each layer has, a line for each selection."""
    axis = figure.subplots()
    for name, rows in counts.items():
        axis.plot(rows, marker=".", label=name)
    axis.set_ylim(bottom=0)
    _label_layers(axis, "rows")
    axis.legend(fontsize=8)


def _label_layers(axis: Any, label: str) -> None:
    axis.set_xlabel("layer")
    axis.set_ylabel(label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)


def draw_matrix(figure: Any, names: Sequence[str], shares: Tensor) -> None:
    """A share from 0 to 1 of each pair, ``[n, n]``, as colours and numbers."""
    axis = figure.subplots()
    axis.imshow(shares.numpy(), cmap="magma", vmin=0, vmax=1)
    for i, j in itertools.product(range(len(names)), repeat=2):
        color = "white" if shares[i, j] < 0.6 else "black"
        axis.text(j, i, f"{shares[i, j]:.2f}", color=color, ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)


def plot_drift(
    path: str | os.PathLike[str],
    title: str,
    bars: Sequence[tuple[str, float, float]],
    token_kl: Tensor,
) -> None:
    """KL by domain with standard errors, and how the KL of single tokens is distributed.

    Args:
        path: a ``.png`` file.
        title: of the picture.
        bars: (domain, KL in nats a token, its standard error or NaN), in the order to draw.
        token_kl: float32 ``[tokens]``, in nats.

    Raises:
        ValueError: for another suffix.
        ImportError: without the ``plot`` extra.
    """
    with picture(path, 11, max(4, 1.2 + 0.19 * len(bars)), dpi=150) as figure:
        left, right = figure.subplots(1, 2)
        names, means, errors = zip(*bars, strict=True)
        left.barh(range(len(bars)), means, xerr=errors, color="#3b6ea5", ecolor="black", capsize=2)
        left.set_yticks(range(len(bars)), names, fontsize=8)
        left.set_ylim(len(bars) - 0.5, -0.5)
        left.set_xlim(left=0)
        left.set_xlabel("KL to the base, nats a token (± standard error)")
        least = 1e-8  # below it float32 tells nothing
        kl = token_kl.clamp_min(least)
        high = max(float(kl.max()), 1e-3)
        edges = torch.logspace(math.log10(least), math.log10(high), 61).tolist()
        right.hist(kl.numpy(), bins=[*edges[:-1], high * 1.001], color="#3b6ea5")
        right.set_xscale("log")
        right.set_xlabel("KL at a token, nats (those below 1e-8 are drawn there)")
        right.set_ylabel("tokens")
        figure.suptitle(title, fontsize=10)
