"""`LokiRows`: a module of which some rows of one weight are trained and the rest is frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ..errors import explained
from ..ops import sync_rows
from ..ops._directions import LeaveOutOfGradient, leave_out, padded
from ..protection import Protection
from ..sharding import (
    DTensor,
    full_shape,
    full_values,
    is_partitioned,
    is_sharded,
    own_part,
    shard_like,
)
from .arithmetic import (
    digest_of,
    initial_factors,
    moved_index,
    place_of,
    same_rows,
    sorted_index,
    take_rows,
    updated_rows,
    version_of,
    where_it_fits,
    whole_update,
    write_into,
)
from .loading import DIGEST, MERGED_ALONE, PASSED_OVER, check_there, why_not_load

# Names of the parameters that are trained; a merged state dict has none of them.
TRAINED = ("update", "delta_a", "delta_b")
# What a patched module's state dict has beside the merged weight.
BESIDE = ("index", DIGEST)


class LokiRows(nn.Module):
    """What `LokiLinear` and `LokiExperts` share: an update of rows of one weight, and its state.

    The weight is frozen and lies in the module under the name that the model's family gives it.
    Rows are numbered along one ``axis`` of it; as tensors they are ``[k, in_features]``, and
    ``[E, k, in_features]`` of the stacked weights of E experts, whatever the axis.

    ``state_dict`` holds the merged weight under its own name, and beside it ``index`` and the
    trained parameters, so that training goes on bit for bit. A state dict of the merged weight
    alone can be read too, to evaluate; it does not hold the update exactly, and training from it
    raises.

    Attributes:
        parameter: the weight's name in this module.
        axis: the dimension of the weight along which rows are numbered.
        index: int64 ``[k]``, sorted.
        protection_digest: uint8 ``[32]``, the protection's fingerprint, where there is one.
        base_rows: the rows as they were, in the weight's dtype.
        rank: of LoKI*, or None.
        directions: protected ones ``[..., in_features, r]``, then columns of zeros; or None.
        protected: how many there are, of one expert at most.
    """

    base_rows: Tensor
    directions: Tensor | None
    protected: int
    parameter: str
    axis: int
    rank: int | None
    can_write: bool  # whether the rows can be written into the weight before a product
    held = False  # whether they stay as they are, inside `Patch.inference`
    in_step = False  # whether `write_rows` has just written these rows for a decoder's forward pass
    written = False  # whether the weight may hold an update
    lent = False  # whether it may until the next pass, in a state dict that is read before
    merged_alone: Tensor | None = None  # rows of a merged weight that was loaded without its update
    loaded_alone = False  # the same, also where these rows are what the update gives
    misfits = False  # whether what acts is not those rows, so that not even evaluating makes sense
    passed_over = False  # whether a state dict was loaded that had nothing of these rows
    protection: Protection | None = None  # which the directions are a part of
    trained_with: tuple[str, str] | None = None  # else fingerprint and file of what was loaded
    _read_version: int | None = -1  # of the update
    _written_from: int | None = None  # where the update lies that the weight was last written with
    sharded = False  # whether the decoder's last forward pass found the weight sharded

    def _train_rows(
        self, rows: Tensor, parameter: str, axis: int, rank: int | None, directions: Tensor | None
    ) -> None:
        """Begin to train rows of a parameter that the module has by now."""
        self.parameter, self.axis, self.rank = parameter, axis, rank
        # Its own and not the class's, whose first change would have compiled code compiled anew.
        self.written = self.sharded = False
        weight = self.frozen
        if not weight.is_floating_point():
            raise ValueError(
                f"the weight is {weight.dtype}; only floating-point weights can be trained in rows."
            )
        self._index = index = sorted_index(rows, full_shape(weight)[axis]).to(weight.device)
        weight.requires_grad_(False)
        self._buffers["index"] = index.clone()
        base = take_rows(full_values(weight), index, axis).contiguous()
        self.register_buffer("base_rows", base, persistent=False)
        held = None if directions is None else padded(directions.to(weight.device, weight.dtype))
        self.register_buffer("directions", held, persistent=False)
        self.protected = 0 if directions is None else directions.shape[-1]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if rank is None:
            self.update = nn.Parameter(torch.zeros_like(base, dtype=dtype))
        else:
            factors = (x.to(index.device, dtype) for x in initial_factors(base.shape, rank))
            self.delta_a, self.delta_b = map(nn.Parameter, factors)

    @property
    def frozen(self) -> nn.Parameter:
        """The weight that rows are trained of; use `merged_weight` to read it."""
        return cast(nn.Parameter, self._parameters[self.parameter])

    @property
    def index(self) -> Tensor:
        """int64 ``[k]``, sorted, where ``base_rows`` lie.

        The buffer of this name stands for it in a state dict alone, as the digest's does: torch's
        AveragedModel averages buffers, by which row 7 becomes row 6.
        """
        device = self.base_rows.device
        if self._index.device != device and device.type != "meta":
            self._index = moved_index(self._index, device)
        return self._index

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._index = self.index  # moved now, since torch.compile would trace it
        return self

    @property
    def writes_rows(self) -> bool:
        """Whether the rows are written into the weight before a product, as things are."""
        return not torch.compiler.is_compiling() and self.can_write and not self.sharded

    @property
    def runs_as_it_lies(self) -> bool:
        """Whether a pass multiplies by the weight as it is, inside `Patch.inference`."""
        return self.held and not torch.is_grad_enabled()

    def protect(self, protection: Protection) -> None:
        """Note what the directions are a part of, which a state dict tells apart from another."""
        self.protection = protection
        self.register_buffer(DIGEST, cast(Tensor, self.digest()).to(self.base_rows.device))

    def digest(self) -> Tensor | None:
        return None if self.protection is None else digest_of(self.protection.fingerprint)

    def check_loaded(self, *, to_train: bool = False) -> None:
        """Raise RuntimeError if what was loaded last is not enough to be used, or to train from."""
        check_there(self)
        if self.passed_over:
            raise RuntimeError(PASSED_OVER)
        if self.misfits or (to_train and self.merged_alone is not None):
            raise explained(RuntimeError(MERGED_ALONE))

    def check_forward(self) -> None:
        """Raise RuntimeError if what was loaded last is not enough for a forward pass."""
        self.check_loaded(to_train=self.training and torch.is_grad_enabled())

    def _update_factors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The update of what the weight holds: (a, b, directions), a @ b or a if b is None.

        Less the directions, which the product that needs it leaves out: formed here, a protected
        update of all rows would be kept for the backward pass, 7.5 GB at 8B.
        """
        if self.written:
            update = whole_update(*self.formed(dict(self.trained_parameters())).values())
            held = self.take_rows(self.frozen.detach()).to(update)
            return update + (self.base_rows.to(update) - held), None, None
        if self.rank is not None:
            return self.delta_a, self.delta_b, self.directions
        return self.update, None, self.directions

    def _written_update(self) -> Tensor:
        """What stands for the update in a product with a weight that holds it."""
        if self.directions is None:
            return self.update
        return cast(Tensor, LeaveOutOfGradient.apply(self.update, self.directions))  # type: ignore[no-untyped-call]

    def formed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the trained parameters, by name, without the directions that do nothing.

        They are made where the directions lie, since a CPU takes minutes for a large model's.
        """
        directions = self.directions
        return {
            name: tensor
            if directions is None or name == "delta_a"
            else leave_out(tensor.to(directions.device), directions).to(tensor.device)
            for name, tensor in values.items()
        }

    @torch.no_grad()
    def formed_update(self) -> dict[str, Tensor]:
        """``update``, or ``delta_a`` and ``delta_b``, as they act; whole where sharded."""
        return self.formed({name: full_values(p) for name, p in self.trained_parameters()})

    def mark_read(self) -> None:
        """Note that the update was read from a file, which is all of it that there is to know."""
        self.merged_alone, self.loaded_alone, self.passed_over = None, False, False
        self.misfits = False
        self.note_as_read()

    def note_as_read(self) -> None:
        """Note that the update is as it was read, whose values were changed and put back."""
        self._read_version = version_of(self.trained_parameters()[-1][1])

    def is_as_read(self) -> bool:
        """Whether the update is one that was read, and not trained since."""
        return self._read_version == version_of(self.trained_parameters()[-1][1])

    @property
    def without_gradient(self) -> list[str]:
        """Names of the module's own parameters to which no backward pass gives a gradient."""
        return [self.parameter]

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of ``update``, or of ``delta_a`` and ``delta_b``."""
        return [(name, p) for name, p in self.named_parameters(recurse=False) if name in TRAINED]

    def is_like(self, values: Mapping[str, Tensor]) -> bool:
        """Whether there is a value of each trained parameter, of its shape."""
        own = self.trained_parameters()
        return all(n in values and tuple(values[n].shape) == full_shape(p) for n, p in own)

    def merged_rows(self) -> Tensor:
        """The rows as trained so far, in the weight's dtype; ``[..., k, in_features]``."""
        self.check_loaded()
        return self._updated_rows()

    @torch.no_grad()
    def _updated_rows(self) -> Tensor:
        return updated_rows(self.base_rows, *self.formed_update().values())

    def merged_weight(self, *, among_others: bool = False) -> Tensor:
        """The weight as trained so far, sharded if it is; a copy where it will hold the base.

        One among other layers' is copied on the host where the device has no room for all.
        """
        self.check_loaded()
        if self.rank is None and not is_sharded(self.frozen):
            # of a model that was just patched there is nothing to write, nor a protected update to
            # form: accelerate asks for its state dict on the CPU before it shards it
            moved = self.written or self.update.is_meta or bool(self.update.any())
            in_place = self.can_write or self.lent
            if moved and in_place:
                write_rows([self])
            if in_place or not moved:
                return self.frozen.detach()
        weight = full_values(self.frozen)
        if among_others and not is_sharded(self.frozen):
            return self.put_rows(where_it_fits(weight), self.merged_rows())
        return shard_like(self.put_rows(weight, self.merged_rows()), self.frozen)

    def take_rows(self, weight: Tensor) -> Tensor:
        """These rows of a whole weight, where it lies."""
        return take_rows(weight, self.index.to(weight.device), self.axis)

    def put_rows(self, weight: Tensor, rows: Tensor) -> Tensor:
        """A copy of a whole weight with other values of these rows."""
        along = rows.to(weight).movedim(-2, self.axis)
        return weight.index_copy(self.axis, self.index.to(weight.device), along)

    def _write_rows(self) -> None:
        # A layer that gradient checkpointing runs again, inside the backward pass, is as its
        # forward pass left it, unless another update was written since.
        same = self.written and self._written_from == place_of(self.update)
        again = same and torch._C._current_graph_task_id() != -1
        if not self.in_step and not again:
            write_rows([self])

    @torch.no_grad()
    def write_base(self) -> None:
        """Put the rows of the weight back to what they were before training.

        Of a sharded weight this process's part of them, without asking the others.
        """
        if isinstance(self.frozen, DTensor):
            whole = torch.zeros(full_shape(self.frozen), dtype=torch.bool)
            chosen = self.put_rows(whole, torch.ones_like(self.base_rows, dtype=torch.bool))
            base = self.put_rows(whole.to(self.base_rows.dtype), self.base_rows)
            chosen, base = (own_part(shard_like(part, self.frozen)) for part in (chosen, base))
            own_part(self.frozen).copy_(base.where(chosen, own_part(self.frozen)))
        else:
            write_into(self.frozen.data, self.base_rows, self.index, self.axis)
        self.written = False

    def take_back(self) -> None:
        """`write_base` where the weight holds the update, whole and for nobody who is inside."""
        if self.written and not (self.held or is_sharded(self.frozen)):
            self.write_base()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for part, own in {"index": self.index, DIGEST: self.digest()}.items():
            if own is not None:
                # Copies: torch's distributed checkpoints are read into the tensors of a state dict,
                # and what was read is then compared with the model's own.
                destination[prefix + part] = own.to(self.base_rows.device, copy=True)
        if is_partitioned(self.frozen):  # DeepSpeed keeps every parameter's parts by itself
            return
        weight = self.merged_weight(among_others=True)
        if not self.can_write or is_sharded(self.frozen):
            destination[prefix + self.parameter] = weight

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
        own = {prefix + name for name in (*BESIDE, *TRAINED)}
        weight = state_dict.get(prefix + self.parameter)
        error = why_not_load(self, state_dict, prefix)
        if error is not None:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            return
        missing: list[str] = []
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [name for name in missing if name not in own]
        if is_partitioned(self.frozen) or len(error_msgs) > errors:
            return
        if weight is None:
            if all(prefix + name in state_dict for name, _ in self.trained_parameters()):
                # of the base that there is, whatever merged rows were loaded before
                self.merged_alone, self.loaded_alone, self.misfits = None, False, False
            return
        with torch.no_grad():
            merged = full_values(self.frozen)
            rows = self.take_rows(merged).to(self.base_rows.device)
            self.loaded_alone = bool(own & set(missing))
            self.merged_alone, self.misfits = None, False
            if self.loaded_alone and not self._fits(rows):
                self.merged_alone, self.misfits = rows.cpu(), self.rank is not None
            if self.rank is None and self.merged_alone is not None:
                update = rows.to(self.update.dtype) - self.base_rows.to(self.update.dtype)
                self.update.copy_(shard_like(update, self.update))
                # Rows that another update moved along the directions. In 16 bits a whole rounding
                # would hide a gentle one; what rounding itself moves is a tenth of it.
                within = 1.0 if rows.element_size() > 2 else 0.25
                self.misfits = not same_rows(rows, self._updated_rows(), within=within)
            if local_metadata.get("assign_to_params_buffers") and not self.can_write:
                # else the caller's state dict would change
                setattr(self, self.parameter, nn.Parameter(self.frozen.detach().clone(), False))
            if (self.can_write or self.held) and not isinstance(self.frozen, DTensor):
                self.written = True
                return
            restored = self.put_rows(merged, self.base_rows)  # of the delta form it is the base
            self.frozen.data.copy_(shard_like(restored, self.frozen))
            self.written = False

    @torch.no_grad()
    def pass_over(self, in_files: Sequence[Tensor | None]) -> None:
        """Note that a state dict of their decoder layer has not these rows as memory names them.

        It may have them as the family's files name them: the weight, or that of each expert, where
        it has it. Those of the update that was read last change nothing. What is silent about these
        rows, as a shard of a checkpoint may be, tells nothing of an update that was read.
        """
        shape, axis = full_shape(self.frozen), self.axis - self.frozen.ndim
        held = {
            expert: take_rows(weight, self.index.to(weight.device), axis)
            for expert, weight in enumerate(in_files)
            if weight is not None and tuple(weight.shape) in (shape, shape[1:])
        }
        if not held or is_sharded(self.frozen):
            self.passed_over |= not (self.is_as_read() or self.loaded_alone)
            return
        parts = list(held.values())
        whole = parts[0].ndim == len(shape)
        rows = (parts[0] if whole else torch.stack(parts)).to(self.base_rows.device)
        if self.is_as_read() and self._fits(rows, None if whole else list(held)):
            return
        self.passed_over = True
        # A side file of these weights is known by them.
        self.merged_alone = rows.cpu() if len(held) == len(in_files) else None

    def _fits(self, rows: Tensor, experts: list[int] | None = None) -> bool:
        """Whether merged rows, of these experts or of all, are those of the update there is."""
        some = slice(None) if experts is None else experts
        within = 0.0 if self.rank is None and self.directions is None else _BY_PRODUCTS
        if same_rows(rows, self._updated_rows()[some], within=within):
            return True
        if self.directions is None or not self.is_as_read():
            return False
        as_it_acts = [full_values(p) for _, p in self.trained_parameters()]  # as a file holds it
        read = updated_rows(self.base_rows, *as_it_acts)
        return same_rows(rows, read[some], within=within)


# What another device's products may move the rows that one update gives, in roundings of theirs.
# A whole one would be too much: in 16 bits two checkpoints' updates differ by less.
_BY_PRODUCTS = 0.02


def _note_update(layer: LokiRows) -> None:
    """Note which update is written, and tell autograd where another one was there before.

    A backward pass that is to come would multiply by the other's rows: a teacher's, an average's.
    """
    before, layer._written_from = layer._written_from, place_of(layer.update)
    if before not in (None, layer._written_from) and not layer.frozen.is_inference():
        torch.autograd.graph.increment_version(layer.frozen)


@torch.no_grad()
def write_rows(layers: Iterable[LokiRows]) -> None:
    """Put base plus update into the weights, of all or of none."""
    groups: dict[Any, list[LokiRows]] = {}
    for layer in list(map(check_there, layers)):
        layer.written = True
        if layer.rank is None:
            _note_update(layer)
        # DeepSpeed casts parameters and leaves buffers as they are.
        cast_alone = layer.base_rows.dtype != layer.frozen.dtype
        if layer.rank is not None or layer.axis or layer.frozen.ndim > 2 or cast_alone:
            write_into(layer.frozen.data, layer.merged_rows(), layer.index, layer.axis)
            continue
        # A protected update is formed anew, of all rows as large as the weights: a layer at a time.
        alone = None if layer.directions is None else id(layer)
        key = layer.frozen.device, layer.frozen.dtype, layer.update.dtype, alone
        groups.setdefault(key, []).append(layer)
    for group in groups.values():
        # Through .data: the values a pending backward pass reads do not change unless `update` did,
        # which row_masked_linear notices, or is another, so the weights' versions must not.
        sync_rows(
            [layer.frozen.data for layer in group],
            [layer.base_rows for layer in group],
            [leave_out(layer.update.data, layer.directions) for layer in group],
            [layer.index for layer in group],
        )
