"""A callback for HF Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .adapter_file import SIDE_FILE
from .files import check_folder
from .patching import Patch

logger = logging.getLogger(__name__)


class SideFileCallback(TrainerCallback):
    """What `Patch.trainer_callback` gives."""

    def __init__(self, handle: Patch) -> None:
        self.handle = handle

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        check_folder(args.output_dir)
        if state.global_step:
            self._load(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._load(Path(state.best_model_checkpoint))

    def _load(self, checkpoint: Path) -> None:
        if not any(layer.needs_side_file for _, layer in self.handle.named_layers()):
            return
        if (checkpoint / SIDE_FILE).is_file():
            self.handle.load_state(checkpoint)
        else:
            logger.warning(
                "%s has no %s: the rows go on as its weights hold them", checkpoint, SIDE_FILE
            )
