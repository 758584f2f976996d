"""LoKI as a PEFT method: importing this module registers ``LokiConfig``.

    import loki_kernels.peft
    model = peft.get_peft_model(model, loki_kernels.peft.LokiConfig(positions="rows.json"))

The base weights are never written while an adapter is active (a preference loss turns the adapter
off between a forward pass and its backward pass), so the layers work in the delta form:
``base(x)`` plus ``x @ (rows - original).T`` at the rows' places. That also serves quantized bases.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from packaging.version import Version
from peft import PeftConfig, PeftType, TaskType
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn
from torch.nn import functional

from .adapters import check_fingerprint
from .cache import cached_attribution
from .errors import UnsupportedModelError, check_choice
from .fingerprint import rows_fingerprint
from .linear import LoKILinear, check_rank, initial_factors, low_rank_rows
from .ops import row_delta_linear
from .patching import check_fits
from .quantized import (
    dequantize_model,
    dequantized_weight,
    is_repacked,
    plain_linear,
    quantization_of,
)
from .quota import DEFAULT_QUOTA
from .selection import RowSelection, select
from .sharding import is_sharded, whole
from .structure import find_structure

logger = logging.getLogger(__name__)

_MERGES = ("dequantize", "requantize")
_OLDEST = "0.18"  # which LLaMA-Factory 0.9 pins
if Version(peft.__version__) < Version(_OLDEST):
    raise ImportError(
        f"loki_kernels.peft needs peft {_OLDEST} or newer; {peft.__version__} is installed."
    )


def _add_peft_type() -> None:
    """PEFT knows its methods by an enum, and offers no way to add one."""
    if "LOKI" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "LOKI")
    member._name_ = member._value_ = "LOKI"
    PeftType._member_names_.append("LOKI")
    PeftType._member_map_["LOKI"] = member
    PeftType._value2member_map_["LOKI"] = member
    type.__setattr__(PeftType, "LOKI", member)


_add_peft_type()


@dataclass
class LokiConfig(PeftConfig):
    """Train some rows of every FFN down-projection.

    Args:
        positions: path of a position file; it is read at once and not needed again.
        rows: the rows themselves, one list a layer, instead of ``positions``. Without either the
            model is analysed on the bundled questions, as `loki_kernels.patch` does.
        quota: percentage of rows for that analysis.
        rank: train the rows as a rank-r update (LoKI*).
        quantized_merge: how to merge into a quantized base: ``"dequantize"`` makes the merged
            model an ordinary one, ``"requantize"`` rounds the merged weights as the base's were.
        fingerprint: of the rows that are replaced; filled in by itself, and checked when the
            adapter is loaded onto a model.

    Raises:
        ValueError: for a damaged position file, both ``positions`` and ``rows``, a rank below 1, or
            an unknown ``quantized_merge``.
    """

    positions: str | None = None
    rows: list[list[int]] | None = None
    quota: float = DEFAULT_QUOTA
    rank: int | None = None
    quantized_merge: str | None = None
    fingerprint: str | None = None
    target_modules: set[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LOKI")
        self.task_type = self.task_type or TaskType.CAUSAL_LM
        check_rank(self.rank)
        if self.quantized_merge is not None:
            check_choice("quantized_merge", self.quantized_merge, _MERGES)
        if self.positions is not None:
            if self.rows is not None:
                raise ValueError("give positions or rows, not both.")
            self.rows = [layer.tolist() for layer in RowSelection.load(self.positions)]
            self.positions = None


class LokiLayer(nn.Module, BaseTunerLayer):
    """A down-projection with one set of trained rows an adapter."""

    adapter_layer_names = ("loki_rows", "loki_delta_a", "loki_delta_b")

    def __init__(self, base_layer: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features: int = base_layer.in_features  # type: ignore[assignment]
        self.out_features: int = base_layer.out_features  # type: ignore[assignment]
        self.quantization_backend = quantization_of(base_layer, model)
        self.dequantized_dtype = getattr(model, "dtype", None)
        self.loki_rows = nn.ParameterDict()
        self.loki_delta_a = nn.ParameterDict()
        self.loki_delta_b = nn.ParameterDict()
        self.loki_index = BufferDict(persistent=True)
        self.configs: dict[str, LokiConfig] = {}
        self.merged_adapters: list[str] = []
        # what `unmerge` puts back: rows by adapter, or a quantized layer
        self._replaced: dict[str, Tensor] = {}
        self._unmerged: tuple[nn.Module, Any] | None = None

    def update_layer(self, adapter_name: str, rows: Tensor, config: LokiConfig) -> None:
        """Give the layer one more adapter, whose rows are those of the base."""
        rank = config.rank
        self.configs[adapter_name] = config
        original = self.base_rows(rows)
        if self.quantization_backend is not None:
            original = original.to(self.dequantized_dtype)
        index = rows.to(original.device)
        self.loki_index[adapter_name] = index
        # of no dict of adapters: PEFT would turn it to float32
        self.register_buffer(_original(adapter_name), original, persistent=False)
        if rank is None:
            self.loki_rows[adapter_name] = nn.Parameter(original.clone())
        else:
            a, b = initial_factors(len(index), rank, self.in_features)
            self.loki_delta_a[adapter_name] = nn.Parameter(a.to(original))
            self.loki_delta_b[adapter_name] = nn.Parameter(b.to(original))

    def base_rows(self, rows: Tensor) -> Tensor:
        """Rows of the base's weight; of a quantized one as precise as it gives them.

        Raises:
            UnsupportedModelError: if they are not in memory.
        """
        base = self.get_base_layer()
        if self.quantization_backend is not None:
            if is_repacked(base):
                raise UnsupportedModelError(
                    "bitsandbytes repacks 4-bit weights on this CPU in the first forward pass in "
                    "evaluation mode; add and load adapters before that."
                )
            weight = self.quantization_backend.get_base_weight(base)
        else:
            weight = whole(base.weight)
        if weight.is_meta:
            raise UnsupportedModelError(
                "a down-projection's weight is not in memory (offloaded, or on the meta device); "
                "load the model without offloading."
            )
        return weight[rows.to(weight.device)]

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.loki_index:
            del self.loki_index[adapter_name]
            delattr(self, _original(adapter_name))
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # not PEFT's own, which casts to the base's dtype too: float32 rows would lose their updates
        if adapter_name not in self.loki_index:
            return
        device = device or getattr(self, _original(adapter_name)).device
        self.loki_index[adapter_name] = self.loki_index[adapter_name].to(device)
        for parameters in self.parameters_by_adapter():
            if adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name].data = parameters[adapter_name].data.to(device)

    def parameters_by_adapter(self) -> list[nn.ParameterDict]:
        return [getattr(self, name) for name in self.adapter_layer_names]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.check_disjoint(names)
        super().set_adapter(adapter_names, inference_mode)

    def check_disjoint(self, names: list[str]) -> None:
        """Raise ValueError if two of these adapters replace one row."""
        names = self._own(names)
        if len(names) < 2:  # without reading an index: enabling an adapter comes here too
            return
        seen: set[int] = set()
        for name in names:
            rows = set(self.loki_index[name].tolist())
            if seen & rows:
                raise ValueError(
                    f"adapter {name!r} replaces row {min(seen & rows)} of a layer that another "
                    "active adapter replaces too; activate one of them at a time."
                )
            seen |= rows

    def _own(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.loki_index]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self._own(self.active_adapters)
        base = self.base_layer
        if len(names) == 1 and type(base) is nn.Linear and self._is_plain(base.weight):
            a, b = self._factors(names[0])
            return row_delta_linear(x, base.weight, a, b, self.loki_index[names[0]], base.bias)
        y = base(x, *args, **kwargs)
        for name in names:
            a, b = self._factors(name)
            u = x if b is None else functional.linear(x, b.to(x.dtype))
            y = y.index_add(-1, self.loki_index[name], functional.linear(u, a.to(u.dtype)).to(y))
        return y

    def _is_plain(self, weight: Tensor) -> bool:
        return self.quantization_backend is None and not weight.is_meta and not is_sharded(weight)

    def _factors(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The update of an adapter's rows, as a product unless it is the second's absence."""
        if name in self.loki_delta_a:
            return self.loki_delta_a[name], self.loki_delta_b[name]
        rows = self.loki_rows[name]
        return rows - getattr(self, _original(name)).to(rows), None

    @torch.no_grad()
    def _merged_rows(self, name: str) -> Tensor:
        """In the base's dtype."""
        original = getattr(self, _original(name))
        if name in self.loki_rows:
            return self.loki_rows[name].to(original)
        rows = low_rank_rows(original, self.loki_delta_a[name], self.loki_delta_b[name])
        return rows.to(original)

    def check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> list[str]:
        """The adapters that `merge` would merge; raises what it would raise."""
        names = self._own(check_adapters_to_merge(self, adapter_names))
        self.check_disjoint([*self.merged_adapters, *names])
        if safe_merge and not all(torch.isfinite(self._merged_rows(n)).all() for n in names):
            raise ValueError(f"there is NaN or infinity in the rows of {', '.join(names)}.")
        if names and self.quantization_backend is not None:
            self._how_to_merge(names)
        return names

    def _how_to_merge(self, names: list[str]) -> str:
        choices = {self.configs[name].quantized_merge for name in names}
        if len(choices) > 1 or None in choices:
            raise ValueError(
                "the base is quantized; say how to merge into it, the same for all adapters: "
                "model.peft_config[adapter].quantized_merge = 'dequantize' (the merged model "
                "becomes an ordinary one) or 'requantize' (the merged weights are rounded again)."
            )
        (how,) = choices
        check_choice("quantized_merge", how, _MERGES)
        return str(how)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters' rows into the base weight.

        Raises:
            ValueError: for adapters of common rows, non-finite rows with ``safe_merge``, or a
                quantized base where ``LokiConfig.quantized_merge`` does not say how.
        """
        names = self.check_merge(safe_merge, adapter_names)
        rows = {name: self._merged_rows(name) for name in names}
        if self.quantization_backend is None:
            weight = self.get_base_layer().weight.data
            for name in names:
                index = self.loki_index[name]
                self._replaced[name] = weight[index]
                weight.index_copy_(0, index, rows[name])
        elif names:
            self._merge_quantized(rows)
        self.merged_adapters.extend(names)

    def _merge_quantized(self, rows: dict[str, Tensor]) -> None:
        how = self._how_to_merge(list(rows))
        weight = dequantized_weight(
            self.get_base_layer(), self.quantization_backend, self.dequantized_dtype
        ).clone()
        for name, own in rows.items():
            weight.index_copy_(0, self.loki_index[name], own.to(weight))
        if self._unmerged is None:
            self._unmerged = self.base_layer, self.quantization_backend
        if how == "dequantize":
            self.base_layer = plain_linear(weight, self.base_layer)
            self.quantization_backend = None
        else:
            self.base_layer = copy.deepcopy(self.base_layer)
            self.set_base_weight(weight)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if self._unmerged is not None:
            device = self.get_base_layer().weight.device
            self.base_layer, self.quantization_backend = self._unmerged
            self.base_layer.to(device)
            self._unmerged = None
        else:
            for name, rows in self._replaced.items():
                weight = self.get_base_layer().weight.data
                weight.index_copy_(0, self.loki_index[name], rows.to(weight))
        self._replaced.clear()
        self.merged_adapters.clear()


class LokiModel(BaseTuner):
    """What ``get_peft_model`` puts around a causal language model for a `LokiConfig`."""

    prefix = "loki_"
    tuner_layer_cls = LokiLayer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_check_rows)

    def _prepare_adapter_config(self, peft_config: LokiConfig, model_config: dict) -> LokiConfig:
        if any(layer.merged for layer in self._layers()):
            raise ValueError("an adapter is merged; call unmerge_adapter() before adding another.")
        # what is filled in belongs to this model; the caller may want the config for another
        (name,) = (name for name, config in self.peft_config.items() if config is peft_config)
        self.peft_config[name] = peft_config = copy.copy(peft_config)
        structure = find_structure(self.model)
        if peft_config.rows is None:
            selection = select(cached_attribution(self.model, structure, None), peft_config.quota)
            peft_config.rows = [layer.tolist() for layer in selection]
        selection = RowSelection(peft_config.rows)
        check_fits(selection, structure)
        names = {id(module): name for name, module in self.model.named_modules()}
        self._rows: dict[str, Tensor] = {}  # of the adapter that is being added
        replaced = []
        for down_proj, rows in zip(structure.down_projs, selection, strict=True):
            if len(rows):
                self._rows[names[id(down_proj.module)]] = rows
                replaced.append(self._layer(down_proj.module).base_rows(rows))
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

    def _layers(self) -> list[LokiLayer]:
        return [module for module in self.model.modules() if isinstance(module, LokiLayer)]

    def _layer(self, module: nn.Module) -> LokiLayer:
        """``module`` if it is one of ours, else one around it."""
        if isinstance(module, LokiLayer):
            return module
        if isinstance(module, LoKILinear):
            raise ValueError("the model is patched; call merge() or unpatch() on its handle first.")
        return LokiLayer(module, self.model)

    def _create_and_replace(
        self,
        peft_config: LokiConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = self._layer(target)
        layer.update_layer(adapter_name, self._rows[current_key], peft_config)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        # The same in every process; DDP would broadcast them at each step. It sees a PeftModel.
        self.model._ddp_params_and_buffers_to_ignore = [
            *getattr(self.model, "_ddp_params_and_buffers_to_ignore", []),
            *(
                f"base_model.model.{current_key}.{name}"
                for name in (f"loki_index.{adapter_name}", _original(adapter_name))
            ),
        ]

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("LoKI adapters cannot be mixed within a batch (adapter_names=).")
        yield

    # All layers are checked before any is changed.

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        for layer in self._layers():
            layer.check_disjoint([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        for layer in self._layers():
            layer.check_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        merged: set[str] = set()
        for layer in self._layers() if merge else ():
            merged |= {*layer.merged_adapters, *layer.check_merge(safe_merge, adapter_names)}
        dequantize = any(self.peft_config[n].quantized_merge == "dequantize" for n in merged)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if dequantize:
            dequantize_model(model)
            logger.info("the merged model is no longer quantized")
        elif merged and getattr(model, "is_quantized", False):
            logger.info("the merged model is quantized as its base was")
        return model

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's makes new parameters, which would be trained in an adapter that is not."""
        parameters = [d for layer in self._layers() for d in layer.parameters_by_adapter()]
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


def _original(adapter_name: str) -> str:
    """Name of the buffer with the rows that an adapter replaces."""
    return f"loki_original_{adapter_name}"


register_peft_method(name="loki", config_cls=LokiConfig, model_cls=LokiModel)
