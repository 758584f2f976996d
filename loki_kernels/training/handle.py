"""`Patch`: the handle on a patched model, and the report of what was done to it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..selection import RowSelection
from ..sharding import is_sharded
from ..structure import DownProjection
from .checkpoint import SavePretrained, load_state, save_state
from .linear import LokiLinear

if TYPE_CHECKING:
    from .trainer import SideFileCallback


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
    _layers: list[tuple[DownProjection, LokiLinear]] = field(repr=False)
    _required: list[tuple[nn.Parameter, bool]] = field(repr=False)
    _mlps: list[tuple[nn.Module, str, nn.Module]] = field(repr=False)  # owner, attribute, original
    _hooks: list[RemovableHandle] = field(repr=False)
    _saver: SavePretrained | None = field(default=None, repr=False)
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
        return save_state(self.named_layers(), folder)

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
        load_state(self.named_layers(), folder)

    def trainer_callback(self) -> SideFileCallback:
        """For HF Trainer: what a Trainer's own saving and loading cannot know.

        At the start it raises OSError if ``output_dir`` cannot be written; on a resumed run and for
        ``load_best_model_at_end`` it reads the checkpoint's side file, so that float32 rows over a
        bfloat16 weight and low-rank rows go on bit for bit. A checkpoint outside ``output_dir`` it
        finds only if ``TrainingArguments`` names it too (``resume_from_checkpoint``), and warns
        where it finds none.
        """
        from .trainer import SideFileCallback  # transformers' Trainer takes seconds to import

        return SideFileCallback(self.named_layers())

    def named_layers(self) -> list[tuple[str, LokiLinear]]:
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
