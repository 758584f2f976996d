"""`LokiLayer`: a down-projection with one set of trained rows an adapter."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UnsupportedModelError, check_choice
from ..ops import row_delta_linear
from ..sharding import full_values, is_sharded
from ..training.linear import initial_factors, low_rank_rows
from .config import MERGES, LokiConfig
from .quantized import dequantized_weight, is_repacked, plain_linear, quantization_of


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
        self.register_buffer(original_name(adapter_name), original, persistent=False)
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
        base: Any = self.get_base_layer()  # a linear of any library
        if self.quantization_backend is not None:
            if is_repacked(base):
                raise UnsupportedModelError(
                    "bitsandbytes repacks 4-bit weights on this CPU in the first forward pass in "
                    "evaluation mode; add and load adapters before that."
                )
            weight = self.quantization_backend.get_base_weight(base)
        else:
            weight = full_values(base.weight)
        if weight.is_meta:
            raise UnsupportedModelError(
                "a down-projection's weight is not in memory (offloaded, or on the meta device); "
                "load the model without offloading."
            )
        return weight[rows.to(weight.device)]

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.loki_index:
            del self.loki_index[adapter_name]
            delattr(self, original_name(adapter_name))
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # not PEFT's own, which casts to the base's dtype too: float32 rows would lose their updates
        if adapter_name not in self.loki_index:
            return
        device = device or getattr(self, original_name(adapter_name)).device
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
        names = self._adapters_here(names)
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

    def _adapters_here(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.loki_index]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        inactive = self.disable_adapters or self.merged
        names = [] if inactive else self._adapters_here(self.active_adapters)
        base = self.base_layer
        if len(names) == 1 and type(base) is nn.Linear and self._is_plain(base.weight):
            a, b = self._update_factors(names[0])
            return row_delta_linear(x, base.weight, a, b, self.loki_index[names[0]], base.bias)
        y: Tensor = base(x, *args, **kwargs)
        for name in names:
            a, b = self._update_factors(name)
            u = x if b is None else functional.linear(x, b.to(x.dtype))
            y = y.index_add(-1, self.loki_index[name], functional.linear(u, a.to(u.dtype)).to(y))
        return y

    @property
    def _base_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.get_base_layer().weight)

    def _is_plain(self, weight: Tensor) -> bool:
        return self.quantization_backend is None and not weight.is_meta and not is_sharded(weight)

    def _update_factors(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The update of an adapter's rows, as a product unless it is the second's absence."""
        if name in self.loki_delta_a:
            return self.loki_delta_a[name], self.loki_delta_b[name]
        rows = self.loki_rows[name]
        return rows - getattr(self, original_name(name)).to(rows), None

    @torch.no_grad()
    def _merged_rows(self, name: str) -> Tensor:
        """In the base's dtype."""
        original: Tensor = getattr(self, original_name(name))
        if name in self.loki_rows:
            trained: Tensor = self.loki_rows[name]
            return trained.to(original)
        rows = low_rank_rows(original, self.loki_delta_a[name], self.loki_delta_b[name])
        return rows.to(original)

    def check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> list[str]:
        """The adapters that `merge` would merge; raises what it would raise."""
        names = self._adapters_here(check_adapters_to_merge(self, adapter_names))
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
        check_choice("quantized_merge", how, MERGES)
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
            weight = self._base_weight.data
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
            device = self._base_weight.device
            self.base_layer, self.quantization_backend = self._unmerged
            self.base_layer.to(device)
            self._unmerged = None
        else:
            for name, rows in self._replaced.items():
                weight = self._base_weight.data
                weight.index_copy_(0, self.loki_index[name], rows.to(weight))
        self._replaced.clear()
        self.merged_adapters.clear()


def original_name(adapter_name: str) -> str:
    """Name of the buffer with the rows that an adapter replaces."""
    return f"loki_original_{adapter_name}"
