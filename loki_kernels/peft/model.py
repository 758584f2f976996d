"""`LokiModel`: what ``get_peft_model`` puts around a causal language model for a `LokiConfig`."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import TaskType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn

from ..discovery import find_structure
from ..errors import explained
from ..fingerprint import BaseRows
from ..memory import warn_of_memory
from ..protection import Protection, fingerprint_of, warn_of_another_model
from ..protection.estimate import find_cached
from ..sharding import ignore_in_ddp, is_distributed, is_first, shards_its_weights
from ..structure import Structure, refuse_tensor_parallelism
from ..training.adapter_file import (
    PROTECTION_FILE,
    base_rows_content,
    base_rows_of,
    check_base,
)
from ..training.agreement import check_processes_agree
from ..training.arithmetic import coarse_dtype
from ..training.targets import (
    as_selection,
    assign_rows,
    find_modules,
    new_heads,
    protection_to_keep,
    refuse_efficient_loading,
    refuse_patched,
    selection_to_train,
    what_to_train,
)
from .beside import drop_modules, turn_on_modules
from .config import LokiConfig
from .layer import (
    LokiLayer,
    held_directions,
    refuse_other_modules,
    refuse_parts,
)
from .loading import check_loading, forget_loading
from .quantized import dequantize_model, refuse_other_products

logger = logging.getLogger(__name__)

_HEADS: dict[Any, list[str]] = {
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}


class LokiModel(BaseTuner):
    """What ``get_peft_model`` puts around a causal language model for a `LokiConfig`."""

    prefix = "loki_"
    tuner_layer_cls = LokiLayer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._agreed: set[str] = set()  # adapters that are the same in every process
        self._warned = False
        self._holders = 0
        super().__init__(*args, **kwargs)
        self.register_forward_pre_hook(_check_training)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, with protected updates formed once and not at every token.

        At 8B forming those of all rows takes 7.7 TFLOP, 500 times what a token does; formed in
        bfloat16 they take 3.8 GB until it is done.
        """
        with self._loki_hold():
            return self.model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Likewise, unless its CUDA graphs are kept, which would read what is dropped here."""
        with contextlib.nullcontext() if kwargs.get("persistent_manager") else self._loki_hold():
            return self.model.generate_batch(*args, **kwargs)

    @contextlib.contextmanager
    def _loki_hold(self) -> Iterator[None]:
        """Protected updates are formed once for all passes without gradients inside."""
        # of sharded updates the whole of all layers would lie in every process
        layers = [] if shards_its_weights(self.model) else self._loki_layers()
        self._holders += 1  # one may generate inside another, or two threads at once
        try:
            for layer in layers:
                layer.formed = {} if layer.formed is None else layer.formed
            yield
        finally:
            self._holders -= 1
            for layer in () if self._holders else layers:
                layer.formed = None

    # override: PEFT declares wider arguments than it passes, and None where it returns the model.

    def _prepare_adapter_config(  # type: ignore[override]
        self, peft_config: LokiConfig, model_config: dict[str, Any]
    ) -> LokiConfig:
        if any(layer.merged for layer in self._loki_layers()):
            raise ValueError("an adapter is merged; call unmerge_adapter() before adding another.")
        # What is filled in belongs to this model; the caller may want the config for another. The
        # adapter that is being added is the last; TRL gives it the first one's own config, for a
        # frozen copy of that one, whose parameters it fills in by LoRA's kind of names alone.
        *same, name = (name for name, config in self.peft_config.items() if config is peft_config)
        self._copied = same[0] if same else None
        self.peft_config[name] = peft_config = copy.copy(peft_config)
        # PEFT lets a model be given an adapter of that name twice: the second replaces the first,
        # once nothing can be refused any more.
        first = [layer for layer in self._loki_layers() if name in layer.rows]
        try:
            self._fill_in(peft_config, name)
        except BaseException:
            if first:  # of all models around a base PEFT has one dict of configs
                self.peft_config[name] = first[0].configs[name]
            raise
        for layer in first:
            # or PEFT would have another adapter's update trained instead
            layer._active_adapter = [active for active in layer.active_adapters if active != name]
            layer.delete_adapter(name)
        if first:  # what another method's adapter of that name trains is its own
            drop_modules(self.model, name)
        check_loading(self.model)
        return peft_config

    def _fill_in(self, peft_config: LokiConfig, name: str) -> None:
        """Into the config what is left to this model, and what will be added; all that can fail."""
        peft_config.fetch()
        # Of these PEFT names the heads in the config that it was given, once this has been made.
        heads = _HEADS.get(peft_config.task_type, [])
        if heads:
            peft_config.modules_to_save = [*(peft_config.modules_to_save or []), *heads]
        quota, protect = what_to_train(
            peft_config.rows, peft_config.quota, peft_config.criterion, None, peft_config.protect
        )
        peft_config.quota = quota if peft_config.rows is None else peft_config.quota
        peft_config.protect = cast("str | bool | None", protect)
        if protect and not peft_config.inference_mode:
            refuse_parts(self.model)
        structure = find_structure(self.model)
        refuse_patched(self.model)
        refuse_other_modules(structure)
        refuse_tensor_parallelism(structure)
        refuse_efficient_loading()
        refuse_other_products(structure, self.model)
        _check_modules(structure, peft_config)
        wanted = None if peft_config.rows is None else as_selection(peft_config.rows)
        protected, rank = bool(protect), peft_config.rank
        warn_of_memory(structure, wanted, quota, protected=protected, rank=rank, keeps_rows=False)
        together = is_distributed() and not peft_config.inference_mode  # each may evaluate others
        if wanted is not None:  # raises before minutes of estimating
            assign_rows(structure, wanted)
        with self._base_alone():  # of which every adapter is
            kept_by_layer = self._directions(structure, peft_config)  # this before an analysis too
            selection = wanted or selection_to_train(structure, None, quota, peft_config.criterion)
        assigned = assign_rows(structure, selection)
        peft_config.rows = [layer.tolist() for layer in selection]
        names = {id(module): name for name, module in self.model.named_modules()}
        self._agreed.discard(name)
        if together:
            check_processes_agree(selection, peft_config.protection)
            self._agreed.add(name)
        # by down-projection, of the adapter that is being added: what is or will be around it, and
        # its index, dtype and protected directions
        self._added: dict[str, tuple[LokiLayer, Tensor, torch.dtype, Tensor | None]] = {}
        base_rows, quantized = [], False
        for down_proj, rows in assigned:
            if len(rows):
                module = down_proj.module
                # one of ours is there if another adapter trains rows of it
                layer = module if isinstance(module, LokiLayer) else LokiLayer(module, self.model)
                own = layer.base_rows(rows)
                dtype = torch.promote_types(own.dtype, torch.float32)
                kept = kept_by_layer.get(down_proj.name)
                if kept is not None:  # bitsandbytes gives 8-bit rows in float32
                    quantized_as = layer.quantization_backend and layer.dequantized_dtype
                    kept = kept.to(quantized_as or own.dtype)
                self._added[names[id(module)]] = layer, rows.to(own.device), dtype, kept
                base_rows.append(own)
                quantized |= layer.quantization_backend is not None
        peft_config.present = present = BaseRows.of(base_rows, quantized=quantized)
        trained_on = base_rows_of(vars(peft_config))
        check_base(
            trained_on,
            present,
            peft_config.base_model_name_or_path,
            getattr(self.model, "name_or_path", None),
        )
        if trained_on is None:
            vars(peft_config).update(base_rows_content(present))
        peft_config.target_modules = set(self._added)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **given: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **given)
        if adapter_name in self.active_adapters:
            turn_on_modules(model, adapter_name, self.peft_config[adapter_name].inference_mode)

    @contextlib.contextmanager
    def _base_alone(self) -> Iterator[None]:
        """Without the adapters that are here, and the heads and tokens that they train.

        PEFT's own way would change what is trained.
        """
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        parts = [module for module in self.model.modules() if isinstance(module, kinds)]
        before = [(part, part._disable_adapters) for part in parts]
        try:
            for part in parts:
                part._disable_adapters = True
            yield
        finally:
            for part, disabled in before:
                part._disable_adapters = disabled

    def _directions(self, structure: Structure, config: LokiConfig) -> dict[str, Tensor]:
        """What a new adapter leaves alone, by down-projection; its fingerprint into the config.

        ``protect=True`` means what the base alone says, so beside other adapters it is that of one
        which was added before them: TRL adds a second adapter by the first one's config.
        """
        if config.inference_mode:
            return {}
        held = None if self._copied is None else held_directions(structure, self._copied)
        if held is not None:
            return held
        added: dict[str, Any] = {n: c for n, c in self.peft_config.items() if c is not config}
        if config.protect is not True or not added:
            protection = _protection(structure, config)
            return {} if protection is None else protection.directions
        for name, other in added.items():
            if getattr(other, "protect", None) is not True or config.protection not in (
                None,
                other.protection,
            ):
                continue
            held = held_directions(structure, name)
            if held is not None:
                config.protection, config.kept = other.protection, other.kept
                return held
        raise ValueError(
            "protect=True estimates from the base alone, and the model has an adapter "
            f"({next(iter(added))!r}) already; name a protection's file (protect=FILE)."
        )

    def check_ranks(self) -> None:
        """Raise ValueError if another process trains other rows, or has another protection."""
        for name in self.active_adapters:
            if name not in self._agreed:
                config: Any = self.peft_config[name]  # which knows its rows by now
                check_processes_agree(as_selection(config.rows), config.protection)
                self._agreed.add(name)

    def warn_of_coarse_updates(self, layer: LokiLayer) -> None:
        """Say once that small steps are lost, where a trainer has rounded the update.

        TRL makes everything that is trained over a quantized base bfloat16.
        """
        if self._warned:
            return
        dtype = coarse_dtype(p for name, p in layer.named_parameters() if "loki_" in name)
        if dtype is not None:
            self._warned = True
            logger.warning(
                "something has made the update of rows %s, in which an optimizer's small steps are "
                "rounded away. TRL does so with continuous batching, unless bf16=False, and over "
                "bitsandbytes: there, after the trainer is made and before it trains, for name, p "
                "in model.named_parameters(): if 'loki_' in name: p.data = p.data.float()",
                dtype,
            )

    def _loki_layers(self) -> list[LokiLayer]:
        return [module for module in self.model.modules() if isinstance(module, LokiLayer)]

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: LokiConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        # taken out, as PEFT asks once for each: the directions in it are .9 GB at 8B
        layer, index, dtype, directions = self._added.pop(current_key)
        layer.update_layer(adapter_name, index, dtype, directions, peft_config)
        if self._copied is not None:
            layer.copy_update(self._copied, adapter_name)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        # DDP will see a PeftModel
        own = ("loki_index", "loki_directions", "loki_protection")
        held = [f"base_model.model.{current_key}.{buffers}" for buffers in own]
        ignore_in_ddp(self.model, [f"{name}.{adapter_name}" for name in held])

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own sets the weight anew too, which fails for embeddings with trained tokens
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Of 16 bits PEFT makes float32. Directions stay in the base's dtype: they would take twice
        # the memory, and what they leave out is formed in theirs.
        parts = [layer.loki_directions for layer in self._loki_layers()]
        kept = [(part, part.pop(adapter_name)) for part in parts if adapter_name in part]
        try:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        finally:
            for part, directions in kept:
                part[adapter_name] = directions

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("LoKI adapters cannot be mixed within a batch (adapter_names=).")
        yield

    # All layers are checked before any is changed.

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        for layer in self._loki_layers():
            layer.check_disjoint([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        for layer in self._loki_layers():
            layer.check_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        merged: dict[str, LokiConfig] = {}
        for layer in self._loki_layers() if merge else ():
            for name in (*layer.merged_adapters, *layer.check_merge(safe_merge, adapter_names)):
                merged[name] = layer.configs[name]
        dequantize = any(c.quantized_merge == "dequantize" for c in merged.values())
        model: nn.Module = super()._unload_and_optionally_merge(  # type: ignore[assignment]
            merge, progressbar, safe_merge, adapter_names
        )
        forget_loading(model)
        if dequantize:
            dequantize_model(model)
            logger.info("the merged model is no longer quantized")
        elif merged and getattr(model, "is_quantized", False):
            logger.info("the merged model is quantized as its base was")
        return model


def _protection(structure: Structure, config: LokiConfig) -> Protection | None:
    """The protection to train with, and its fingerprint put into the config."""
    if config.protect is True and config.protection is not None:
        protection = find_cached(structure)  # an estimate would not be the one that was lost
    else:
        protection = protection_to_keep(structure, config.protect, None)
        if config.protect is not True and config.protection is None:  # of an adapter that is new
            warn_of_another_model(protection, structure)
    present = fingerprint_of(protection)
    if config.protection not in (None, present):
        if protection is None:
            message = (
                "the adapter was trained with a protection; name its file (protect=), which was "
                f"saved beside the adapter as {PROTECTION_FILE}, where "
                f"LokiConfig.from_pretrained(FOLDER) finds it{config.unfetched}."
            )
            raise explained(ValueError(message))
        named = "is estimated here" if config.protect is True else f"{config.protect} holds"
        raise ValueError(
            f"the adapter was trained with another protection than {named}: with the one that was "
            f"saved beside it as {PROTECTION_FILE} (protect=)."
        )
    config.protection = present
    # the process that saves needs it: of all rows at 8B it takes 1.9 GB of the host's memory
    config.kept = protection if is_first() else None
    return protection


def _check_modules(structure: Structure, config: LokiConfig) -> None:
    """Raise ValueError for modules that PEFT would leave untrained, or untie, without a word."""
    model = structure.causal_lm
    names = config.modules_to_save or []
    if config.task_type == TaskType.CAUSAL_LM:
        heads = new_heads(structure)
        if heads:
            raise ValueError(
                f"{type(model).__name__} has no language-model head but {', '.join(heads)}, which "
                "would not be trained; say what it is for: LokiConfig(task_type='SEQ_CLS'), "
                "'TOKEN_CLS' or 'QUESTION_ANS'."
            )
    else:  # PEFT has added the usual names of such heads
        names = [n for n in names if any(full.endswith(n) for full, _ in model.named_modules())]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, module in find_modules(structure, names).items():
        own = {id(parameter) for parameter in module.parameters()}
        tied = [n for n, p in parameters.items() if id(p) in own and not n.startswith(f"{name}.")]
        if tied:
            raise ValueError(
                f"modules_to_save names {name}, whose weight is {tied[0]} too; PEFT would train a "
                "copy of it apart. For new tokens use trainable_token_indices; to train it all, "
                "loki_kernels.patch(model, modules_to_save=...), whose adapters are loaded by "
                "loki_kernels.load_adapter. For the new tokens of a chat_template_path TRL names "
                "lm_head, and runs no trainable_token_indices over a tied one: there call "
                "trl.clone_chat_template first, then loki_kernels.patch."
            )


def _check_training(model: LokiModel, _inputs: Any) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if not model.training:
        return
    # one of ours tells of all: a trainer's dtype is of every one
    first = next((m for m in model.model.modules() if isinstance(m, LokiLayer)), None)
    if first is None:  # they were merged, or unloaded
        return
    model.warn_of_coarse_updates(first)
    if is_distributed():
        model.check_ranks()


register_peft_method(name="loki", config_cls=LokiConfig, model_cls=LokiModel)
