"""Results people would rather see than read."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import atomic_path
from .ranking import count_extreme, rows_per_layer


def plot_heatmap(scores: Tensor, path: str | os.PathLike[str], quota: float) -> None:
    """Layers x nodes, how often each is among the highest and lowest ``quota`` % of its layer.

    Args:
        scores: ``[N, L, D]``.
        path: a ``.png`` file.
        quota: percentage, in (0, 100].

    Raises:
        ValueError: for another suffix or a quota out of range.
        ImportError: without the ``plot`` extra.
    """
    if Path(path).suffix != ".png":
        raise ValueError(f"{path}: the heatmap is a .png file.")
    figure_canvas, figure_class = import_matplotlib()
    samples, _, width = scores.shape
    k = rows_per_layer(quota, width)
    panels = {
        f"among the {quota:g} % {kind}": count_extreme(scores, k, kind == "highest", "signed")
        for kind in ("highest", "lowest")
    }
    figure = figure_class(figsize=(10, 6), layout="constrained")
    figure_canvas(figure)
    axes = figure.subplots(2, 1, sharex=True)
    image = None
    for axis, (title, counts) in zip(axes, panels.items(), strict=True):
        share = counts.to(torch.float32) / samples
        image = axis.imshow(
            share.numpy(), aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest"
        )
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("layer")
    axes[-1].set_xlabel("node")
    figure.colorbar(image, ax=axes, label="share of prompts")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def import_matplotlib() -> tuple[Any, Any]:
    """matplotlib's canvas without a screen and its figure, or where to get them."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'loki-kernels[plot]'.") from error
    return FigureCanvasAgg, Figure


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
    if Path(path).suffix != ".png":
        raise ValueError(f"{path}: the picture is a .png file.")
    figure_canvas, figure_class = import_matplotlib()
    figure = figure_class(figsize=(11, max(4, 1.2 + 0.19 * len(bars))), layout="constrained")
    figure_canvas(figure)
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
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
