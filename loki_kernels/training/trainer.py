"""A callback for HF Trainer."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import explained
from ..files import atomic_path, check_folder
from .adapter_file import (
    PROTECTION_FILE,
    SIDE_FILE,
    Layers,
    SavedUpdate,
    protection_of,
    read_update,
    refuse_adapter,
    write_protection_of,
)
from .arithmetic import same_rows, updated_rows
from .targets import refuse_efficient_loading
from .writer import RowWriter

logger = logging.getLogger(__name__)


class SideFileCallback(TrainerCallback):
    """What `Patch.trainer_callback` gives."""

    def __init__(self, load: Callable[[Path, SavedUpdate], None], writer: RowWriter) -> None:
        self.load, self.writer, self.layers = load, writer, writer.named_layers

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        _check_arguments(args)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        _check_arguments(args)  # a callback that was added later has seen no start
        self.writer.in_training = False  # that was another training's
        if model is not None and self.layers:
            modules = set(map(id, model.modules()))
            if not any(id(layer) in modules for layer in self.layers.values()):
                raise RuntimeError(
                    "this callback serves another model than the one that trains: with model_init "
                    "the trainer makes a new one for every train(). Make a trainer for each model, "
                    "or leave the callback out, without which nothing is resumed and no best model "
                    "loaded at the end."
                )
        assert args.output_dir is not None  # TrainingArguments fills it in
        if args.should_save:
            check_folder(args.output_dir)
            _heed_adapter(args)
        if state.global_step:
            folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
            if isinstance(args.resume_from_checkpoint, str):
                folders.insert(0, Path(args.resume_from_checkpoint))
            if self.layers and protection_of(self.layers) is None:
                _check_unprotected(folders[0])
            self._load_side_file(folders)

    def on_substep_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """A micro-batch that no optimizer's step follows; LOMO's is made in its backward pass."""
        if "lomo" not in args.optim:
            self.writer.keep_rows()

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self.writer.keep_rows()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.writer.forget_rows()
        self.writer.take_back_rows()

    def _write_rows(self, *_: Any, **__: Any) -> None:
        self.writer.forget_rows()

    # where a callback of another's may have put other values in place, such as an average's
    on_step_end = on_evaluate = on_predict = _write_rows

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Keep the protection in a checkpoint that was written without save_pretrained.

        A sharded one (`SHARDED_STATE_DICT`, ZeRO-3's own) can only go on with the same.
        """
        assert args.output_dir is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        beside = (folder / SIDE_FILE).is_file()  # what save_pretrained wrote has it
        if args.should_save and self.layers and folder.is_dir() and not beside:
            write_protection_of(self.layers, folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_side_file([Path(state.best_model_checkpoint)])

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Put the update where the Trainer copies a checkpoint's weights to, to upload them."""
        assert args.output_dir is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in (folder / SIDE_FILE, folder / PROTECTION_FILE):
            if args.should_save and path.is_file():
                with atomic_path(Path(args.output_dir) / path.name) as temporary:
                    shutil.copy(path, temporary)

    def _load_side_file(self, folders: list[Path]) -> None:
        """Read the update of the merged weights that the Trainer has just loaded.

        Where a state dict held it already (FSDP, DeepSpeed) there is nothing to do.
        """
        if not any(x.loaded_alone or x.passed_over for x in self.layers.values()):
            return
        for folder in folders:
            path = folder / SIDE_FILE
            if not path.is_file():
                continue
            saved = read_update(path)
            if _is_of_these_weights(saved, self.layers):
                self.load(path, saved)
                return
        raise RuntimeError(
            f"no {SIDE_FILE} of the checkpoint's weights was found in "
            f"{' or '.join(map(str, folders))}, so training cannot go on from its update. A "
            "checkpoint elsewhere is found by TrainingArguments(resume_from_checkpoint=...)."
        )


def _check_arguments(args: TrainingArguments) -> None:
    """Raise RuntimeError for what a patched model cannot be trained with."""
    refuse_efficient_loading()  # the arguments may be younger than the patch
    if getattr(args, "use_vllm", False):
        raise RuntimeError(
            "with use_vllm the trainer sends named_parameters() to vLLM, which are not the "
            "trained weights of a patched model. Give it the unpatched model and "
            "peft_config=loki_kernels.peft.LokiConfig(rows=...), which it merges first; a loop "
            "of your own sends handle.merged_parameters()."
        )
    batches = getattr(args, "use_transformers_continuous_batching", False)
    if batches and (args.bf16 or args.fp16):
        raise RuntimeError(
            "with use_transformers_continuous_batching and bf16 or fp16 the trainer makes the "
            "model, and the update of rows with it, 16 bits before every generation, in which "
            "an optimizer's small steps are rounded away. Train with bf16=False and fp16=False "
            "(a model that was loaded in bfloat16 stays so), or without continuous batching."
        )
    averages = {"sync_ref_model": True, "teacher_model_kind": "ema"}  # the latter SDPO's and SDFT's
    for name, value in averages.items():
        if getattr(args, name, None) == value:
            raise RuntimeError(
                f"{name}={value!r} copies parameters one by one, and the other model has no "
                f"updates of rows; train with another {name}."
            )


def _heed_adapter(args: TrainingArguments) -> None:
    """Raise ValueError if an upload, or the only save of a run without checkpoints, would end at
    an adapter in ``output_dir`` when all is trained.

    Checkpoints lie in folders of their own, so that `save_model` may never be called.
    """
    try:
        refuse_adapter(args.output_dir or "")
    except ValueError as error:
        if args.push_to_hub or args.save_strategy == "no":
            raise
        logger.warning("trainer.save_model() will be refused: %s", error)


def _check_unprotected(folder: Path) -> None:
    """Raise ValueError if a checkpoint was trained with a protection.

    A sharded one does not tell: what is not in the model's own state dict is not read from it.
    """
    if (folder / PROTECTION_FILE).is_file():
        raise explained(
            ValueError(
                f"{folder} belongs to a model patched otherwise: it was trained with a protection; "
                f"patch with protect={str(folder / PROTECTION_FILE)!r}."
            )
        )


def _is_of_these_weights(saved: SavedUpdate, layers: Layers) -> bool:
    """Whether the update gives the merged rows that the layers were just loaded with."""
    was = None if saved.trained_on is None else getattr(torch, saved.trained_on.dtype, None)
    dtype = was if isinstance(was, torch.dtype) else torch.float32
    for name, layer in layers.items():
        base = layer.base_rows
        parts = saved.layers.get(name, {})
        if not layer.is_like(parts):
            return False
        if layer.passed_over and layer.merged_alone is None:  # other layers tell
            continue
        rows = layer.merged_rows() if layer.merged_alone is None else layer.merged_alone
        # Where the rows were made: another device's products are others, above all in TF32.
        factors = (parts[part].to(base.device) for part, _ in layer.trained_parameters())
        want = updated_rows(base, *factors)
        if not same_rows(want, rows, dtype=dtype):
            return False
    return True
