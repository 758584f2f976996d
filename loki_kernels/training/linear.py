"""`LokiLinear`: an ``nn.Linear`` of which some rows are trained and the rest is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..ops import row_delta_linear, row_masked_linear, swiglu_row_masked_linear
from ..ops.gated_product import Activation
from ..sharding import full_shape
from .arithmetic import check_rank
from .rows import LokiRows


class LokiLinear(LokiRows):
    """``y = x @ W.T + b`` with an update of rows ``index`` of W trained, the rest frozen.

    ``weight`` is one dense frozen parameter. Without a rank the trained ``update``, zero at first,
    is a float32 parameter of its own: small steps survive 16-bit weights, and weight decay pulls
    to the base. In eager mode ``base_rows + update`` is written into ``weight`` at every forward
    pass (k * in_features elements, about 1 % of the product at 4,096 tokens and 10 % of the rows),
    but where HF Trainer's callback knows that nothing was trained. So the product is one dense GEMM
    on the merged weight whoever changed the update: an optimizer, ``load_state_dict``, ``.to()``.
    Where the weight must not be written, the update is added to the output instead,
    k / out_features more arithmetic, or from half of the rows on to a copy of the weight (the delta
    form): under ``torch.compile``, which would have to copy a weight that changes in the graph for
    the backward pass, and where the weight is sharded (FSDP, ZeRO-3) and a whole one exists only
    while a layer runs. With a rank r the update is ``delta_a @ delta_b`` (LoKI*), always so; and so
    it is where W lies transposed (Conv1D), since its rows are strided there.

    With protected ``directions`` U the update that is formed is ``update (I - U U^T)``, and
    ``delta_b (I - U U^T)`` of LoKI*: a part of the forward pass, so that any optimizer gets the
    projected gradient. The parameter itself may hold a part inside U, which does nothing; what is
    merged and saved has none.

    `patch` writes the rows of all layers in one launch before the decoder runs, protected ones in
    one each; a layer called by itself writes its own.

    Attributes:
        weight: ``[out_features, in_features]``, or the other way round where ``axis`` is 1, frozen;
            use `merged_weight` to read it.
        bias: ``[out_features]`` or None, frozen.
        index: int64 ``[k]``, sorted.
        base_rows: ``[k, in_features]`` in the weight's dtype, the rows as they were.
        update: ``[k, in_features]``, trained (rank None); float64 over a float64 weight.
        delta_a: ``[k, r]``, zero at first, trained (LoKI*).
        delta_b: ``[r, in_features]``, normal with variance 1 / in_features, trained (LoKI*).
        directions: U ``[in_features, r]`` in the weight's dtype, with columns of zeros up to a
            multiple of 16, or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    called = False  # whether it has run since it was last asked, outside of compiled code

    def __init__(
        self,
        linear: nn.Linear | Conv1D,
        rows: Tensor | Sequence[int],
        rank: int | None = None,
        directions: Tensor | None = None,
    ) -> None:
        """Take over ``linear``'s weight (shared, frozen) and train ``rows`` of it.

        Args:
            linear: floating-point ``nn.Linear``, or transformers' Conv1D.
            rows: distinct row numbers in [0, out_features).
            rank: None trains the update of the rows itself, r one of rank r.
            directions: orthonormal columns ``[in_features, r]`` that the update leaves alone.

        Raises:
            TypeError: if ``linear`` is neither.
            ValueError: for rows out of range or duplicated, a rank below 1, a non-floating weight,
                or directions of another width.
        """
        super().__init__()
        if not isinstance(linear, (nn.Linear, Conv1D)):
            raise TypeError(f"LokiLinear takes over an nn.Linear, not a {type(linear).__name__}.")
        check_rank(rank)
        axis = 1 if isinstance(linear, Conv1D) else 0
        weight = cast(nn.Parameter, linear.weight)  # torch declares a Tensor
        self.in_features, self.out_features = full_shape(weight)[1 - axis], full_shape(weight)[axis]
        if directions is not None and (directions.ndim != 2 or len(directions) != self.in_features):
            raise ValueError(
                f"directions must be [{self.in_features}, r]; they are {list(directions.shape)}."
            )
        # Shared with `linear`, not copied: a patched model is no larger than before.
        self.weight = weight
        self.bias = cast("nn.Parameter | None", linear.bias)
        self._train_rows(torch.as_tensor(rows), "weight", axis, rank, directions)
        self.can_write = axis == 0 and rank is None
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.train(linear.training)

    def check_forward(self) -> None:
        if not torch.compiler.is_compiling() and not self.called:  # in this order: else a guard
            self.called = True
        super().check_forward()

    def forward(self, x: Tensor) -> Tensor:
        self.check_forward()
        weight = self.weight.t() if self.axis else self.weight
        if self.runs_as_it_lies:
            return functional.linear(x, weight, self.bias)
        if not self.writes_rows:
            a, b, directions = self._update_factors()
            return row_delta_linear(x, weight, a, b, self.index, self.bias, directions=directions)
        self._write_rows()
        return row_masked_linear(x, weight, self._written_update(), self.index, self.bias)

    def forward_gated(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """``self(act(gate) * up)`` without keeping the product, where the layer ``writes_rows``."""
        self.check_forward()
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

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rows={len(self.index)}, rank={self.rank}, bias={self.bias is not None}, "
            f"protected={self.protected}"
        )
