"""`patch`: replace a model's FFN down-projections by LokiLinear."""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..attribution.cache import cached_attribution
from ..discovery import find_structure
from ..options import DEFAULT_QUOTA
from ..ranking import rows_per_layer
from ..selection import RowSelection, select
from ..sharding import (
    full_shape,
    heed_in_ddp,
    ignore_in_ddp,
    is_sharded,
    shards_its_weights,
)
from ..structure import DownProjection, Structure
from .checkpoint import SavePretrained
from .handle import Patch, Report
from .linear import LokiLinear, write_rows
from .mlp import FusedMLP, Gating, find_gating
from .targets import Rows, as_selection, assign_rows, check_patchable

logger = logging.getLogger(__name__)


def patch(
    model: nn.Module,
    rows: Rows | None = None,
    *,
    tokenizer: Any = None,
    quota: float = DEFAULT_QUOTA,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    fuse_mlp: bool = False,
) -> Patch:
    """Make a model train some rows of its FFN down-projections and nothing else.

    Every ``down_proj`` of this instance becomes a `LokiLinear` and every other parameter is frozen.
    Train with any trainer; ``state_dict`` and ``save_pretrained`` give an ordinary checkpoint.

    Args:
        model: a transformers causal language model.
        rows: a `RowSelection`, one list of rows a layer, or the path of a row file. None
            analyses the model on the bundled questions (`attribute`, then `select`); the result is
            kept in ``$LOKI_KERNELS_CACHE`` (``~/.cache/loki_kernels``) by a fingerprint of the
            weights.
        tokenizer: for that analysis; by default the one of ``model.name_or_path``.
        quota: percentage of rows for that analysis.
        rank: train the rows as a rank-r update instead (LoKI*).
        dtype: of the trained parameters; the weights' by default.
        fuse_mlp: where the MLP is ``down_proj(act(gate(x)) * up(x))`` with SiLU or
            tanh-approximated GELU, keep gate and up alone for the backward pass, not act(gate) and
            the product: half of the MLP's activation memory. The report says where.

    Returns:
        A `Patch` handle.

    Raises:
        ValueError: for rows out of range, duplicated, or of another layer count; a selection of
            ``ffn_neurons``; a quota outside (0, 100]; a model that is already patched; a damaged
            row file. The model is unchanged.
        UnsupportedModelError: if the model has no FFN down-projections, or not plain ones.
    """
    structure = find_structure(model)
    selection = _selection_to_train(model, structure, rows, tokenizer, quota)
    by_layer = assign_rows(structure, selection)
    selected = [(down_proj, index) for down_proj, index in by_layer if len(index)]
    gatings = [(d, _gating_or_reason(d, rank)) for d, _ in selected if fuse_mlp]
    causal_lm = structure.causal_lm
    total = sum(math.prod(full_shape(parameter)) for parameter in causal_lm.parameters())
    with contextlib.ExitStack() as undo:  # everything, if anything fails; else when it is asked for
        _freeze(causal_lm, undo)
        layers = {d.name: _replace_linear(d, index, rank, dtype, undo) for d, index in selected}
        for down_proj, gating in gatings:
            if isinstance(gating, Gating):
                _replace_mlp(causal_lm, down_proj, gating, undo)
        _attach(structure, layers, undo)
        report = Report(
            patched={name: len(layer.index) for name, layer in layers.items()},
            skipped={
                d.name: "no row of this layer is selected" for d, rows in by_layer if not len(rows)
            },
            fused={_mlp_name(d): g.activation for d, g in gatings if isinstance(g, Gating)},
            not_fused={_mlp_name(d): g for d, g in gatings if isinstance(g, str)},
            trainable=sum(p.numel() for p in causal_lm.parameters() if p.requires_grad),
            total=total,
        )
        logger.info("%s", report)
        return Patch(causal_lm, selection, report, layers, undo.pop_all())


def _selection_to_train(
    model: nn.Module, structure: Structure, rows: Rows | None, tokenizer: Any, quota: float
) -> RowSelection:
    """The rows to train of a model that can be patched."""
    check_patchable(structure)
    if rows is None:
        rows_per_layer(quota, structure.hidden_size)  # a bad quota fails before the analysis
        return select(cached_attribution(model, structure, tokenizer), quota)
    return as_selection(rows)


def _gating_or_reason(down_proj: DownProjection, rank: int | None) -> Gating | str:
    if rank is not None:
        return "low-rank rows need the product itself"
    if is_sharded(down_proj.module.weight):
        return "its weights are sharded"
    return find_gating(down_proj)


def _mlp_name(down_proj: DownProjection) -> str:
    return down_proj.name.rpartition(".")[0]


def _freeze(model: nn.Module, undo: contextlib.ExitStack) -> None:
    for parameter in model.parameters():
        undo.callback(parameter.requires_grad_, parameter.requires_grad)
        parameter.requires_grad_(False)


def _replace_linear(
    down_proj: DownProjection,
    index: Tensor,
    rank: int | None,
    dtype: torch.dtype | None,
    undo: contextlib.ExitStack,
) -> LokiLinear:
    linear = down_proj.module
    layer = LokiLinear.from_linear(linear, index, rank, dtype)

    def put_back() -> None:
        # .to() and load_state_dict(assign=True) may have replaced the parameter objects
        linear.weight = layer.weight
        linear.bias = layer.bias  # type: ignore[assignment]  # torch declares no None
        linear.train(layer.training)
        setattr(down_proj.parent, down_proj.attribute, linear)

    setattr(down_proj.parent, down_proj.attribute, layer)
    undo.callback(put_back)
    return layer


def _replace_mlp(
    model: nn.Module, down_proj: DownProjection, gating: Gating, undo: contextlib.ExitStack
) -> None:
    owner_name, _, attribute = _mlp_name(down_proj).rpartition(".")
    owner, mlp = model.get_submodule(owner_name), down_proj.parent
    fused = FusedMLP(mlp, down_proj.attribute, gating)

    def put_back() -> None:
        mlp.training = fused.training
        setattr(owner, attribute, mlp)

    setattr(owner, attribute, fused)
    undo.callback(put_back)


def _attach(
    structure: Structure, layers: dict[str, LokiLinear], undo: contextlib.ExitStack
) -> None:
    """What a patched model needs outside its layers: for its decoder, its saving, and DDP."""
    model = structure.causal_lm
    writer = _RowWriter(model, [layer for layer in layers.values() if layer.rank is None])
    for hook in writer.attach(structure.decoder):
        undo.callback(hook.remove)
    saver = SavePretrained.attach(model, layers)
    if saver is not None:
        undo.callback(saver.detach)
    indices = [f"{name}.index" for name in layers]
    ignore_in_ddp(model, indices)
    undo.callback(heed_in_ddp, model, indices)


@dataclass
class _RowWriter:
    """Writes the rows of all layers into their weights when the decoder starts, in one launch.

    Where an engine shards the weights it tells the layers so, and writes nothing.
    """

    model: nn.Module
    layers: list[LokiLinear]

    def attach(self, decoder: nn.Module) -> list[RemovableHandle]:
        if not self.layers:
            return []
        return [
            decoder.register_forward_pre_hook(self.before_forward),
            decoder.register_forward_hook(self.after_forward, always_call=True),
        ]

    def before_forward(self, _decoder: nn.Module, _inputs: Any) -> None:
        if torch.compiler.is_compiling():  # there the weight is not written
            return
        sharded = shards_its_weights(self.model)
        if not sharded:
            write_rows(self.layers)
        for layer in self.layers:
            layer.sharded = sharded
            layer.in_step = not sharded

    def after_forward(self, _decoder: nn.Module, _inputs: Any, _output: Any) -> None:
        if not torch.compiler.is_compiling():
            for layer in self.layers:
                layer.in_step = False
