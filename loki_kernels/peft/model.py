"""`LokiModel`: what ``get_peft_model`` puts around a causal language model for a `LokiConfig`."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn

from ..attribution.cache import cached_attribution
from ..discovery import find_structure
from ..fingerprint import rows_fingerprint
from ..selection import select
from ..sharding import ignore_in_ddp
from ..training.adapter_file import check_fingerprint
from ..training.linear import LokiLinear
from ..training.targets import as_selection, assign_rows
from .config import LokiConfig
from .layer import LokiLayer, original_name
from .quantized import dequantize_model

logger = logging.getLogger(__name__)


class LokiModel(BaseTuner):
    """What ``get_peft_model`` puts around a causal language model for a `LokiConfig`."""

    prefix = "loki_"
    tuner_layer_cls = LokiLayer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_check_rows)  # type: ignore[no-untyped-call]

    # override: PEFT declares wider arguments than it passes, and None where it returns the model.

    def _prepare_adapter_config(  # type: ignore[override]
        self, peft_config: LokiConfig, model_config: dict[str, Any]
    ) -> LokiConfig:
        if any(layer.merged for layer in self._loki_layers()):
            raise ValueError("an adapter is merged; call unmerge_adapter() before adding another.")
        # what is filled in belongs to this model; the caller may want the config for another
        (name,) = (name for name, config in self.peft_config.items() if config is peft_config)
        self.peft_config[name] = peft_config = copy.copy(peft_config)
        structure = find_structure(self.model)
        if peft_config.rows is None:
            selection = select(cached_attribution(self.model, structure, None), peft_config.quota)
            peft_config.rows = [layer.tolist() for layer in selection]
        by_layer = assign_rows(structure, as_selection(peft_config.rows))
        names = {id(module): name for name, module in self.model.named_modules()}
        self._rows: dict[str, Tensor] = {}  # of the adapter that is being added
        replaced = []
        for down_proj, rows in by_layer:
            if len(rows):
                self._rows[names[id(down_proj.module)]] = rows
                replaced.append(self._loki_layer_for(down_proj.module).base_rows(rows))
        found = rows_fingerprint(replaced)
        check_fingerprint(
            peft_config.fingerprint,
            found,
            peft_config.base_model_name_or_path,
            getattr(self.model, "name_or_path", None),
        )
        peft_config.fingerprint = found
        peft_config.target_modules = set(self._rows)
        return peft_config

    def _loki_layers(self) -> list[LokiLayer]:
        return [module for module in self.model.modules() if isinstance(module, LokiLayer)]

    def _loki_layer_for(self, module: nn.Module) -> LokiLayer:
        """``module`` if it is one of ours, else one around it."""
        if isinstance(module, LokiLayer):
            return module
        if isinstance(module, LokiLinear):
            raise ValueError("the model is patched; call merge() or unpatch() on its handle first.")
        return LokiLayer(module, self.model)

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
        layer = self._loki_layer_for(target)
        layer.update_layer(adapter_name, self._rows[current_key], peft_config)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        # DDP will see a PeftModel
        prefix = f"base_model.model.{current_key}"
        buffers = f"loki_index.{adapter_name}", original_name(adapter_name)
        ignore_in_ddp(self.model, [f"{prefix}.{name}" for name in buffers])

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
        if dequantize:
            dequantize_model(model)
            logger.info("the merged model is no longer quantized")
        elif merged and getattr(model, "is_quantized", False):
            logger.info("the merged model is quantized as its base was")
        return model

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's makes new parameters, which would be trained in an adapter that is not."""
        parameters = [d for layer in self._loki_layers() for d in layer.parameters_by_adapter()]
        parameters = [d for d in parameters if adapter_name in d]
        flags = [d[adapter_name].requires_grad for d in parameters]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for d, flag in zip(parameters, flags, strict=True):
            d[adapter_name].requires_grad_(flag)


def _check_rows(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a state dict of other rows: PEFT loads one into an adapter without its config."""
    for name, module in model.named_modules():
        if isinstance(module, LokiLayer):
            for adapter, index in module.loki_index.items():
                key = f"{prefix}{name}.loki_index.{adapter}"
                other = state_dict.get(key)
                if other is not None and not torch.equal(other.cpu(), index.cpu()):
                    raise ValueError(
                        f"{name} trains other rows in adapter {adapter!r} than those that were "
                        "saved; load them as an adapter of their own."
                    )


register_peft_method(name="loki", config_cls=LokiConfig, model_cls=LokiModel)
