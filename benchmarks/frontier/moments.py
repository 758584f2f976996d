"""What general text does at every linear layer: inputs' second moments, outputs' sensitivity."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The decoder's linear layers, by name; not the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


@dataclass(frozen=True)
class Moments:
    """Of one source, by layer name.

    Attributes:
        values: eigenvalues of E[x x^T], falling, ``[in]``.
        vectors: the eigenvectors, ``[in, in]``, in columns.
        sensitivity: s = E[(dNLL/dz)^2] of every output, ``[out]``, labels drawn from the model;
            empty where nothing asks for it.
    """

    values: dict[str, Tensor]
    vectors: dict[str, Tensor]
    sensitivity: dict[str, Tensor]


def measure_moments(
    model: Any,
    ids: Tensor,
    labels: Tensor,
    layers: Collection[str],
    *,
    weighted: bool = False,
    sensitivity: bool = False,
    batch_size: int = 8,
) -> Moments:
    """Of general text ``ids [n, 256]``; tokens without a label are padding, or a first token.

    With ``weighted`` E[||g||^2 x x^T], g the gradient at the layer's output; weights above their
    99.9 % quantile are clipped to it. Without it and ``sensitivity`` nothing runs backwards.
    """
    backwards = weighted or sensitivity
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    keep: Tensor | None = None
    generator = torch.Generator(ids.device).manual_seed(0)

    def watch(name: str, linear: nn.Linear) -> Any:
        def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            if not backwards:
                u = x[keep].double()
                sums[name] = sums.get(name, 0) + u.T @ u
                return

            def backward(gradient: Tensor) -> None:
                assert keep is not None
                g, u = gradient[keep].double(), x[keep].double()
                if weighted:
                    weight = g.square().sum(1)
                    u = u * weight.clamp_max(weight.quantile(0.999)).sqrt()[:, None]
                sums[name] = sums.get(name, 0) + u.T @ u
                squares[name] = squares.get(name, 0) + g.square().sum(0)

            output.register_hook(backward)

        return linear.register_forward_hook(forward)

    embeddings = model.get_input_embeddings().weight
    trained = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    embeddings.requires_grad_(backwards)  # so that gradients reach every layer
    watched = linears(model)
    hooks = [watch(name, watched[name]) for name in layers]
    count = 0
    for start in range(0, len(ids), batch_size):
        batch = ids[start : start + batch_size]
        keep = labels[start : start + batch_size] != -100
        count += int(keep[:, 1:].sum())
        if not backwards:
            model.model(input_ids=batch, use_cache=False)
            continue
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1][keep[:, 1:]]
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        nn.functional.cross_entropy(logits, drawn[:, 0], reduction="sum").backward()
        embeddings.grad = None
    for hook in hooks:
        hook.remove()
    for parameter, flag in trained.items():
        parameter.requires_grad_(flag)
    moments = Moments({}, {}, {k: (v / count).float() for k, v in squares.items()})
    last = ""
    for name in layers:
        if last and torch.equal(sums[name], sums[last]):  # of one input: q, k and v; gate and up
            moments.values[name] = moments.values[last]
            moments.vectors[name] = moments.vectors[last]
            continue
        values, vectors = torch.linalg.eigh(sums[name] / count)
        moments.values[name] = values.flip(0).clamp_min(0).float()
        moments.vectors[name] = vectors.flip(1).contiguous().float()
        last = name
    return moments


def rank_of(values: Tensor, share: float, most: int | None = None) -> int:
    """How many eigenvectors hold ``share`` of the energy, or ``most``; not all of them."""
    rank = min(int((values.cumsum(0) / values.sum() < share).sum()) + 1, len(values) - 1)
    return rank if most is None else min(rank, most)


def projection(kind: str, values: Tensor, vectors: Tensor, rank: int, seed: int) -> Tensor:
    """M of an arm's ``protect``, ``[in, in]``; for ``other`` these are another layer's moments."""
    if kind == "soft":
        return (vectors * (1 + values / values[rank - 1]).rsqrt()) @ vectors.T
    basis = vectors[:, :rank]
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(values), rank, generator=generator).to(vectors.device)
        basis = torch.linalg.qr(noise)[0]
    return torch.eye(len(values), device=vectors.device) - basis @ basis.T
