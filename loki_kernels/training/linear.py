"""`LokiLinear`: an ``nn.Linear`` of which some rows are trained and the rest is frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops import row_delta_linear, row_masked_linear, swiglu_row_masked_linear, sync_rows
from ..ops.gated_product import Activation
from ..protection.result import LeaveOutOfGradient, leave_out
from ..sharding import DTensor, full_shape, full_values, is_partitioned, is_sharded, shard_like

# Names of the parameters that are trained; a merged state dict has none of them.
TRAINED = ("update", "delta_a", "delta_b")


class LokiLinear(nn.Module):
    """``y = x @ W.T + b`` with an update of rows ``index`` of W trained, the rest frozen.

    ``weight`` is one dense frozen parameter. Without a rank the trained ``update``, zero at first,
    is a float32 parameter of its own: small steps survive 16-bit weights, and weight decay pulls
    to the base. In eager mode ``base_rows + update`` is written into ``weight`` at every forward
    pass (k * in_features elements, about 1 % of the product at 4,096 tokens and 10 % of the rows),
    so the product is one dense GEMM on the merged weight whoever changed the update: an optimizer,
    ``load_state_dict``, ``.to()``. Where the weight must not be written, the update is added to the
    output instead, k / out_features more arithmetic (the delta form): under ``torch.compile``,
    which would have to copy a weight that changes in the graph for the backward pass, and where
    the weight is sharded (FSDP, ZeRO-3) and a whole one exists only while a layer runs. With a
    rank r the update is ``delta_a @ delta_b`` (LoKI*), always so.

    ``state_dict`` holds the merged ``weight`` and the bias, as ``nn.Linear``'s does, and beside
    them ``index`` and the trained parameters, so that training goes on bit for bit. A state dict of
    the merged weight alone can be read too, to evaluate; it does not hold the update exactly, and
    training from it raises.

    With protected ``directions`` U the update that is formed is ``update (I - U U^T)``, and
    ``delta_b (I - U U^T)`` of LoKI*: a part of the forward pass, so that any optimizer gets the
    projected gradient. The parameter itself may hold a part inside U, which does nothing; what is
    merged and saved has none.

    `patch` writes the rows of all layers in one launch before the decoder runs; a layer called by
    itself writes its own.

    Attributes:
        weight: ``[out_features, in_features]``, frozen; use `merged_weight` to read it.
        bias: ``[out_features]`` or None, frozen.
        index: int64 ``[k]``, sorted.
        base_rows: ``[k, in_features]`` in the weight's dtype, the rows as they were.
        update: ``[k, in_features]``, trained (rank None); float64 over a float64 weight.
        delta_a: ``[k, r]``, zero at first, trained (LoKI*).
        delta_b: ``[r, in_features]``, normal with variance 1 / in_features, trained (LoKI*).
        directions: U ``[in_features, r]`` in the weight's dtype, or None.
    """

    weight: nn.Parameter
    index: Tensor
    base_rows: Tensor
    directions: Tensor | None
    in_step = False  # whether `write_rows` has just written these rows for a decoder's forward pass
    written = False  # whether the weight may hold an update
    merged_alone: Tensor | None = None  # rows of a merged weight that was loaded without its update
    gathered: dict[str, Tensor] | None = None  # what a side file needs, of a sharded model
    sharded = False  # whether the decoder's last forward pass found the weight sharded

    def __init__(
        self,
        linear: nn.Linear,
        rows: Tensor,
        rank: int | None = None,
        directions: Tensor | None = None,
    ) -> None:
        super().__init__()
        index = _check_index(rows, linear.out_features)
        check_rank(rank)
        if directions is not None and (
            directions.ndim != 2 or len(directions) != linear.in_features
        ):
            raise ValueError(
                f"directions must be [{linear.in_features}, r]; they are {list(directions.shape)}."
            )
        weight = cast(nn.Parameter, linear.weight)  # torch declares a Tensor
        if not weight.is_floating_point():
            raise ValueError(
                f"the weight is {weight.dtype}; only floating-point weights can be trained in rows."
            )
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank = rank
        # Shared with `linear`, not copied: a patched model is no larger than before.
        self.weight = weight
        self.bias = cast("nn.Parameter | None", linear.bias)
        weight.requires_grad_(False)
        if linear.bias is not None:
            linear.bias.requires_grad_(False)
        index = index.to(weight.device)
        self.register_buffer("index", index)
        self.register_buffer("base_rows", full_values(weight)[index], persistent=False)
        held = None if directions is None else directions.to(weight.device, weight.dtype)
        self.register_buffer("directions", held, persistent=False)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if rank is None:
            self.update = nn.Parameter(torch.zeros_like(self.base_rows, dtype=dtype))
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
        directions: Tensor | None = None,
    ) -> LokiLinear:
        """Take over ``linear``'s weight (shared, frozen) and train ``rows`` of it.

        Args:
            linear: floating-point ``nn.Linear``.
            rows: distinct row numbers in [0, out_features).
            rank: None trains the update of the rows itself, r one of rank r.
            directions: orthonormal columns ``[in_features, r]`` that the update leaves alone.

        Raises:
            TypeError: if ``linear`` is not an ``nn.Linear``.
            ValueError: for rows out of range or duplicated, a rank below 1, a non-floating weight,
                or directions of another width.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"LokiLinear takes over an nn.Linear, not a {type(linear).__name__}.")
        return cls(linear, torch.as_tensor(rows), rank, directions)

    @property
    def writes_rows(self) -> bool:
        """Whether the rows are written into the weight before a product."""
        return self.rank is None and not self.sharded and not torch.compiler.is_compiling()

    def forward(self, x: Tensor) -> Tensor:
        self.check_loaded()
        if not self.writes_rows:
            return row_delta_linear(x, self.weight, *self._update_factors(), self.index, self.bias)
        self._write_rows()
        return row_masked_linear(x, self.weight, self._written_update(), self.index, self.bias)

    def _written_update(self) -> Tensor:
        """What stands for the update in a product with a weight that holds it."""
        if self.directions is None:
            return self.update
        written: Tensor = LeaveOutOfGradient.apply(self.update, self.directions)  # type: ignore[no-untyped-call]
        return written

    def check_loaded(self) -> None:
        """Raise RuntimeError if what was loaded last is not enough for what is asked now."""
        if self.merged_alone is not None and (
            self.rank is not None or (self.training and torch.is_grad_enabled())
        ):
            raise RuntimeError(_MERGED_ALONE)

    def _update_factors(self) -> tuple[Tensor, Tensor | None]:
        """The update of what the weight holds: a product, or the difference itself and None."""
        if self.rank is not None:
            return self.delta_a, leave_out(self.delta_b, self.directions)
        update = leave_out(self.update, self.directions)
        if self.written:
            return update + (self.base_rows.to(update) - self._weight_rows()), None
        return update, None

    def formed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the trained parameters, by name, without the directions that do nothing."""
        directions = self.directions
        return {
            name: tensor
            if directions is None or name == "delta_a"
            else leave_out(tensor, directions.to(tensor.device))
            for name, tensor in values.items()
        }

    @torch.no_grad()
    def formed_update(self) -> dict[str, Tensor]:
        """``update``, or ``delta_a`` and ``delta_b``, as they act; whole where sharded."""
        return self.formed({name: full_values(p) for name, p in self.trained_parameters()})

    def _weight_rows(self) -> Tensor:
        return self.weight.detach()[self.index].to(self.update.dtype)

    def forward_gated(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """``self(act(gate) * up)`` without keeping the product, where the layer ``writes_rows``."""
        self.check_loaded()
        self._write_rows()
        return swiglu_row_masked_linear(
            gate,
            up,
            self.weight,
            self._written_update(),
            self.index,
            self.bias,
            activation=activation,
        )

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of ``update``, or of ``delta_a`` and ``delta_b``."""
        return [(name, p) for name, p in self.named_parameters(recurse=False) if name in TRAINED]

    def merged_rows(self) -> Tensor:
        """The rows as trained so far, ``[k, in_features]`` in the weight's dtype."""
        if self.rank is not None:
            self.check_loaded()
        with torch.no_grad():
            return updated_rows(self.base_rows, *self.formed_update().values())

    def merged_weight(self) -> Tensor:
        """The weight as trained so far, ``[out_features, in_features]``, sharded if it is."""
        if self.rank is None and not is_sharded(self.weight):
            write_rows([self])
            return self.weight.detach()
        weight = full_values(self.weight)
        index = self.index.to(weight.device)
        merged = weight.index_copy(0, index, self.merged_rows().to(weight.device))
        return shard_like(merged, self.weight)

    def _write_rows(self) -> None:
        if not self.in_step:
            write_rows([self])

    def reset_rows(self) -> None:
        """Put the rows back to what they were before training."""
        with torch.no_grad():
            (self.update if self.rank is None else self.delta_a).zero_()
            self.weight.data.index_copy_(0, self.index, self.base_rows)
        self.written, self.merged_alone = False, None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rows={len(self.index)}, rank={self.rank}, bias={self.bias is not None}, "
            f"protected={0 if self.directions is None else self.directions.shape[1]}"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if is_partitioned(self.weight):  # DeepSpeed keeps every parameter's parts by itself
            return
        weight = self.merged_weight()
        if isinstance(self.weight, DTensor):
            # every process is here; the one that writes the side file will be alone
            self.gathered = {name: full_values(p).cpu() for name, p in self.trained_parameters()}
        if self.rank is not None or is_sharded(self.weight):
            destination[prefix + "weight"] = weight

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
        own = {prefix + name for name in ("index", *TRAINED)}
        weight = state_dict.get(prefix + "weight")
        partitioned = is_partitioned(self.weight)
        error = self._why_not_load(state_dict, prefix)
        if error is not None:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            return
        missing: list[str] = []
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [name for name in missing if name not in own]
        if weight is None or partitioned or len(error_msgs) > errors:
            return
        with torch.no_grad():
            merged = full_values(self.weight)
            rows = merged[self.index.to(merged.device)].to(self.base_rows.device)
            self.merged_alone = None
            if own & set(missing) and not same_rows(rows, self.merged_rows()):
                self.merged_alone = rows.cpu()
            if self.rank is None and self.merged_alone is not None:
                update = rows.to(self.update.dtype) - self.base_rows.to(self.update.dtype)
                self.update.copy_(shard_like(update, self.update))
            if self.rank is None and not isinstance(self.weight, DTensor):
                self.written = True
                return
            # In the delta form what the weight holds is the base.
            index = self.index.to(merged.device)
            restored = merged.index_copy(0, index, self.base_rows.to(merged))
            if local_metadata.get("assign_to_params_buffers") and self.rank is not None:
                # else the caller's state dict would change
                self.weight = nn.Parameter(self.weight.detach().clone(), False)
            self.weight.data.copy_(shard_like(restored, self.weight))

    def _why_not_load(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Why an update that was saved is none of this layer's rows, or of other base rows."""
        index = state_dict.get(prefix + "index")
        if index is not None and not torch.equal(index.cpu(), self.index.cpu()):
            return "the rows that were trained are others than this model's; patch it with those."
        weight = state_dict.get(prefix + "weight")
        names = [prefix + name for name, _ in self.trained_parameters()]
        if weight is None or is_partitioned(self.weight) or not state_dict.keys() >= set(names):
            return None
        factors: list[Tensor] = [state_dict[name] for name in names]
        if tuple(weight.shape) != full_shape(self.weight) or any(
            tuple(f.shape) != full_shape(p)
            for f, (_, p) in zip(factors, self.trained_parameters(), strict=True)
        ):
            return None  # torch says so
        rows = full_values(weight)[self.index.to(weight.device)].to(self.base_rows.device)
        names = [name for name, _ in self.trained_parameters()]
        whole = self.formed(dict(zip(names, map(full_values, factors), strict=True)))
        if same_rows(rows, updated_rows(self.base_rows, *whole.values())):
            return None
        return (
            "the update that was saved is of other base weights, or of another protection; patch "
            "the model it was trained on, not a merged one, with the same protect=."
        )


_MERGED_ALONE = (
    "the weights that were loaded hold trained rows merged into them and not the update itself, so "
    "training would go on from a rounding. Read the update beside the checkpoint: with "
    "handle.trainer_callback() for HF Trainer, loki_kernels.patch(model, rows=<checkpoint folder>) "
    "or handle.load_state(<checkpoint folder>). To start anew from these weights, merge and patch."
)


def same_rows(got: Tensor, want: Tensor) -> bool:
    """Whether rows are the same but for a rounding to the coarser of the two dtypes."""
    eps = max(torch.finfo(x.dtype).eps for x in (got, want))
    difference = got.float() - want.to(got.device).float()
    return float(difference.norm()) <= eps * float(want.float().norm())


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


def updated_rows(base: Tensor, delta_a: Tensor, delta_b: Tensor | None = None) -> Tensor:
    """``base + delta_a @ delta_b`` (``base + delta_a`` without a second factor), rounded once.

    In the base's dtype, where the base lies.
    """
    wide = torch.promote_types(torch.promote_types(base.dtype, delta_a.dtype), torch.float32)
    delta = delta_a if delta_b is None else delta_a.to(wide) @ delta_b.to(delta_a.device, wide)
    return (base.to(wide) + delta.to(base.device)).to(base.dtype)


def write_rows(layers: Sequence[LokiLinear]) -> None:
    """Put base plus update into the weights of layers without a rank."""
    groups: dict[Any, list[LokiLinear]] = {}
    for layer in layers:
        # The protected update is another tensor, at all rows as large as the weights in float32:
        # a layer at a time.
        alone = None if layer.directions is None else id(layer)
        key = layer.weight.device, layer.weight.dtype, layer.update.dtype, alone
        groups.setdefault(key, []).append(layer)
        layer.written = True
    for group in groups.values():
        # Through .data: the values a pending backward pass reads do not change unless `update` did,
        # which row_masked_linear notices, so the weights' versions must not.
        sync_rows(
            [layer.weight.data for layer in group],
            [layer.base_rows for layer in group],
            [leave_out(layer.update.data, layer.directions) for layer in group],
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
