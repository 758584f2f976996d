"""`LokiExperts`: stacked experts of which the same rows are trained in every one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UnsupportedModelError
from ..mixture import grouped_experts, why_not_grouped
from ..ops._directions import acting_factors
from ..ops._grouped import Update
from ..sharding import full_shape, is_partitioned
from .arithmetic import take_rows, whole_update
from .rows import LokiRows


class LokiExperts(LokiRows):
    """A module of experts with an update of rows ``index`` of each one's down-projection trained.

    It holds the module's parameters and children under their own names, so that the state dict has
    one plain weight of all experts, as the family's has. The forward pass has two forms:

    - *grouped*, for the classes that transformers decorates by ``use_experts_implementation``:
      tokens are sorted by expert, and the update is added to the output (`grouped_experts`). No
      weight is written, copied or given a gradient, whatever implementation the model was loaded
      with.
    - *whole*, for others: the module's own forward pass, which reads a weight that holds the
      update: the frozen one with the rows written into it, or a merged copy under ``torch.compile``
      and where it is sharded. Autograd forms the whole weight's gradient, a layer at a time, of
      which the rows are kept.

    Attributes:
        why_whole: why the form is not the grouped one; None where it is.
        update: ``[E, k, in_features]``, trained, zero at first (rank None); float64 over a float64
            weight.
        delta_a: ``[E, k, r]``, zero at first, trained (LoKI*).
        delta_b: ``[E, r, in_features]``, trained (LoKI*).
        base_rows: ``[E, k, in_features]`` in the weight's dtype, the rows as they were.
        directions: each expert's protected ones ``[E, in_features, r]``, then columns of zeros; or
            None.
    """

    why_whole: str | None

    def __init__(
        self,
        experts: nn.Module,
        parameter: str,
        axis: int,
        rows: Tensor,
        rank: int | None = None,
        directions: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, weight in experts.named_parameters(recurse=False):
            self.register_parameter(name, weight)
        for name, buffer in experts.named_buffers(recurse=False):
            self.register_buffer(name, buffer, name not in experts._non_persistent_buffers_set)
        for name, child in experts.named_children():
            self.add_module(name, child)
        for own in self.parameters():
            own.requires_grad_(False)
        self._train_rows(rows, parameter, axis, rank, directions)
        # For its class's methods and settings. Not a submodule: it would name all of this twice.
        self.__dict__["experts"] = experts
        self.__dict__["bare"] = _Bare(experts)
        self.train(experts.training)
        self.why_whole = why_not_grouped(experts, parameter, axis)
        self.can_write = self.why_whole is not None and rank is None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            experts = self.__dict__.get("experts")
            if experts is None:
                raise
            return getattr(experts, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.check_forward()
        if is_partitioned(self.frozen):
            raise UnsupportedModelError(
                "ZeRO-3 cannot train rows of experts; use ZeRO-2 or FSDP2 (fully_shard)."
            )
        if self.why_whole is None and self.runs_as_it_lies:
            return grouped_experts(self, self.experts, None, *args, **kwargs)
        if self.why_whole is None:
            a, b, directions = self._update_factors()
            update = Update(a, self.index, directions, b)
            return grouped_experts(self, self.experts, update, *args, **kwargs)
        held = {**self._parameters, **self._buffers, self.parameter: self.trained_weight()}
        names = {*self.experts._parameters, *self.experts._buffers}
        own = {
            f"experts.{name}": value
            for name, value in held.items()
            if name in names and value is not None
        }
        return functional_call(self.__dict__["bare"], own, args, kwargs)

    @property
    def without_gradient(self) -> list[str]:
        """Of grouped experts all matrices, which their products take as they are."""
        if self.why_whole is not None:
            return super().without_gradient
        return [name for name, parameter in self.own_parameters() if parameter.ndim == 3]

    def own_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of those that the family's module has, without the update."""
        own = self.experts._parameters
        return [(name, p) for name, p in self.named_parameters(recurse=False) if name in own]

    def trained_weight(self) -> Tensor:
        """The weight with the update in it, as a function of the update."""
        if self.runs_as_it_lies:
            return self.frozen.detach()
        if not self.writes_rows:
            a, b, directions = self._update_factors()
            update = whole_update(*acting_factors(a, b, directions))
            rows = self.take_rows(self.frozen.detach()).to(update.dtype)
            return self.put_rows(self.frozen, rows + update)
        self._write_rows()
        weight: Tensor = _WrittenRows.apply(  # type: ignore[no-untyped-call]
            self._written_update(), self.frozen, self.index, self.axis
        )
        return weight

    def extra_repr(self) -> str:
        return (
            f"{self.parameter}={list(full_shape(self.frozen))}, rows={len(self.index)}, "
            f"form={'grouped' if self.why_whole is None else 'whole'}, "
            f"protected={self.protected}"
        )


class _Bare(nn.Module):
    """Experts without the hooks around them, which this layer has too."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.experts).forward(self.experts, *args, **kwargs)


class _WrittenRows(torch.autograd.Function):
    """A weight that holds an update, as a function of the update."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, weight: Tensor, index: Tensor, axis: int) -> Tensor:
        ctx.save_for_backward(update, index)  # it raises if the update has changed by then
        ctx.axis = axis
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        update, index = ctx.saved_tensors
        return take_rows(grad, index, ctx.axis).to(update.dtype), None, None, None
