"""`Patch`: the handle on a patched model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import explained
from ..protection import Protection, fingerprint_of
from ..selection import RowSelection
from ..sharding import (
    full_values,
    is_partitioned,
    is_sharded,
    reshard,
    shard_like,
    writable,
)
from ..structure import plain_name
from . import adapter_file
from .adapter_file import Layers, SavedUpdate
from .arithmetic import tell_autograd
from .loading import check_known
from .report import Report
from .rows import TRAINED, LokiRows, write_rows
from .targets import parameters_of, why_other_modules
from .writer import RowWriter

if TYPE_CHECKING:
    from .trainer import SideFileCallback


@dataclass(eq=False)
class Patch:
    """Handle on a patched model; as a context manager it unpatches at the end.

    Attributes:
        model: the model that was patched.
        rows: the selection it trains.
        report: what was patched and what was not.
        protection: what the update is protected with, or None. It is saved beside checkpoints, and
            by ``handle.protection.save(FILE)`` where another run is to have the same.
    """

    model: nn.Module
    rows: RowSelection
    report: Report
    protection: Protection | None
    _layers: dict[str, LokiRows] = field(repr=False)
    _writer: RowWriter = field(repr=False)
    _undo: ExitStack = field(repr=False)  # puts everything back but the rows
    # Names of parameters that were read from a file, and what they were.
    _replaced: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def merge(self) -> nn.Module:
        """Put the model's own modules back, the trained rows in their weights; return the model.

        An adapter of a further task names no base until the model is saved and has its folder's
        name (``model.name_or_path = folder``).

        Raises:
            RuntimeError: if the model was already merged or unpatched, its weights are sharded, or
                weights were loaded whose update is another one. Nothing is changed then.
        """
        model = self._restore(trained=True)
        model.__dict__[adapter_file.MERGED] = getattr(model, "name_or_path", None)
        return model

    def unpatch(self) -> nn.Module:
        """Put the original model back, bit for bit, and return it.

        Modules that were trained whole stay as they are, unless they were read from a file.

        Raises:
            RuntimeError: if the model was already merged or unpatched, or its weights are sharded.
        """
        return self._restore(trained=False)

    def load_state(self, folder: str | os.PathLike[str]) -> None:
        """Read back what ``save_pretrained`` or `save_adapter` wrote.

        It is an update of the model that was patched first: patch that one, not the checkpoint
        beside the file, which already holds the update.

        Raises:
            FileNotFoundError: if the folder has neither, or there is none.
            ValueError: if it is damaged, has both, belongs to another selection or protection, is
                an update of other weights, or has other modules beside the rows; nothing is changed
                then.
            RuntimeError: under ZeRO-3, whose own checkpoints hold the rows.
        """
        self._check_active()
        if any(is_partitioned(layer.frozen) for layer in self._layers.values()):
            raise RuntimeError("DeepSpeed reads the trained rows from its own checkpoints.")
        self._load_side_file(Path(folder), adapter_file.read_saved(folder))

    def trainer_callback(self) -> SideFileCallback:
        """For HF Trainer: what a Trainer's own saving and loading cannot know.

        At the start it raises OSError if ``output_dir`` cannot be written; on a resumed run and for
        ``load_best_model_at_end`` it reads the update beside the checkpoint's merged weights, so
        that training goes on bit for bit (of a protected update, but for the rounding of what its
        directions hold). A checkpoint outside ``output_dir`` it finds only if
        ``TrainingArguments`` names it too (``resume_from_checkpoint``). Without it, resuming raises
        RuntimeError, unless the model was patched with ``rows=<that checkpoint's folder>``, which
        is no way to resume where TRL is to ``precompute_ref_log_probs``: it would take the trained
        model for the reference. Uploads of checkpoints hold the update too. The rows are written
        once for all micro-batches of a step, and once for an evaluation, and not at every forward
        pass. A trainer of TRL that would send the parameters to vLLM (``use_vllm``) or to its
        reference or teacher (``sync_ref_model``, ``teacher_model_kind="ema"``), or round the update
        (``use_transformers_continuous_batching`` with ``bf16``), raises RuntimeError when it is
        made, or when it trains if it is given the callback later.
        """
        from .trainer import SideFileCallback  # transformers' Trainer takes seconds to import

        self._check_active()
        return SideFileCallback(self._load_side_file, self._writer)

    def inference(self) -> AbstractContextManager[None]:
        """A context in which the rows are written once, not at every forward pass.

        What runs are the merged weights, as they are saved, in the model's dtype. For a loop of
        your own that generates, a token a pass; ``model.generate`` enters it by itself. What
        changes the update alone inside (an optimizer, `load_state`) is not seen; a state dict that
        is loaded acts, since it has merged weights; a training step raises RuntimeError.
        """
        self._check_active()
        return self._writer.hold()

    def merged_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the base architecture's parameters, the trained rows merged into them.

        For an inference server that is sent weights while the model trains: ``named_parameters``
        names the update beside weights that lack the last step. Sharded weights come whole, for
        which every process has to iterate. The tensors may be the model's own; copy what is to
        outlive the next step.

        Raises:
            RuntimeError: if the model was already merged or unpatched, or weights were loaded whose
                update is another one.
        """
        self._check_active()
        check_known(self._layers.values())
        return _merged_parameters(self.model, self._layers)

    def named_layers(self) -> list[tuple[str, LokiRows]]:
        """(name in the model, layer) of every patched layer."""
        return list(self._layers.items())

    def _load(self, saved: SavedUpdate) -> str | None:
        """Load rows and what was trained whole beside them; else change nothing and say why not."""
        reshard(self.model)
        reason = why_other_modules(self.model, saved.others)
        reason = reason or adapter_file.load_update(self._layers, saved)
        if reason is None:
            parameters = parameters_of(self.model)
            for name, values in saved.others.items():
                parameter = parameters[name]
                # what ZeRO-3 has split is never put back
                known = any(parameters[n] is parameter for n in self._replaced)
                if not known and not is_partitioned(parameter):
                    self._replaced[name] = parameter.detach().cpu().clone()
                with torch.no_grad(), writable(parameter):
                    parameter.copy_(shard_like(values.to(parameter.dtype), parameter))
        return reason

    def _load_side_file(self, path: Path, saved: SavedUpdate) -> None:
        """Load what was read from ``path``.

        Raises:
            ValueError: if it is of other rows, another base or protection; nothing is changed then.
        """
        present, beside = fingerprint_of(self.protection), saved.protection_file
        reason = adapter_file.why_other_protection(saved.protection, present)
        if reason is not None and saved.protection is not None and os.path.isfile(beside):
            reason += f", which is {beside}"
        reason = reason or self._load(saved)
        if reason is not None:
            raise explained(ValueError(f"{path} belongs to a model patched otherwise: {reason}."))

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        """A handle that undoes nothing, with a copy of the model, which stays patched.

        What this one would undo is of this model. Averages copy what holds it, a LightningModule.
        """
        model, writer = copy.deepcopy((self.model, self._writer), memo)
        return Patch(model, self.rows, self.report, self.protection, {}, writer, ExitStack())

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._layers:
            self.unpatch()

    def _check_active(self) -> None:
        if not self._layers:
            raise RuntimeError(
                "this model is no longer patched, or this is a copy of its handle; of a copied "
                "model loki_kernels.save_adapter(model, FOLDER) keeps the update."
            )

    def _restore(self, *, trained: bool) -> nn.Module:
        self._check_active()
        if self._writer.held:
            raise RuntimeError("the model is inside handle.inference(); leave it first.")
        reshard(self.model)
        if any(is_sharded(layer.frozen) for layer in self._layers.values()):
            raise RuntimeError(
                "the model's weights are sharded; save the checkpoint (model.state_dict() holds "
                "the trained rows) and load it into a whole model."
            )
        if trained:
            check_known(self._layers.values())
        # else what a forward pass has read is there still
        moved = [layer.frozen for layer in self._layers.values() if layer.written != trained]
        if trained:
            write_rows(self._layers.values())
        else:
            for layer in self._layers.values():
                layer.write_base()
        for weight in moved:
            tell_autograd(weight)
        self._leave(trained=trained)
        return self.model

    def _leave(self, *, trained: bool) -> None:
        """Put the model's own modules back, whose weights hold what they are to hold."""
        try:
            if not trained:
                parameters = parameters_of(self.model)
                with torch.no_grad():
                    for name, values in self._replaced.items():
                        parameters[name].copy_(values)
        finally:  # of embeddings that were resized since, the values do not fit
            self._undo.close()
            # the handle or its callback may live on, and would keep what was trained: 12 GB at 8B
            for held in (self._layers, self._writer.forwards, self._replaced):
                held.clear()


def _merged_parameters(model: nn.Module, layers: Layers) -> Iterator[tuple[str, Tensor]]:
    """What `Patch.merged_parameters` gives, which raises when it is called and not when read."""
    updates = {f"{name}.{part}" for name in layers for part in TRAINED}
    merged = {f"{name}.{layer.parameter}": layer for name, layer in layers.items()}
    reshard(model)
    for wrapped, parameter in model.named_parameters():
        name = plain_name(wrapped)
        if name in merged:
            yield name, full_values(merged[name].merged_weight())
        elif name not in updates:
            yield name, full_values(parameter)
