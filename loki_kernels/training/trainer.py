"""A callback for HF Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import check_folder
from ..sharding import is_partitioned
from .adapter_file import SIDE_FILE, Layers, SavedRows, read_rows
from .linear import low_rank_rows

logger = logging.getLogger(__name__)


class SideFileCallback(TrainerCallback):
    """What `Patch.trainer_callback` gives."""

    def __init__(self, layers: Layers, load_state: Callable[[Path], None]) -> None:
        self.layers = layers
        self.load_state = load_state

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
        layers = self.layers
        if not any(layer.needs_side_file for layer in layers.values()):
            return
        if any(is_partitioned(layer.weight) for layer in layers.values()):
            return  # DeepSpeed has its own files
        for folder in folders:
            path = folder / SIDE_FILE
            if path.is_file() and _agree_but_for_rounding(read_rows(path), layers):
                self.load_state(folder)
                return
        logger.warning(
            "no %s of the checkpoint was found in %s: the rows go on as its weights hold them "
            "(a checkpoint elsewhere is found by TrainingArguments(resume_from_checkpoint=...))",
            SIDE_FILE,
            " or ".join(map(str, folders)),
        )


def _agree_but_for_rounding(saved: SavedRows, layers: Layers) -> bool:
    """Whether the layers hold what was saved, but for rounding: the Trainer has just read that."""
    for name, layer in layers.items():
        parts, held = saved.layers.get(name, {}), layer.merged_rows().float().cpu()
        if "rows" in parts:
            rows, tolerance = parts["rows"].to(layer.weight.dtype).float(), 0.0
        elif "delta_a" in parts:  # what was read back has been factored anew
            original = layer.original_rows.float()
            if (len(parts["delta_a"]), parts["delta_b"].shape[1]) != original.shape:
                return False
            rows = low_rank_rows(original, parts["delta_a"], parts["delta_b"])
            rounding = torch.finfo(layer.weight.dtype).eps * float(original.norm())
            tolerance = 0.06 * float((rows - original).norm()) + rounding
        else:
            return False
        if rows.shape != held.shape or float((rows - held).norm()) > tolerance:
            return False
    return True
