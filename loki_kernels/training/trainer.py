"""A callback for HF Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import check_folder
from ..sharding import full_shape
from .adapter_file import SIDE_FILE, Layers, SavedUpdate, load_side_file, read_update, update_of
from .linear import same_rows, updated_rows


class SideFileCallback(TrainerCallback):
    """What `Patch.trainer_callback` gives."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert args.output_dir is not None  # TrainingArguments fills it in
        if args.should_save:
            check_folder(args.output_dir)
        if state.global_step:
            folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
            if isinstance(args.resume_from_checkpoint, str):
                folders.insert(0, Path(args.resume_from_checkpoint))
            self._load_side_file(folders)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_side_file([Path(state.best_model_checkpoint)])

    def _load_side_file(self, folders: list[Path]) -> None:
        """Read the update of the merged weights that the Trainer has just loaded.

        Where a state dict held it already (FSDP, DeepSpeed) there is nothing to do.
        """
        if not any(layer.merged_alone is not None for layer in self.layers.values()):
            return
        for folder in folders:
            path = folder / SIDE_FILE
            if not path.is_file():
                continue
            saved = read_update(path)
            if _is_of_these_weights(saved, self.layers):
                load_side_file(self.layers, path, saved)
                return
        raise RuntimeError(
            f"no {SIDE_FILE} of the checkpoint's weights was found in "
            f"{' or '.join(map(str, folders))}, so training cannot go on from its update. A "
            "checkpoint elsewhere is found by TrainingArguments(resume_from_checkpoint=...)."
        )


def _is_of_these_weights(saved: SavedUpdate, layers: Layers) -> bool:
    """Whether the update gives the merged rows that the layers were just loaded with."""
    for name, layer in layers.items():
        base = layer.base_rows.cpu()
        parts = update_of(saved.layers.get(name, {}), base)
        factors = [parts.get(part) for part, _ in layer.trained_parameters()]
        if any(
            factor is None or tuple(factor.shape) != full_shape(p)
            for factor, (_, p) in zip(factors, layer.trained_parameters(), strict=True)
        ):
            return False
        rows = layer.merged_rows().cpu() if layer.merged_alone is None else layer.merged_alone
        if not same_rows(updated_rows(base, *(f for f in factors if f is not None)), rows):
            return False
    return True
