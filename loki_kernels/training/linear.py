"""`LokiLinear`: an ``nn.Linear`` of which some rows are trained and the rest is frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..ops import row_delta_linear, row_masked_linear, swiglu_row_masked_linear, sync_rows
from ..ops.gated_product import Activation
from ..sharding import full_shape, full_values, is_partitioned, is_sharded, shard_like

# Names of the parameters that are trained; a merged state dict has none of them.
TRAINED = ("rows", "delta_a", "delta_b")


class LokiLinear(nn.Module):
    """``y = x @ W.T + b`` with rows ``index`` of W trained, every other entry frozen.

    ``weight`` is one dense frozen parameter. Without a rank the trained ``rows`` are a parameter of
    their own, written into ``weight`` at every forward pass in eager mode (k * in_features
    elements, about 1 % of the product at 4,096 tokens and 10 % of the rows), so the product is one
    dense GEMM on the merged weight whoever changed the rows: an optimizer, ``load_state_dict``,
    ``.to()``. Where the weight must not be written, the difference to its rows is added to the
    output instead, k / out_features more arithmetic (the delta form): under ``torch.compile``,
    which would have to copy a weight that changes in the graph for the backward pass, and where
    the weight is sharded (FSDP, ZeRO-3) and a whole one exists only while a layer runs. With a
    rank r the rows are the frozen ones plus ``delta_a @ delta_b`` (LoKI*), always so.

    ``state_dict`` holds one merged ``weight`` and the bias, like ``nn.Linear``'s, and
    ``load_state_dict`` reads the rows out of such a weight.

    `patch` writes the rows of all layers in one launch before the decoder runs; a layer called by
    itself writes its own.

    Attributes:
        weight: ``[out_features, in_features]``, frozen; use `merged_weight` to read it.
        bias: ``[out_features]`` or None, frozen.
        index: int64 ``[k]``, sorted.
        rows: ``[k, in_features]``, trained (rank None).
        delta_a: ``[k, r]``, zero at first, trained (LoKI*).
        delta_b: ``[r, in_features]``, normal with variance 1 / in_features, trained (LoKI*).
    """

    weight: nn.Parameter
    index: Tensor
    original_rows: Tensor
    in_step = False  # whether `write_rows` has just written these rows for a decoder's forward pass
    gathered: dict[str, Tensor] | None = None  # what a side file needs, of a sharded model
    sharded = False  # whether the decoder's last forward pass found the weight sharded

    def __init__(
        self,
        linear: nn.Linear,
        rows: Tensor,
        rank: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        index = _check_index(rows, linear.out_features)
        check_rank(rank)
        weight = cast(nn.Parameter, linear.weight)  # torch declares a Tensor
        if not weight.is_floating_point():
            raise ValueError(
                f"the weight is {weight.dtype}; only floating-point weights can be trained in rows."
            )
        dtype = weight.dtype if dtype is None else dtype
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type; it is {dtype}.")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank = rank
        # Shared with `linear`, not copied: a patched model is no larger than before.
        self.weight = weight
        self.bias = cast("nn.Parameter | None", linear.bias)
        weight.requires_grad_(False)
        if linear.bias is not None:
            linear.bias.requires_grad_(False)
        index = index.to(weight.device)
        self.register_buffer("index", index, persistent=False)
        selected = full_values(weight)[index]
        # On the host, for it is seldom read, and no buffer, which DDP would broadcast every step.
        self.original_rows = selected.cpu()
        if rank is None:
            self.rows = nn.Parameter(selected.to(dtype, copy=True))
        else:
            a, b = initial_factors(len(index), rank, self.in_features)
            self.delta_a = nn.Parameter(a.to(index.device, dtype))
            self.delta_b = nn.Parameter(b.to(index.device, dtype))
        self.train(linear.training)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rows: Tensor | list[int],
        rank: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> LokiLinear:
        """Take over ``linear``'s weight (shared, frozen) and train ``rows`` of it.

        Args:
            linear: floating-point ``nn.Linear``.
            rows: distinct row numbers in [0, out_features).
            rank: None trains the rows themselves, r a rank-r update of them.
            dtype: of the trained parameters; the weight's by default. float32 over a bfloat16
                weight keeps master weights.

        Raises:
            TypeError: if ``linear`` is not an ``nn.Linear``.
            ValueError: for rows out of range or duplicated, a rank below 1, a non-floating weight.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"LokiLinear takes over an nn.Linear, not a {type(linear).__name__}.")
        return cls(linear, torch.as_tensor(rows), rank, dtype)

    @property
    def writes_rows(self) -> bool:
        """Whether the rows are written into the weight before a product."""
        return self.rank is None and not self.sharded and not torch.compiler.is_compiling()

    def forward(self, x: Tensor) -> Tensor:
        if not self.writes_rows:
            return row_delta_linear(x, self.weight, *self._update_factors(), self.index, self.bias)
        self._write_rows()
        return row_masked_linear(x, self.weight, self.rows, self.index, self.bias)

    def _update_factors(self) -> tuple[Tensor, Tensor | None]:
        """The update of the rows: a product, or the difference itself and None."""
        if self.rank is not None:
            return self.delta_a, self.delta_b
        # to what the weight holds now, trained or not: zero exactly before the first step
        return self.rows - self.weight.detach()[self.index].to(self.rows.dtype), None

    def forward_gated(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """``self(act(gate) * up)`` without keeping the product, where the layer ``writes_rows``."""
        self._write_rows()
        return swiglu_row_masked_linear(
            gate, up, self.weight, self.rows, self.index, self.bias, activation=activation
        )

    @property
    def needs_side_file(self) -> bool:
        """Whether a merged weight does not hold the trained parameters exactly."""
        return self.rank is not None or self.rows.dtype != self.weight.dtype

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of ``rows``, or of ``delta_a`` and ``delta_b``."""
        return [(name, p) for name, p in self.named_parameters(recurse=False) if name in TRAINED]

    def merged_rows(self) -> Tensor:
        """The rows as trained so far, ``[k, in_features]`` in the weight's dtype."""
        with torch.no_grad():
            if self.rank is None:
                return full_values(self.rows).to(self.weight.dtype)
            frozen = self._selected_rows(full_values(self.weight))
            rows = low_rank_rows(frozen, full_values(self.delta_a), full_values(self.delta_b))
            return rows.to(self.weight.dtype)

    def merged_weight(self) -> Tensor:
        """The weight as trained so far, ``[out_features, in_features]``, sharded if it is."""
        if self.rank is None and not is_sharded(self.weight):
            write_rows([self])
            return self.weight.detach()
        weight = full_values(self.weight)
        index = self.index.to(weight.device)
        merged = weight.index_copy(0, index, self.merged_rows().to(weight.device))
        return shard_like(merged, self.weight)

    def _selected_rows(self, weight: Tensor) -> Tensor:
        # FSDP with weights offloaded to the host leaves the index where the layer computes
        return weight[self.index.to(weight.device)]

    def _write_rows(self) -> None:
        if not self.in_step:
            write_rows([self])

    def reset_rows(self) -> None:
        """Put the rows back to what they were before training."""
        with torch.no_grad():
            if self.rank is not None:
                self.delta_a.zero_()
                return
            self.rows.copy_(self.original_rows)
            self.weight.data.index_copy_(0, self.index, self.original_rows.to(self.weight))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rows={len(self.index)}, rank={self.rank}, bias={self.bias is not None}"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if is_partitioned(self.weight):  # DeepSpeed keeps every parameter's parts by itself
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        weight = self.merged_weight()
        if isinstance(self.weight, DTensor) and self.needs_side_file:
            # every process is here; the one that writes the side file will be alone
            self.gathered = {name: full_values(p).cpu() for name, p in self.trained_parameters()}
        merged_in_place = self.rank is None and not is_sharded(self.weight)
        destination[prefix + "weight"] = self.weight if keep_vars and merged_in_place else weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if is_partitioned(self.weight):
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
            return
        missing: list[str] = []
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        trained = {prefix + name for name in TRAINED}
        missing_keys += [name for name in missing if name not in trained]
        if strict:
            # torch.distributed.checkpoint puts a model's own parameters into what it loads
            own = {prefix + name: parameter for name, parameter in self.trained_parameters()}
            unexpected_keys += [
                name
                for name in sorted(trained & state_dict.keys())
                if state_dict[name] is not own.get(name)
            ]
        if prefix + "weight" not in state_dict or len(error_msgs) > errors:
            return
        with torch.no_grad():
            weight = full_values(self.weight)
            loaded = self._selected_rows(weight)
            if self.rank is None:
                self.rows.copy_(shard_like(loaded.to(self.rows.dtype), self.rows))
            if self.rank is not None or isinstance(self.weight, DTensor):
                # The delta form rounds by what the weight holds: it must be what it was before.
                index, original = self.index.to(weight.device), self.original_rows.to(loaded)
                restored = weight.index_copy(0, index, original)
                if local_metadata.get("assign_to_params_buffers") and self.rank is not None:
                    # else the caller's state dict would change
                    self.weight = nn.Parameter(self.weight.detach().clone(), False)
                self.weight.data.copy_(shard_like(restored, self.weight))
            if self.rank is None:
                return
            error = self._load_delta(loaded.float() - self.original_rows.to(loaded).float())
            if error is not None:
                error_msgs.append(f"{prefix}weight: {error}")

    def _load_delta(self, delta: Tensor) -> str | None:
        """Factor a merged update; the exact factors come from the checkpoint's side file."""
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        kept = min(self.rank or 0, len(s))
        lost, norm = float(s[kept:].norm()), float(s.norm())
        rounding = torch.finfo(self.weight.dtype).eps * float(self.original_rows.float().norm())
        if lost > 0.05 * norm + rounding:
            return (
                f"its trained rows differ from this model's by more than rank {self.rank} can "
                "hold; load the checkpoint into the plain model and patch that."
            )
        a, b = torch.zeros(full_shape(self.delta_a)), torch.zeros(full_shape(self.delta_b))
        if norm > 0:
            root = s[:kept].sqrt().cpu()
            a[:, :kept] = u[:, :kept].cpu() * root
            b[:kept] = root[:, None] * vh[:kept].cpu()
            self.delta_b.copy_(shard_like(b.to(self.delta_b.dtype), self.delta_b))
        self.delta_a.copy_(shard_like(a.to(self.delta_a.dtype), self.delta_a))
        return None


def check_rank(rank: object) -> None:
    """Raise ValueError unless ``rank`` is None or a positive integer."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a positive integer or None; it is {rank!r}.")


def initial_factors(count: int, rank: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Of LoKI*: zeros ``[k, r]``, and ``[r, in_features]`` normal with variance 1 / in_features."""
    return (
        torch.zeros(count, rank),
        torch.randn(rank, in_features) / math.sqrt(in_features),
    )


def low_rank_rows(frozen: Tensor, delta_a: Tensor, delta_b: Tensor) -> Tensor:
    """LoKI*'s rows, ``frozen + delta_a @ delta_b`` in float32, where ``frozen`` lies."""
    return frozen.float() + (delta_a.float() @ delta_b.float()).to(frozen.device)


def write_rows(layers: Sequence[LokiLinear]) -> None:
    """Put the trained rows of layers without a rank into their weights."""
    groups: dict[Any, list[LokiLinear]] = {}
    for layer in layers:
        key = layer.weight.device, layer.weight.dtype, layer.rows.dtype
        groups.setdefault(key, []).append(layer)
    for group in groups.values():
        # Through .data: the values a pending backward pass reads do not change unless `rows` did,
        # which row_masked_linear notices, so the weights' versions must not.
        sync_rows(
            [layer.weight.data for layer in group],
            [layer.rows.data for layer in group],
            [layer.index for layer in group],
        )


def _check_index(rows: Tensor, out_features: int) -> Tensor:
    rows = torch.as_tensor(rows)
    if rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(f"rows must be integers [k]; they are {rows.dtype} {tuple(rows.shape)}.")
    index = rows.to(torch.int64).sort().values
    if len(index) and (int(index[0]) < 0 or int(index[-1]) >= out_features):
        bad = index[0] if int(index[0]) < 0 else index[-1]
        raise ValueError(f"row {int(bad)} is out of range for a weight of {out_features} rows.")
    if (index[1:] == index[:-1]).any():
        raise ValueError(f"row {int(index[1:][index[1:] == index[:-1]][0])} is given twice.")
    return index
