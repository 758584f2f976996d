"""Linear layers with an arm's update."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


class UpdatedLinear(nn.Module):
    """``x @ (W + share * update)^T + b``, formed anew in every forward pass.

    Attributes:
        share: of the update that is merged.
    """

    rows: Tensor | None

    def __init__(self, linear: nn.Linear, rows: Tensor | None = None) -> None:
        super().__init__()
        self.linear, self.share = linear, 1.0
        self.register_buffer("rows", rows)

    def update(self) -> Tensor:
        """Of all rows, or of ``rows``."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """With the share of the update in it."""
        update = self.update()
        if self.share != 1:
            update = self.share * update
        weight: Tensor = self.linear.weight
        if self.rows is None:
            return weight + update
        return weight.index_put((self.rows,), weight[self.rows] + update)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight(), self.linear.bias)

    def constrain(self, named: Mapping[str, Tensor]) -> None:
        """Make the gradients of these parameters, or of stacks of them, what they have to be."""


class FactoredLinear(UpdatedLinear):
    """``diag(scale) delta M``, with delta dense or a product of two factors.

    Args:
        linear: the layer.
        rows: that are trained; None for all.
        scale: of each row.
        rank: of the product; None for a dense delta.
        mask: M ``[in, in]``.
        generator: of the second factor, which is drawn as PEFT draws LoRA's A.
        start: both factors, whose product the update is without.
        entries: ``[out, in]``, which are trained; None for all.
    """

    entries: Tensor | None
    mask: Tensor | None
    scale: Tensor | None
    origin: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        rows: Tensor | None,
        scale: Tensor | None,
        rank: int | None,
        mask: Tensor | None,
        generator: torch.Generator,
        start: tuple[Tensor, Tensor] | None = None,
        entries: Tensor | None = None,
    ) -> None:
        super().__init__(linear, rows)
        self.register_buffer("entries", entries)
        self.register_buffer("mask", mask)
        self.register_buffer("scale", None if scale is None else scale[:, None])
        self.register_buffer("origin", None if start is None else start[0] @ start[1])
        out, inputs = linear.weight.shape
        device = linear.weight.device
        self.factor: nn.Parameter | None = None
        if start is not None:
            self.delta, self.factor = (nn.Parameter(t.clone()) for t in start)
        elif rank is None:
            count = out if rows is None else len(rows)
            self.delta = nn.Parameter(torch.zeros(count, inputs, device=device))
        else:
            bound = 1 / math.sqrt(inputs)
            factor = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
            self.delta = nn.Parameter(torch.zeros(out, rank, device=device))
            self.factor = nn.Parameter(factor.to(device))

    def update(self) -> Tensor:
        delta: Tensor = self.delta if self.factor is None else self.delta @ self.factor
        if self.origin is not None:
            delta = delta - self.origin
        if self.entries is not None:
            delta = delta * self.entries
        if self.scale is not None:
            delta = delta * self.scale
        return delta if self.mask is None else delta @ self.mask


class OrthogonalSubspaceLinear(UpdatedLinear):
    """OSF (2504.07097): the lower half of the weight's singular triplets is trained.

    As in PEFT 0.21, gradients of the singular vectors are kept orthogonal to the upper half's, and
    the update is the product as it is now without what it was.

    Args:
        linear: the layer.
        triplets: `singular` of its weight.
    """

    origin: Tensor

    def __init__(self, linear: nn.Linear, triplets: tuple[Tensor, Tensor, Tensor]) -> None:
        super().__init__(linear)
        left, values, right = triplets
        kept = min(linear.weight.shape) // 2
        self.left = nn.Parameter(left[:, kept:].contiguous())
        self.values = nn.Parameter(values[kept:].contiguous())
        self.right = nn.Parameter(right[kept:].contiguous())
        self.register_buffer("origin", (self.left * self.values @ self.right).detach())
        self._upper = left[:, :kept].contiguous(), right[:kept].contiguous()
        self.constrain(dict(self.named_parameters()))

    def constrain(self, named: Mapping[str, Tensor]) -> None:
        left, right = self._upper
        named["left"].register_hook(lambda g: g - left @ (left.T @ g))
        named["right"].register_hook(lambda g: g - (g @ right.T) @ right)

    def update(self) -> Tensor:
        return self.left * self.values @ self.right - self.origin


def start_of(
    kind: str, weight: Tensor, values: Tensor, vectors: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """The factors that a method starts from, ``[out, rank]`` and ``[rank, in]``.

    Args:
        kind: ``null``: LoRA-Null (2503.02659), the weight's part in the ``rank`` directions that
            hold least of the inputs' energy; ``corda``: CorDA (2406.05223) for keeping knowledge,
            the least components of W C taken back by C^-1, C damped as PEFT does.
        weight: ``[out, in]``.
        values, vectors: of the inputs' second moments C.
        rank: of the product.
    """
    weight = weight.detach()
    if kind == "null":
        least = vectors[:, -rank:]
        left, sizes, right = singular(weight @ least)
        root = sizes.sqrt()
        return left * root, root[:, None] * (right @ least.T)
    damped = values + 0.01 * values.mean()
    moment = (vectors * damped) @ vectors.T
    left, sizes, right = singular(weight @ moment)
    root = sizes[-rank:].sqrt()
    back = (right[-rank:] @ vectors / damped) @ vectors.T
    return left[:, -rank:] * root, root[:, None] * back


def singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition, the values falling.

    By the eigenvectors of the smaller of both Gram matrices, in float64: a GPU takes a tenth of a
    second and more for the decomposition itself, which a study of 210 layers does in every run.
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, values, right = singular(matrix.T)
        return right.T, values, left.T
    wide = matrix.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    squares, left = squares.flip(0), vectors.flip(1)
    values = squares.clamp_min(1e-20 * float(squares[0])).sqrt()
    right = (left.T @ wide) / values[:, None]
    return left.to(matrix.dtype), values.to(matrix.dtype), right.to(matrix.dtype)
