"""`patch`: replace a model's FFN down-projections by LoKILinear, and undo it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from . import adapter_file
from .adapter_file import SIDE_FILE, Parts
from .cache import cached_attribution
from .errors import UnsupportedModelError
from .linear import TRAINED, LoKILinear, low_rank_rows, write_rows
from .mlp import FusedMLP, Gating, find_gating
from .quota import DEFAULT_QUOTA, rows_per_layer
from .selection import RowSelection, select
from .sharding import full_shape, is_partitioned, is_sharded, shards_its_weights
from .structure import DownProjection, Structure, find_structure, is_plain_linear

if TYPE_CHECKING:
    from .trainer import SideFileCallback

logger = logging.getLogger(__name__)

# What names rows: a selection, one list a layer, or the path of a position file.
Rows = RowSelection | Sequence[Sequence[int] | Tensor] | str | os.PathLike[str]


@dataclass(frozen=True)
class Report:
    """What `patch` did.

    Attributes:
        patched: layer name -> number of trained rows.
        skipped: layer name -> why it was left alone.
        fused: MLP name -> activation of those that recompute their activation product.
        not_fused: MLP name -> why not, of the others, if ``fuse_mlp`` was asked for.
        trainable: trained parameters.
        total: parameters of the model, the trained rows counted once.
    """

    patched: dict[str, int]
    skipped: dict[str, str]
    fused: dict[str, str]
    not_fused: dict[str, str]
    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        lines = [
            f"{len(self.patched)} down-projections patched, {self.trainable:,} of {self.total:,} "
            f"parameters trained ({share:.2f} %)"
        ]
        lines += [f"skipped {name}: {why}" for name, why in self.skipped.items()]
        if self.fused:
            lines.append(f"{len(self.fused)} MLPs fused ({', '.join(set(self.fused.values()))})")
        lines += [f"not fused {name}: {why}" for name, why in self.not_fused.items()]
        return "\n".join(lines)


@dataclass
class Patch:
    """Handle on a patched model; as a context manager it unpatches at the end.

    Attributes:
        model: the model that was patched.
        rows: the selection it trains.
        report: what was patched and what was not.
    """

    model: nn.Module
    rows: RowSelection
    report: Report
    _layers: list[tuple[DownProjection, LoKILinear]] = field(repr=False)
    _required: list[tuple[nn.Parameter, bool]] = field(repr=False)
    _mlps: list[tuple[nn.Module, str, nn.Module]] = field(repr=False)  # owner, attribute, original
    _hooks: list[RemovableHandle] = field(repr=False)
    _saver: _SavePretrained | None = field(default=None, repr=False)
    _active: bool = field(default=True, repr=False)

    def merge(self) -> nn.Module:
        """Put plain ``nn.Linear`` back with the trained rows in their weights; return the model.

        Raises:
            RuntimeError: if the model was already merged or unpatched, or its weights are sharded.
        """
        return self._restore(trained=True)

    def unpatch(self) -> nn.Module:
        """Put the original model back, bit for bit, and return it.

        Raises:
            RuntimeError: if the model was already merged or unpatched, or its weights are sharded.
        """
        return self._restore(trained=False)

    def save_state(self, folder: str | os.PathLike[str]) -> Path:
        """Write the trained parameters in their own dtype beside a checkpoint.

        ``model.save_pretrained`` does this by itself where the merged checkpoint does not hold them
        exactly: float32 rows over a bfloat16 weight, and low-rank rows. Elsewhere it removes a side
        file, which would be an earlier run's. With sharded parameters every process has to call it.
        """
        layers = self.named_layers()
        parts = {name: adapter_file.parts_of(layer) for name, layer in layers}
        return adapter_file.write_side_file(folder, layers, parts)

    def load_state(self, folder: str | os.PathLike[str]) -> None:
        """Read back what `save_state` wrote.

        Low-rank rows are an update of the model that was patched first: load that one, not the
        checkpoint beside the file, which already holds the update.

        Raises:
            FileNotFoundError: if the folder has no side file.
            ValueError: if it is damaged, belongs to another selection, or has low-rank rows of
                other weights; nothing is changed then.
            RuntimeError: under ZeRO-3, whose own checkpoints hold the rows.
        """
        if any(is_partitioned(layer.weight) for _, layer in self.named_layers()):
            raise RuntimeError("DeepSpeed reads the trained rows from its own checkpoints.")
        path = Path(folder) / SIDE_FILE
        reason = adapter_file.copy_into(self.named_layers(), adapter_file.read(path))
        if reason is not None:
            raise ValueError(f"{path} belongs to a model patched otherwise: {reason}.")

    def trainer_callback(self) -> SideFileCallback:
        """For HF Trainer: what a Trainer's own saving and loading cannot know.

        At the start it raises OSError if ``output_dir`` cannot be written; on a resumed run and for
        ``load_best_model_at_end`` it reads the checkpoint's side file, so that float32 rows over a
        bfloat16 weight and low-rank rows go on bit for bit. A checkpoint outside ``output_dir`` it
        finds only if ``TrainingArguments`` names it too (``resume_from_checkpoint``), and warns
        where it finds none.
        """
        from .trainer import SideFileCallback  # transformers' Trainer takes seconds to import

        return SideFileCallback(self)

    def named_layers(self) -> list[tuple[str, LoKILinear]]:
        """(name in the model, layer) of every patched layer."""
        return [(down_proj.name, layer) for down_proj, layer in self._layers]

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._active:
            self.unpatch()

    def _restore(self, *, trained: bool) -> nn.Module:
        if not self._active:
            raise RuntimeError("this model is no longer patched.")
        if any(is_sharded(layer.weight) for _, layer in self._layers):
            raise RuntimeError(
                "the model's weights are sharded; save the checkpoint (model.state_dict() holds "
                "the trained rows) and load it into a whole model."
            )
        for down_proj, layer in self._layers:
            linear = down_proj.module
            if trained:
                layer.weight.data.index_copy_(0, layer.index, layer.merged_rows())
            else:
                layer.reset_rows()
            # .to() and load_state_dict(assign=True) may have replaced the parameter objects
            linear.weight = layer.weight
            linear.bias = layer.bias
            linear.train(layer.training)
            setattr(down_proj.parent, down_proj.attribute, linear)
        for owner, attribute, mlp in self._mlps:
            mlp.training = getattr(owner, attribute).training
            setattr(owner, attribute, mlp)
        for parameter, flag in self._required:
            parameter.requires_grad_(flag)
        for hook in self._hooks:
            hook.remove()
        if self._saver is not None:
            self._saver.detach()
        ours = {f"{down_proj.name}.index" for down_proj, _ in self._layers}
        ignored = [n for n in self.model._ddp_params_and_buffers_to_ignore if n not in ours]
        if ignored:
            self.model._ddp_params_and_buffers_to_ignore = ignored
        else:
            del self.model._ddp_params_and_buffers_to_ignore
        self._active = False
        return self.model


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

    Every ``down_proj`` of this instance becomes a `LoKILinear` and every other parameter is frozen.
    Train with any trainer; ``state_dict`` and ``save_pretrained`` give an ordinary checkpoint.

    Args:
        model: a transformers causal language model.
        rows: a `RowSelection`, one list of rows a layer, or the path of a position file. None
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
            position file. The model is unchanged.
        UnsupportedModelError: if the model has no FFN down-projections, or not plain ones.
    """
    structure = find_structure(model)
    _check_patchable(structure)
    if rows is None:
        rows_per_layer(quota, structure.hidden_size)  # a bad quota fails before the analysis
        selection = select(cached_attribution(model, structure, tokenizer), quota)
    else:
        selection = _as_selection(rows)
    check_fits(selection, structure)
    gatings: dict[str, Gating | str] = {}
    if fuse_mlp:
        gatings = {d.name: _gating(d, rank) for d in structure.down_projs}

    causal_lm = structure.causal_lm
    names = {id(module): name for name, module in causal_lm.named_modules()}
    layers: list[tuple[DownProjection, LoKILinear]] = []
    skipped: dict[str, str] = {}
    required = [(parameter, parameter.requires_grad) for parameter in causal_lm.parameters()]
    total = sum(math.prod(full_shape(parameter)) for parameter, _ in required)
    try:
        for down_proj, index in zip(structure.down_projs, selection, strict=True):
            if len(index) == 0:
                skipped[names[id(down_proj.module)]] = "no row of this layer is selected"
                continue
            layers.append((down_proj, LoKILinear.from_linear(down_proj.module, index, rank, dtype)))
    except BaseException:
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        raise
    for parameter, _ in required:
        parameter.requires_grad_(False)
    for down_proj, layer in layers:
        setattr(down_proj.parent, down_proj.attribute, layer)
    fused, not_fused, mlps = _fuse(causal_lm, layers, gatings, names)
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
    handle._saver = _SavePretrained.attach(causal_lm, handle.named_layers())
    # The same in every process; else DDP would write it anew at each step, under pending backwards.
    causal_lm._ddp_params_and_buffers_to_ignore = [
        *getattr(causal_lm, "_ddp_params_and_buffers_to_ignore", []),
        *(f"{down_proj.name}.index" for down_proj, _ in layers),
    ]
    logger.info("%s", report)
    return handle


def _gating(down_proj: DownProjection, rank: int | None) -> Gating | str:
    if rank is not None:
        return "low-rank rows need the product itself"
    if is_sharded(down_proj.module.weight):  # type: ignore[arg-type]
        return "its weights are sharded"
    return find_gating(down_proj)


def _fuse(
    causal_lm: nn.Module,
    layers: Sequence[tuple[DownProjection, LoKILinear]],
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
    layers: list[LoKILinear]

    def attach(self, decoder: nn.Module) -> list[RemovableHandle]:
        if not self.layers:
            return []
        return [
            decoder.register_forward_pre_hook(self.before),
            decoder.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, _decoder: nn.Module, _inputs: Any) -> None:
        if torch.compiler.is_compiling():  # there the weight is not written
            return
        sharded = shards_its_weights(self.model)
        if not sharded:
            write_rows(self.layers)
        for layer in self.layers:
            layer.sharded = sharded
            layer.in_step = not sharded

    def after(self, _decoder: nn.Module, _inputs: Any, _output: Any) -> None:
        if not torch.compiler.is_compiling():
            for layer in self.layers:
                layer.in_step = False


def _as_selection(rows: Rows) -> RowSelection:
    if isinstance(rows, RowSelection):
        return rows
    if isinstance(rows, (str, os.PathLike)):
        return RowSelection.load(rows)
    return RowSelection(rows)


def _check_patchable(structure: Structure) -> None:
    if any(isinstance(module, LoKILinear) for module in structure.causal_lm.modules()):
        raise ValueError(
            "the model is already patched; call unpatch() or merge() on its Patch handle first."
        )
    for down_proj in structure.down_projs:
        if not is_plain_linear(down_proj.module):
            weight = getattr(down_proj.module, "weight", None)
            raise UnsupportedModelError(
                f"{down_proj.name} is a {type(down_proj.module).__name__} with a "
                f"{type(weight).__name__}, not a plain nn.Linear; patch the model before PEFT "
                "wraps it, and train rows over a quantized base with loki_kernels.peft.LokiConfig."
            )
        if isinstance(down_proj.module.weight, DTensor):
            raise UnsupportedModelError(
                f"the weight of {down_proj.name} is sharded; patch the model before fully_shard."
            )
        if down_proj.module.weight.is_meta:
            raise UnsupportedModelError(
                f"the weight of {down_proj.name} is not in memory (offloaded, or on the meta "
                "device); load the model without offloading."
            )


def check_fits(selection: RowSelection, structure: Structure) -> None:
    """Raise ValueError if a selection was made for another model or site."""
    if selection.info.get("site", "down_proj") != "down_proj":
        raise ValueError(
            "the selection names FFN neurons (site='ffn_neurons'), which are columns of "
            "down_proj.weight; only rows (site='down_proj') can be trained so far."
        )
    if len(selection) != len(structure.layers):
        raise ValueError(
            f"the selection has {len(selection)} layers, the model {len(structure.layers)}."
        )
    if selection.info.get("width", structure.hidden_size) != structure.hidden_size:
        raise ValueError(
            f"the selection was made for hidden_size {selection.info['width']}; the model has "
            f"{structure.hidden_size}."
        )
    for layer, rows in enumerate(selection):
        if len(rows) and int(rows[-1]) >= structure.hidden_size:
            raise ValueError(
                f"row {int(rows[-1])} of layer {layer} is out of range: the model's hidden_size "
                f"is {structure.hidden_size}."
            )


@dataclass(eq=False)
class _SavePretrained:
    """An instance's ``save_pretrained``, for what the class's own cannot know.

    It writes a side file where a merged checkpoint cannot hold the trained rows, and merges a state
    dict that an engine collected parameter by parameter (ZeRO-3). It lies in the model's
    ``__dict__`` and is copied and pickled with it.
    """

    model: nn.Module
    layers: list[tuple[str, LoKILinear]]

    @classmethod
    def attach(
        cls, model: nn.Module, layers: list[tuple[str, LoKILinear]]
    ) -> _SavePretrained | None:
        if not hasattr(type(model), "save_pretrained"):
            return None
        model.__dict__["save_pretrained"] = saver = cls(model, layers)
        return saver

    def detach(self) -> None:
        del self.model.__dict__["save_pretrained"]

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        parts = {name: adapter_file.parts_of(layer) for name, layer in self.layers}
        if state_dict is not None:
            state_dict = _merge_trained(state_dict, parts)
        needs_side_file = any(layer.needs_side_file for _, layer in self.layers)
        is_main_process = kwargs.get("is_main_process", True)
        needed = needs_side_file and is_main_process
        # what FSDP shards is gathered when every process makes the state dict
        gathered = state_dict is not None or not any(is_sharded(x.weight) for _, x in self.layers)
        if needed and gathered:  # before the class's own, which may upload the folder
            self._write_side_file(save_directory, parts)
        elif not needs_side_file and is_main_process:  # an earlier run's would be read for ours
            (Path(save_directory) / SIDE_FILE).unlink(missing_ok=True)
        save = type(self.model).save_pretrained
        result = save(self.model, save_directory, *args, state_dict=state_dict, **kwargs)  # type: ignore[operator]
        if needed and not gathered:
            self._write_side_file(save_directory, parts)
        return result

    def _write_side_file(self, folder: str | os.PathLike[str], parts: dict[str, Parts]) -> None:
        for name, layer in self.layers:
            parts[name] |= layer.gathered or {}
        Path(folder).mkdir(parents=True, exist_ok=True)
        adapter_file.write_side_file(folder, self.layers, parts)


def _merge_trained(state_dict: dict[str, Tensor], parts: dict[str, Parts]) -> dict[str, Tensor]:
    """Move trained parameters that a state dict may hold into its weights, and into ``parts``."""
    merged = dict(state_dict)
    for name, own in parts.items():
        found = {p: merged.pop(f"{name}.{p}") for p in TRAINED if f"{name}.{p}" in merged}
        if not found:
            continue
        own |= found
        weight = merged[f"{name}.weight"]
        index = own["index"].to(weight.device)
        if "rows" in found:
            rows = found["rows"]
        else:
            rows = low_rank_rows(weight[index], found["delta_a"], found["delta_b"])
        merged[f"{name}.weight"] = weight.index_copy(0, index, rows.to(weight))
    return merged


@contextlib.contextmanager
def suppress(
    model: nn.Module,
    rows: Rows,
) -> Iterator[nn.Module]:
    """Zero rows of every down-projection inside the block (the paper's ablation, Table 5a).

    A row's bias is zeroed too, so that its node is silent. The weights come back bit for bit.

    Raises:
        ValueError: for rows that do not fit the model.
        UnsupportedModelError: if its down-projections are not plain linears.
    """
    structure = find_structure(model)
    _check_patchable(structure)
    selection = _as_selection(rows)
    check_fits(selection, structure)
    saved: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for down_proj, layer_rows in zip(structure.down_projs, selection, strict=True):
            for parameter in (down_proj.module.weight, down_proj.module.bias):
                if parameter is None:
                    continue
                index = layer_rows.to(parameter.device)
                saved.append((parameter.data, index, parameter.data[index].clone()))
                parameter.data.index_fill_(0, index, 0)
        yield model
    finally:
        for data, index, values in saved:
            data.index_copy_(0, index, values)
