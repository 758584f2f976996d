"""What transformers' experts compute, tokens sorted by expert, found by structure and by values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops._grouped import Update, grouped_linear
from .structure import TOLERANCE, in_float64


class Routed(NamedTuple):
    """What enters the experts' down-projections: a line for each choice of each token.

    Attributes:
        x: ``[tokens * K, in_features]``, sorted by expert.
        offsets: int32 ``[E]``, where each expert's lines end.
        expert: ``[tokens * K]``, each line's.
        order: ``[tokens * K]``, which of the flattened ``[tokens, K]`` choices a line is.
    """

    x: Tensor
    offsets: Tensor
    expert: Tensor
    order: Tensor


def routed_inputs(
    held: nn.Module, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor
) -> Routed:
    """The inputs of the experts' down-projections.

    Args:
        held: has the parameters ``gate_up_proj`` (``up_proj`` without a gate) and ``down_proj``.
        experts: the module of the family's class, for its methods and settings; it may be ``held``.
        hidden_states: ``[tokens, D]``.
        top_k_index: ``[tokens, K]``, each token's experts.
    """
    name, down = _up_name(experts), held.down_proj
    up, act = getattr(held, name), experts._apply_gate if "gate" in name else experts.act_fn
    expert, order = top_k_index.flatten().sort(stable=True)
    numbers = torch.arange(len(down), device=expert.device)  # type: ignore[arg-type]
    offsets = torch.searchsorted(expert, numbers, right=True).to(torch.int32)
    x = hidden_states[order // top_k_index.shape[1]].to(up.dtype)
    x = grouped_linear(x, up.transpose(1, 2) if experts.is_transposed else up, offsets)
    if experts.has_bias:
        x = x + getattr(held, f"{name}_bias")[expert]
    return Routed(act(x).to(down.dtype), offsets, expert, order)  # type: ignore[operator]


def grouped_experts(
    held: nn.Module,
    experts: nn.Module,
    update: Update | None,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """What transformers' experts compute, with an update of rows of their down-projections.

    Args:
        held: as in `routed_inputs`, and so are ``experts``, ``hidden_states``, ``top_k_index``.
        update: of rows of their down-projections, or None.
        top_k_weights: ``[tokens, K]``, the shares of each token's experts.

    Returns:
        ``[tokens, D]`` in hidden_states' dtype.
    """
    x, offsets, expert, order = routed_inputs(held, experts, hidden_states, top_k_index)
    down: Tensor = held.down_proj  # type: ignore[assignment]
    weight = down.transpose(1, 2) if experts.is_transposed else down
    y = grouped_linear(x, weight, offsets, update)
    if experts.has_bias:
        y = y + held.down_proj_bias[expert]  # type: ignore[index]
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)  # type: ignore[operator]
    y = y * top_k_weights.flatten()[order, None]
    # not index_add, whose order of sums differs from run to run on a GPU
    tokens, chosen = top_k_index.shape
    return y[order.argsort()].view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)


def why_not_grouped(experts: nn.Module, parameter: str, axis: int) -> str | None:
    """Why a module of experts is not what `grouped_experts` computes; None if it is.

    Args:
        experts: with their weights in memory.
        parameter: the name of their down-projection.
        axis: the dimension of it along which rows are numbered.
    """
    marks = ("has_bias", "is_transposed", "_apply_gate", "num_experts", "config")
    if parameter != "down_proj" or not all(hasattr(experts, mark) for mark in marks):
        return "its class is none that transformers decorates (use_experts_implementation)"
    if axis != (2 if experts.is_transposed else 1):
        return f"it numbers rows along dimension {axis}"
    weight: Tensor = experts.down_proj  # type: ignore[assignment]
    if weight.dtype not in TOLERANCE:
        return f"its weights are {weight.dtype}; load the model unquantized"
    generator = torch.Generator().manual_seed(0)
    count, width = len(weight), getattr(experts, _up_name(experts)).shape[3 - axis]
    x = torch.randn(5, width, generator=generator, device="cpu")
    shares = torch.rand(5, count, generator=generator, device="cpu")
    shares, chosen = shares.topk(min(2, count))
    given = (x.to(weight), chosen.to(weight.device), shares.to(weight))
    with torch.no_grad():
        want = in_float64(type(experts).forward(experts, *given))
        got = in_float64(grouped_experts(experts, experts, None, *given))
    if float((got - want).norm()) <= TOLERANCE[weight.dtype] * float(want.norm()):
        return None
    return "it does not compute what use_experts_implementation stands for"


def _up_name(experts: nn.Module) -> str:
    """Of the weight that the tokens are first multiplied by; before 5.3 all had a gate."""
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"


def experts_per_token(config: Any) -> int:
    """How many experts a token passes, of layers that differ (HunYuan's may) the least.

    1 where there are none, or the config says it otherwise.
    """
    for name in _TOP_K:
        value = getattr(config, name, None)
        if isinstance(value, list) and value:
            value = min(value)
        if isinstance(value, int):
            return value
    return 1


_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",  # Gemma 4's
    "moe_topk",
    "moe_k",
    "top_k",
)
