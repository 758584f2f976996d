"""`LokiLayer`: a down-projection with one update of some rows an adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Self, TypeGuard, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UnsupportedModelError, check_choice
from ..ops import row_delta_linear
from ..ops._directions import acting_factors, leave_out, padded
from ..sharding import DTensor, full_values, is_partitioned, is_sharded, own_part, shard_like
from ..structure import Structure, has_hooks
from ..training.adapter_file import PROTECTION_FILE
from ..training.arithmetic import (
    check_gradients,
    digest_of,
    initial_factors,
    moved_index,
    updated_rows,
)
from .config import MERGES, LokiConfig
from .quantized import (
    base_weight,
    dequantized_weight,
    is_repacked,
    plain_linear,
    quantization_of,
)


def refuse_parts(module: nn.Module) -> None:
    """Raise UnsupportedModelError under ZeRO-3, which collects a state dict by itself.

    That would hold a protected update as it does not act.
    """
    if any(is_partitioned(p) for p in module.parameters()):
        raise UnsupportedModelError(
            "ZeRO-3 cannot train a protected LoKI adapter; use FSDP2 or ZeRO-2, or "
            "loki_kernels.patch(protect=FILE)."
        )


def refuse_other_modules(structure: Structure) -> None:
    """Raise UnsupportedModelError for what a `LokiLayer` cannot be put around."""
    for down_proj in structure.projections():
        if down_proj.of_experts or down_proj.axis:
            kind = "experts" if down_proj.of_experts else "a transposed weight"
            raise UnsupportedModelError(
                f"{down_proj.name} ({type(down_proj.module).__name__}) holds {kind}, which a PEFT "
                "adapter of LoKI does not support; train it with loki_kernels.patch."
            )


def held_directions(structure: Structure, adapter: str) -> dict[str, Tensor] | None:
    """What an adapter leaves alone, by down-projection; None unless it is protected in each."""
    held = {d.name: getattr(d.module, "loki_directions", {}) for d in structure.projections()}
    if not all(adapter in directions for directions in held.values()):
        return None
    return {name: directions[adapter] for name, directions in held.items()}


class LokiLayer(nn.Module, BaseTunerLayer):
    """A down-projection with one update of some rows an adapter.

    Attributes:
        rows: int64 ``[k]`` by adapter, sorted, where its update lies (`index_of`).
        loki_index: the same, that stands for it in a state dict alone, as ``loki_protection`` is:
            torch's AveragedModel averages buffers, by which row 11 becomes row 10.
        loki_update: ``[k, in_features]`` by adapter, zero at first; float32, float64 over a float64
            base.
        loki_delta_a: ``[k, r]`` instead of it, zero at first (LoKI*).
        loki_delta_b: ``[r, in_features]`` (LoKI*).
        loki_directions: protected ones ``[in_features, r]`` by adapter, then columns of zeros, in
            the base's dtype; of those that are trained.
        loki_protection: uint8 ``[32]`` by adapter, the fingerprint of what it is protected with,
            by which a state dict is known to be of the same.
        formed: inside `LokiModel.generate` and a measurement of drift the protected factors by
            adapter, formed once.
    """

    adapter_layer_names = ("loki_update", "loki_delta_a", "loki_delta_b")
    # what else is kept by adapter, which PEFT deletes with one
    other_param_names = ("rows", "loki_index", "loki_directions", "loki_protection", "configs")

    def __init__(self, base_layer: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features: int = base_layer.in_features  # type: ignore[assignment]
        self.out_features: int = base_layer.out_features  # type: ignore[assignment]
        self.quantization_backend = quantization_of(base_layer, model)
        self.dequantized_dtype = getattr(model, "dtype", None)
        self.loki_update = nn.ParameterDict()
        self.loki_delta_a = nn.ParameterDict()
        self.loki_delta_b = nn.ParameterDict()
        self.rows: dict[str, Tensor] = {}
        self.loki_index = BufferDict(persistent=True)
        self.loki_directions = BufferDict(persistent=False)
        self.loki_protection = BufferDict(persistent=True)
        self.formed: dict[str, tuple[Tensor, Tensor | None]] | None = None
        self.register_state_dict_post_hook(_save_what_acts)  # type: ignore[no-untyped-call]
        self.configs: dict[str, LokiConfig] = {}
        self.merged_adapters: list[str] = []
        # what `unmerge` puts back: by adapter rows, or a sharded weight's part; a quantized layer
        self._replaced: dict[str, Tensor] = {}
        self._unmerged: tuple[nn.Module, Any] | None = None

    def update_layer(
        self,
        adapter_name: str,
        index: Tensor,
        dtype: torch.dtype,
        directions: Tensor | None,
        config: LokiConfig,
    ) -> None:
        """Give the layer one more adapter, whose update is zero, where ``index`` lies."""
        self.configs[adapter_name] = config
        self.rows[adapter_name] = index
        self.loki_index[adapter_name] = index.clone()
        if directions is not None:
            self.loki_directions[adapter_name] = padded(directions.to(index.device))
        if config.protection is not None:
            digest = digest_of(config.protection)
            self.loki_protection[adapter_name] = digest.to(index.device)
        if config.rank is None:
            update = torch.zeros(len(index), self.in_features, dtype=dtype, device=index.device)
            self.loki_update[adapter_name] = nn.Parameter(update)
        else:
            a, b = initial_factors((len(index), self.in_features), config.rank)
            self.loki_delta_a[adapter_name] = nn.Parameter(a.to(index.device, dtype))
            self.loki_delta_b[adapter_name] = nn.Parameter(b.to(index.device, dtype))
        self.watch()

    def watch(self) -> None:
        """Have gradients refused of adapters that were trained protected and are not here."""
        for name in self.rows:
            if not self.is_protected_as_named(name):
                check_gradients(self.factors(name), partial(self.check_protected, name))

    def index_of(self, name: str) -> Tensor:
        """Which rows an adapter trains, where its update lies."""
        device, index = self.factors(name)[0].device, self.rows[name]
        if index.device != device and device.type != "meta":
            index = self.rows[name] = moved_index(index, device)
        return index

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self.rows:
            self.index_of(name)  # moved now, since torch.compile would trace it
        return self

    def factors(self, name: str) -> list[nn.Parameter]:
        """What is trained of an adapter: its update, or LoKI*'s two factors."""
        held = (self.loki_update, self.loki_delta_a, self.loki_delta_b)
        return [part[name] for part in held if name in part]

    def check_protected(self, name: str) -> None:
        """Raise RuntimeError of an adapter that was trained protected and is not here."""
        if not self.is_protected_as_named(name):
            raise RuntimeError(
                f"adapter {name!r} was trained with a protection and loaded without it, to be "
                "used; to train on, load it with is_trainable=True, from a folder that has its "
                f"{PROTECTION_FILE}, or with config=LokiConfig.from_pretrained(FOLDER) whose "
                "protect names such a file."
            )

    def _check_training(self, names: list[str]) -> None:
        """Refuse that one of these adapters is trained on without its protection.

        In training mode; in the other, which an evaluation with gradients is in too, where a
        gradient is made (`watch`). Here and not in `LokiModel`, which transformers'
        ``load_adapter`` and PEFT's ``inject_adapter_in_model`` make and throw away.
        """
        if self.training:
            for name in names:
                if any(p.requires_grad for p in self.factors(name)):
                    self.check_protected(name)
        if not torch.compiler.is_compiling():
            self.watch()

    @torch.no_grad()
    def copy_update(self, source: str, adapter_name: str) -> None:
        """Make an adapter's update another one's."""
        for own, other in zip(self.factors(adapter_name), self.factors(source), strict=True):
            own.copy_(other)

    def base_rows(self, rows: Tensor) -> Tensor:
        """Rows of the base's weight; of a quantized one as precise as it gives them.

        Raises:
            UnsupportedModelError: if they are not in memory, or PEFT cannot read them.
        """
        base: Any = self.get_base_layer()  # a linear of any library
        if self.quantization_backend is not None:
            if is_repacked(base):
                raise UnsupportedModelError(
                    "bitsandbytes repacks 4-bit weights on this CPU in the first forward pass in "
                    "evaluation mode; add and load adapters before that."
                )
            weight = base_weight(base, self.quantization_backend)
        else:
            weight = full_values(base.weight)
        if weight.is_meta:
            raise UnsupportedModelError(
                "a down-projection's weight is not in memory (offloaded, or on the meta device); "
                "load the model without offloading."
            )
        return weight[rows.to(weight.device)]

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # not PEFT's own, which casts to the base's dtype too: an update would lose small steps
        if adapter_name not in self.rows:
            return
        device = device or next(self.get_base_layer().parameters()).device
        for buffers in (self.loki_index, self.loki_directions, self.loki_protection):
            if adapter_name in buffers:
                buffers[adapter_name] = buffers[adapter_name].to(device)
        for parameter in self.factors(adapter_name):
            if not parameter.is_meta:
                parameter.data = parameter.data.to(device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.check_disjoint(names)
        super().set_adapter(adapter_names, inference_mode)

    def check_disjoint(self, names: list[str]) -> None:
        """Raise ValueError if two of these adapters train one row."""
        names = self._adapters_here(names)
        if len(names) < 2:  # without reading an index: enabling an adapter comes here too
            return
        seen: set[int] = set()
        for name in names:
            rows = set(self.rows[name].tolist())
            if seen & rows:
                raise ValueError(
                    f"adapter {name!r} trains row {min(seen & rows)} of a layer that another "
                    "active adapter trains too; activate one of them at a time."
                )
            seen |= rows

    def _adapters_here(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.rows]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        inactive = self.disable_adapters or self.merged
        names = [] if inactive else self._adapters_here(self.active_adapters)
        base = self.base_layer
        if torch.is_grad_enabled():
            self._check_training(names)
        if any(name in self.loki_directions for name in names):
            refuse_parts(self)
        if len(names) == 1 and self._is_plain(base):
            a, b, directions = self._update_factors(names[0], x)
            index = self.index_of(names[0])
            return row_delta_linear(x, base.weight, a, b, index, base.bias, directions=directions)
        y: Tensor = base(x, *args, **kwargs)
        for name in names:
            a, b, directions = self._update_factors(name, x)
            a, b = acting_factors(a, b, directions)
            u = x if b is None else functional.linear(x, b.to(x.dtype))
            y = y.index_add(-1, self.index_of(name), functional.linear(u, a.to(u.dtype)).to(y))
        return y

    @property
    def _base_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.get_base_layer().weight)

    def _is_plain(self, base: nn.Module) -> TypeGuard[nn.Linear]:
        """Whether a call of the base is nothing but a product with a weight that is here."""
        return (
            type(base) is nn.Linear
            and self.quantization_backend is None
            and not base.weight.is_meta
            and not base.weight.requires_grad  # or it would be given no gradient
            and not is_sharded(base.weight)
            and not has_hooks(base)
        )

    def _update_factors(self, name: str, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(a, b, directions) of an adapter: its update is a @ b, or a, less the directions.

        While the model generates, or is measured, they are left out once and not at every pass.

        Raises:
            UnsupportedModelError: if they are not in memory, and x is.
        """
        directions = self._directions(name)
        low_rank = name in self.loki_delta_a
        a = self.loki_delta_a[name] if low_rank else self.loki_update[name]
        b = self.loki_delta_b[name] if low_rank else None
        if a.is_meta and not x.is_meta:
            raise UnsupportedModelError(
                f"adapter {name!r} is not in memory: accelerate has offloaded it, and brings in "
                "what is called alone. Load the model without offloading, or merge the adapter "
                "before the model is offloaded."
            )
        formed = self.formed
        if formed is None or directions is None or torch.is_grad_enabled():
            return a, b, directions
        if name not in formed:
            a, b = acting_factors(a, b, directions)
            formed[name] = a.to(x.dtype), None if b is None else b.to(x.dtype)
        return *formed[name], None

    def _directions(self, name: str) -> Tensor | None:
        return dict(self.loki_directions.items()).get(name)  # BufferDict has no get

    def is_protected_as_named(self, name: str) -> bool:
        """Whether an adapter that names a protection leaves its directions alone."""
        return name not in self.loki_protection or name in self.loki_directions

    def _whole_weight(self) -> Tensor:
        """The base's weight; of a quantized one in the model's dtype."""
        if self.quantization_backend is None:
            return full_values(self._base_weight)
        return dequantized_weight(
            self.get_base_layer(), self.quantization_backend, self.dequantized_dtype
        )

    @torch.no_grad()
    def _merged_rows(self, name: str, weight: Tensor) -> Tensor:
        """The weight's rows with an adapter's update, in the weight's dtype."""
        a, *b = map(full_values, self.factors(name))
        a, last = acting_factors(a, b[0] if b else None, self._directions(name))
        return updated_rows(weight[self.index_of(name)], a, last)

    def check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> list[str]:
        """The adapters that `merge` would merge; raises what it would raise."""
        names = self._adapters_here(check_adapters_to_merge(self, adapter_names))
        self.check_disjoint([*self.merged_adapters, *names])
        if safe_merge and names:
            weight = self._whole_weight()
            if not all(torch.isfinite(self._merged_rows(name, weight)).all() for name in names):
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
        """Add adapters' updates to their rows of the base weight.

        Raises:
            ValueError: for adapters of common rows, non-finite rows with ``safe_merge``, or a
                quantized base where ``LokiConfig.quantized_merge`` does not say how.
        """
        names = self.check_merge(safe_merge, adapter_names)
        if self.quantization_backend is None:
            for name in names:
                base, index = self._base_weight, self.index_of(name)
                weight = full_values(base)
                rows = self._merged_rows(name, weight)
                if isinstance(base, DTensor):
                    # this process's part, which is put back without the others
                    own = own_part(base)
                    self._replaced[name] = own.clone()
                    own.copy_(own_part(shard_like(weight.index_copy(0, index, rows), base)))
                else:
                    self._replaced[name] = weight[index]
                    base.data.index_copy_(0, index, rows)
        elif names:
            self._merge_quantized(names)
        self.merged_adapters.extend(names)

    def _merge_quantized(self, names: list[str]) -> None:
        how = self._how_to_merge(names)
        weight = self._whole_weight().clone()
        for name in names:
            weight.index_copy_(0, self.index_of(name), self._merged_rows(name, weight))
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
            for name, kept in reversed(self._replaced.items()):  # a part holds what came before
                base = self._base_weight
                if isinstance(base, DTensor):
                    own_part(base).copy_(kept)
                else:
                    base.data.index_copy_(0, self.index_of(name), kept.to(base))
        self._replaced.clear()
        self.merged_adapters.clear()


def _save_what_acts(layer: LokiLayer, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of protected updates a state dict holds what acts of them, which needs no protection.

    And the rows and protections as they are, whatever an average made of their buffers.
    """
    for name, index in layer.rows.items():
        key, protection = f"{prefix}loki_index.{name}", layer.configs[name].protection
        if key in state_dict:
            # of its own: what writes into a state dict would write into the rows
            state_dict[key] = index.to(state_dict[key].device, copy=True)
        key = f"{prefix}loki_protection.{name}"
        if key in state_dict and protection is not None:
            state_dict[key] = digest_of(protection).to(state_dict[key].device)
    for name, directions in layer.loki_directions.items():
        for part in ("loki_update", "loki_delta_b"):
            key = f"{prefix}{part}.{name}"
            held = state_dict.get(key)
            if held is not None:
                acting = leave_out(full_values(held.detach()), directions.to(held.device))
                state_dict[key] = shard_like(acting, held)
