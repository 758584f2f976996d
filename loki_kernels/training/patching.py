"""`patch`: replace a model's FFN down-projections by LokiLinear and LokiExperts."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..attribution.analysis import AnalysisOptions
from ..default_device import made_on_cpu
from ..discovery import find_structure
from ..errors import explained
from ..gating import Gating, find_gating
from ..memory import warn_of_memory
from ..ops._dispatch import warm_up
from ..options import Criterion
from ..protection import Protection, fingerprint_of, warn_of_another_model
from ..selection import RowSelection
from ..sharding import heed_in_ddp, ignore_in_ddp, is_distributed, is_partitioned, is_sharded
from ..structure import DownProjection, Structure
from . import adapter_file
from .adapter_file import SavedUpdate
from .agreement import check_processes_agree
from .arithmetic import take_rows
from .checkpoint import SavePretrained
from .experts import LokiExperts
from .handle import Patch
from .linear import LokiLinear
from .mlp import FusedMLP
from .report import Whole, held_in, plan, whole_weights
from .rows import BESIDE, LokiRows
from .targets import (
    WHOLE,
    Protect,
    Rows,
    as_selection,
    assign_rows,
    check_arguments,
    check_patchable,
    check_trainable,
    find_modules,
    new_heads,
    parameters_of,
    projection_names,
    protection_to_keep,
    selection_to_train,
    what_to_train,
)
from .writer import HOLD, Generate, RowWriter

logger = logging.getLogger(__name__)


@made_on_cpu
def patch(
    model: nn.Module,
    rows: Rows | None = None,
    *,
    tokenizer: Any = None,
    quota: float | None = None,
    criterion: Criterion | None = None,
    analysis: AnalysisOptions | None = None,
    rank: int | None = None,
    protect: Protect | None = None,
    modules_to_save: Sequence[str] | None = None,
    fuse_mlp: bool = False,
) -> Patch:
    """Make a model train an update of rows of its FFN down-projections.

    ``patch(model)`` trains all rows, protected. ``patch(model, criterion="signed")`` is the paper's
    (arXiv 2505.22120): the 10 % whose integrated gradients are lowest, unprotected;
    ``patch(model, quota=10)`` those nearest to zero, which are missed far less.

    Every ``down_proj`` of this instance becomes a `LokiLinear`, the experts of a mixture together a
    `LokiExperts` (row j of a layer is row j of every expert), whose update of its rows is trained
    in float32, and every other parameter is frozen, but for ``modules_to_save`` and a new head
    (``AutoModelForSequenceClassification``). Train with any trainer; ``save_pretrained`` gives an
    ordinary checkpoint, with the update in a file beside it.

    Analyses and estimates are kept in ``$LOKI_KERNELS_CACHE`` (``~/.cache/loki_kernels``) and made
    on the accelerator if the model fits; of several processes all have the first one's.

    Args:
        model: a transformers causal language model.
        rows: a `RowSelection`, one list of rows a layer, or the path of a row file; or the folder
            of a checkpoint or an adapter, to go on from the update saved there (``model`` is the
            base; an update that was protected goes on so, by what lies beside it or the same
            ``protect``). None trains all rows, or with a ``quota`` below 100, a ``criterion`` or
            ``analysis`` analyses the model on the bundled questions (`attribute`, then `select`).
        tokenizer: for an analysis or a protection; by default the one of ``model.name_or_path``.
        quota: percentage of rows that an analysis chooses, 10 by default; 100 are all, without one.
        criterion: of `select`: ``"magnitude"``, or ``"signed"`` as the paper's.
        analysis: arguments of `attribute` for it, such as ``{"batch_size": 8}`` or ``prompts``.
        rank: train an update of rank r instead (LoKI*).
        protect: keep the update out of the directions in which general text drives each
            down-projection: a `Protection`, the path of its file, True, which estimates one from
            the model's own samples, or False. None is True if nothing above says what to train.
        modules_to_save: names of modules to train whole beside the rows, in the checkpoint's own
            dtype, such as ``["embed_tokens"]`` for new tokens; as in PEFT, the end of a name is
            enough.
        fuse_mlp: where the MLP is ``down_proj(act(gate(x)) * up(x))`` with SiLU or
            tanh-approximated GELU, keep gate and up alone for the backward pass: half of the MLP's
            activations (FSDP2, ZeRO-3: a quarter; ``torch.compile``: none). The report says where.

    Returns:
        A `Patch` handle.

    Raises:
        ValueError: for rows out of range, duplicated, or of another layer count; a selection of
            ``ffn_neurons``; a quota outside (0, 100], an unknown criterion or option of the
            analysis, or one of them beside rows; a model that is patched or has a PEFT adapter;
            unknown ``modules_to_save``; a damaged file, or an update of another base; a protection
            of another model; processes with other rows, weights or protections. The model is
            unchanged.
        UnsupportedModelError: if it has no FFN down-projections, or not plain ones; or DDP around.
    """
    structure = find_structure(model)
    check_trainable(structure)
    check_arguments(rows, quota, criterion, analysis, rank, modules_to_save or ())
    saved = _saved_update(rows, rank)
    if saved is not None:
        rows, rank = saved.rows_of(projection_names(structure)), saved.rank
        protect = _beside(saved, protect)
    whole = _whole(structure, modules_to_save or (), saved)
    quota, protect = what_to_train(rows, quota, criterion, analysis, protect)
    warn_of_memory(structure, rows, quota, protected=protect not in (None, False), rank=rank)
    selection, protection = _chosen(structure, rows, tokenizer, quota, criterion, analysis, protect)
    warn_of_another_model(None if saved or protect is True else protection, structure)
    handle = _patch_rows(
        structure, selection, whole, rank, protection, fuse_mlp=fuse_mlp, together=True
    )
    if saved is not None:
        _load(handle, saved)
    return handle


def _chosen(
    structure: Structure,
    rows: Rows | None,
    tokenizer: Any,
    quota: float,
    criterion: Criterion | None,
    analysis: AnalysisOptions | None,
    protect: Protect | None,
) -> tuple[RowSelection, Protection | None]:
    """The rows and the protection; what is read comes before what takes minutes."""
    named = None if rows is None else as_selection(rows)
    if named is not None:
        assign_rows(structure, named)
    protection = protection_to_keep(structure, protect, tokenizer)
    return named or selection_to_train(structure, tokenizer, quota, criterion, analysis), protection


def patch_saved(model: nn.Module, saved: SavedUpdate) -> Patch:
    """`patch` with a saved update, unprotected, in this process whatever the others do.

    The first process alone may measure it; training compares them, and refuses a protected one.
    """
    structure = find_structure(model)
    check_patchable(structure)
    rows = RowSelection(saved.rows_of(projection_names(structure)))
    whole = _whole(structure, (), saved)  # a config names more modules, as PEFT writes it
    handle = _patch_rows(structure, rows, whole, saved.rank, None, fuse_mlp=False, together=False)
    _load(handle, saved)
    return handle


def _whole(structure: Structure, modules: Sequence[str], saved: SavedUpdate | None) -> Whole:
    """What is trained whole: ``modules``, a new head, and what a saved update has beside its rows.

    Raises:
        ValueError: as `find_modules` does.
    """
    others, alone = adapter_file.whole_modules(structure.causal_lm, saved.others if saved else ())
    known = parameters_of(structure.causal_lm)
    return {
        **find_modules(structure, [*modules, *others, *new_heads(structure)]),
        **{name: known[name] for name in alone if name in known},
    }


def _patch_rows(
    structure: Structure,
    selection: RowSelection,
    whole: Whole,
    rank: int | None,
    protection: Protection | None,
    *,
    fuse_mlp: bool,
    together: bool,
) -> Patch:
    """Train these rows; undone if anything fails.

    Args:
        whole: modules and parameters that are trained whole beside them.
        together: whether every process does, so that they can be compared now.
    """
    _refuse_mixed_buffer(whole)
    together = together and is_distributed()
    by_layer = assign_rows(structure, selection)
    selected = [(down_proj, index) for down_proj, index in by_layer if len(index)]
    if together:
        check_processes_agree(selection, fingerprint_of(protection), _base_rows(selected))
    gatings = {d.name: _gating_or_reason(d, rank) for d, _ in selected if fuse_mlp}
    causal_lm = structure.causal_lm
    report = plan(structure, by_layer, rank, gatings, whole, protection)
    with contextlib.ExitStack() as undo:  # everything, if anything fails; else when it is asked for
        _freeze(causal_lm, undo, but=whole)
        layers: dict[str, LokiRows] = {}
        for d, index in selected:
            kept = None if protection is None else protection.directions.get(d.name)
            layer = layers[d.name] = _layer_for(d, index, rank, kept)
            if protection is not None:
                layer.protect(protection)
            _replace_module(d, layer, undo)
            gating = gatings.get(d.name)
            if isinstance(gating, Gating):
                _replace_mlp(causal_lm, d, gating, undo)
        writer = _attach(structure, layers, undo, agreed=together)
        trained = sum(p.numel() for p in causal_lm.parameters() if p.requires_grad)
        notes = [*report.notes, *whole_weights(layers)]
        report = replace(report, trainable=trained, notes=notes)
        logger.info("%s", report)
        _warm_up(layers, fused=any(isinstance(gating, Gating) for gating in gatings.values()))
        return Patch(causal_lm, selection, report, protection, layers, writer, undo.pop_all())


def _base_rows(selected: Iterable[tuple[DownProjection, Tensor]]) -> Iterator[Tensor]:
    """What an update will be added to, a layer at a time; ZeRO-3 splits the first one's."""
    for down_proj, index in selected:
        weight = down_proj.weight.detach()
        if not is_partitioned(down_proj.weight):
            yield take_rows(weight, index.to(weight.device), down_proj.axis)


def _refuse_mixed_buffer(whole: Whole) -> None:
    """Raise ValueError for what DeepSpeed's ZeRO-3 would fail on, with an assertion of no words.

    It keeps its parts of all that is trained in one buffer of one dtype. The update is float32, and
    with bf16 or fp16 what is trained whole was given 16 bits when it was split.
    """
    for name, parameter in ((n, p) for n, part in whole.items() for p in held_in(part)):
        if is_partitioned(parameter) and parameter.dtype != torch.float32:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} would be trained whole in {dtype}, beside an update in float32, and "
                "ZeRO-3 keeps what is trained in one buffer of one dtype. Train without "
                "bf16 and fp16, with ZeRO-2, or the rows alone."
            )


def _warm_up(layers: dict[str, LokiRows], *, fused: bool) -> None:
    """Check the kernels that training will use, where the model lies now."""
    ops = ["sync_rows", *(["gated_product"] if fused else [])]
    for device, dtype in {
        (layer.base_rows.device, layer.base_rows.dtype) for layer in layers.values()
    }:
        warm_up(ops, device, dtype)


def _saved_update(rows: Rows | None, rank: int | None) -> SavedUpdate | None:
    """What a checkpoint's or an adapter's folder holds, if ``rows`` names one."""
    if not isinstance(rows, (str, os.PathLike)) or not Path(rows).is_dir():
        return None
    saved = adapter_file.read_saved(rows)
    if rank not in (None, saved.rank):
        own = "of no rank" if saved.rank is None else f"of rank {saved.rank}"
        raise ValueError(
            f"the update in {rows} is {own}, and rank={rank} would train another; leave out rank= "
            "to go on from it."
        )
    return saved


def _beside(saved: SavedUpdate, protect: Protect | None) -> Protect | None:
    """The protection that lies beside a saved update, unless another or none is asked for.

    Raises:
        ValueError: if one is to be estimated for an update that had none.
    """
    if saved.protection is None and protect is True:
        raise _unfit(adapter_file.why_other_protection(None, ""))
    if saved.protection is None or protect not in (None, True):
        return protect
    return saved.protection_file if os.path.isfile(saved.protection_file) else protect


def _gating_or_reason(down_proj: DownProjection, rank: int | None) -> Gating | str:
    if down_proj.of_experts:
        return "its experts are products of sorted tokens, which keep what they need themselves"
    if rank is not None:
        return "low-rank rows need the product itself"
    if is_sharded(down_proj.weight):
        return "its weights are sharded"
    return find_gating(down_proj, to_train=True)


def _unfit(reason: str | None) -> ValueError:
    return explained(ValueError(f"the update that was saved does not fit this model: {reason}."))


def _load(handle: Patch, saved: SavedUpdate) -> None:
    """Load what was saved into a model that was just patched.

    It is unpatched if that fails, without writing rows into its weights: none holds an update yet,
    and sharded ones cannot be written.
    """
    present = fingerprint_of(handle.protection)
    try:
        reason = None
        if present is not None:  # it would act otherwise; without one it acts and is not trained
            reason = adapter_file.why_other_protection(saved.protection, present)
        reason = reason or handle._load(saved)
        if reason is not None:
            raise _unfit(reason)
    except BaseException:
        handle._leave(trained=False)
        raise


def _freeze(model: nn.Module, undo: contextlib.ExitStack, but: Whole) -> None:
    # By name: FSDP2 replaces the parameters and expects that the whole ones are freed.
    trained = {name: p.requires_grad for name, p in parameters_of(model).items()}

    def put_back() -> None:
        for name, parameter in parameters_of(model).items():
            parameter.requires_grad_(trained.get(name, parameter.requires_grad))

    undo.callback(put_back)
    model.requires_grad_(False)
    for part in but.values():
        part.requires_grad_(True)
    model.__dict__[WHOLE] = {n for n, p in parameters_of(model).items() if p.requires_grad}
    undo.callback(model.__dict__.pop, WHOLE, None)


def _replace_module(down_proj: DownProjection, layer: LokiRows, undo: contextlib.ExitStack) -> None:
    module = down_proj.module
    for hooks in _HOOKS:  # the same objects, so that a handle removes its hook from both
        setattr(layer, hooks, getattr(module, hooks))

    # Until then they are the layer's alone, in which FSDP2 replaces them and expects that the whole
    # ones are freed; .to() and load_state_dict(assign=True) may replace them too.
    for held in (module._parameters, module._buffers):
        held.update(dict.fromkeys(held))

    def put_back() -> None:
        for held in (module._parameters, module._buffers):
            held.update({name: getattr(layer, name) for name in held})
        module.train(layer.training)
        setattr(down_proj.parent, down_proj.attribute, module)

    setattr(down_proj.parent, down_proj.attribute, layer)
    undo.callback(put_back)


def _layer_for(
    down_proj: DownProjection, index: Tensor, rank: int | None, directions: Tensor | None
) -> LokiRows:
    if down_proj.of_experts:
        return LokiExperts(
            down_proj.module, down_proj.parameter, down_proj.axis, index, rank, directions
        )
    return LokiLinear(cast(nn.Linear, down_proj.module), index, rank, directions)


# What a module calls around its forward pass, in torch 2.11 to 2.13.
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def _replace_mlp(
    model: nn.Module, down_proj: DownProjection, gating: Gating, undo: contextlib.ExitStack
) -> None:
    owner_name, _, attribute = down_proj.name.rpartition(".")[0].rpartition(".")
    owner, mlp = model.get_submodule(owner_name), down_proj.parent
    fused = FusedMLP(mlp, down_proj.attribute, gating)

    def put_back() -> None:
        mlp.training = fused.training
        setattr(owner, attribute, mlp)

    setattr(owner, attribute, fused)
    undo.callback(put_back)


def _attach(
    structure: Structure, layers: dict[str, LokiRows], undo: contextlib.ExitStack, *, agreed: bool
) -> RowWriter:
    """What a patched model needs outside its layers: for its decoder, its saving, and DDP."""
    model = structure.causal_lm
    writer = RowWriter(model, layers, agreed=agreed)
    for hook in writer.attach(structure.decoder):
        undo.callback(hook.remove)
    model.__dict__[HOLD] = writer.hold
    undo.callback(model.__dict__.pop, HOLD, None)
    ours: dict[str, Any] = {"save_pretrained": SavePretrained(model, layers)}
    for name in {"generate", "generate_batch"} - model.__dict__.keys():  # another's stays
        ours[name] = Generate(writer, name)
    others = {name: model.__dict__[name] for name in ours.keys() & model.__dict__.keys()}
    undo.callback(model.__dict__.update, others)
    for name, call in ours.items():
        if hasattr(type(model), name):
            model.__dict__[name] = call
            undo.callback(model.__dict__.pop, name, None)
    kept = (*BESIDE, "base_rows", "directions")
    buffers = [f"{name}.{buffer}" for name in layers for buffer in kept]
    ignore_in_ddp(model, buffers)
    undo.callback(heed_in_ddp, model, buffers)
    return writer
