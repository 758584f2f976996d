"""`patch`: replace a model's FFN down-projections by LokiLinear."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..attribution.cache import cached_attribution
from ..options import DEFAULT_QUOTA
from ..ranking import rows_per_layer
from ..selection import select
from ..sharding import full_shape, is_sharded, shards_its_weights
from ..structure import DownProjection, find_structure
from .checkpoint import SavePretrained
from .handle import Patch, Report
from .linear import LokiLinear, write_rows
from .mlp import FusedMLP, Gating, find_gating
from .targets import Rows, as_selection, check_fits, check_patchable

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
    check_patchable(structure)
    if rows is None:
        rows_per_layer(quota, structure.hidden_size)  # a bad quota fails before the analysis
        selection = select(cached_attribution(model, structure, tokenizer), quota)
    else:
        selection = as_selection(rows)
    check_fits(selection, structure)
    gatings: dict[str, Gating | str] = {}
    if fuse_mlp:
        gatings = {d.name: _gating_or_reason(d, rank) for d in structure.down_projs}

    causal_lm = structure.causal_lm
    names = {id(module): name for name, module in causal_lm.named_modules()}
    layers: list[tuple[DownProjection, LokiLinear]] = []
    skipped: dict[str, str] = {}
    required = [(parameter, parameter.requires_grad) for parameter in causal_lm.parameters()]
    total = sum(math.prod(full_shape(parameter)) for parameter, _ in required)
    try:
        for down_proj, index in zip(structure.down_projs, selection, strict=True):
            if len(index) == 0:
                skipped[names[id(down_proj.module)]] = "no row of this layer is selected"
                continue
            layers.append((down_proj, LokiLinear.from_linear(down_proj.module, index, rank, dtype)))
    except BaseException:
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        raise
    for parameter, _ in required:
        parameter.requires_grad_(False)
    for down_proj, layer in layers:
        setattr(down_proj.parent, down_proj.attribute, layer)
    fused, not_fused, mlps = _fuse_mlps(causal_lm, layers, gatings, names)
    trainable = sum(p.numel() for p in causal_lm.parameters() if p.requires_grad)
    report = Report(
        patched={names[id(d.module)]: len(layer.index) for d, layer in layers},
        skipped=skipped,
        fused=fused,
        not_fused=not_fused,
        trainable=trainable,
        total=total,
    )
    writer = _RowWriter(causal_lm, [layer for _, layer in layers if layer.rank is None])
    hooks = writer.attach(structure.decoder)
    handle = Patch(causal_lm, selection, report, layers, required, mlps, hooks)
    handle._saver = SavePretrained.attach(causal_lm, handle.named_layers())
    # The same in every process; else DDP would write it anew at each step, under pending backwards.
    causal_lm._ddp_params_and_buffers_to_ignore = [
        *getattr(causal_lm, "_ddp_params_and_buffers_to_ignore", []),
        *(f"{down_proj.name}.index" for down_proj, _ in layers),
    ]
    logger.info("%s", report)
    return handle


def _gating_or_reason(down_proj: DownProjection, rank: int | None) -> Gating | str:
    if rank is not None:
        return "low-rank rows need the product itself"
    if is_sharded(down_proj.module.weight):  # type: ignore[arg-type]
        return "its weights are sharded"
    return find_gating(down_proj)


def _fuse_mlps(
    causal_lm: nn.Module,
    layers: Sequence[tuple[DownProjection, LokiLinear]],
    gatings: dict[str, Gating | str],
    names: dict[int, str],
) -> tuple[dict[str, str], dict[str, str], list[tuple[nn.Module, str, nn.Module]]]:
    """Put a `FusedMLP` where the gating is known; (fused, not fused, what was replaced)."""
    fused: dict[str, str] = {}
    not_fused: dict[str, str] = {}
    mlps: list[tuple[nn.Module, str, nn.Module]] = []
    for down_proj, _ in layers:
        gating = gatings.get(down_proj.name)
        name = names[id(down_proj.parent)]
        if isinstance(gating, str):
            not_fused[name] = gating
        if not isinstance(gating, Gating):
            continue
        owner_name, _, attribute = name.rpartition(".")
        owner = causal_lm.get_submodule(owner_name)
        setattr(owner, attribute, FusedMLP(down_proj.parent, down_proj.attribute, gating))
        mlps.append((owner, attribute, down_proj.parent))
        fused[name] = gating.activation
    return fused, not_fused, mlps


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
