"""Results people would rather see than read."""

from __future__ import annotations

import os
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
