"""Second moments of the down-projections' inputs, and their top eigenvectors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attribution.placement import free_bytes
from ..structure import DownProjection, Structure
from .result import Protection

# Above this width a few eigenvectors are worth an iteration.
_EXACT = 4096
_ITERATIONS = 4


def layers_at_a_time(layers: Sequence[DownProjection]) -> Iterator[list[DownProjection]]:
    """As many layers at a time as have room: at 14,336 features a layer takes .8 GB and as much
    again for its eigenvectors."""
    group: list[DownProjection] = []
    taken = 0
    room = _room(layers[0].weight.device)
    for down_proj in layers:
        size = 8 * down_proj.in_features**2
        if group and taken + size > room:
            yield group
            group, taken = [], 0
        group.append(down_proj)
        taken += size
    yield group


def _room(device: torch.device) -> int:
    """Half of the bytes that are free."""
    free = free_bytes(device)
    if free is not None:
        return free // 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 8 * 10**9


@torch.no_grad()
def second_moments(
    structure: Structure,
    layers: Sequence[DownProjection],
    windows: Sequence[list[int]],
    batch_size: int,
) -> dict[str, Tensor]:
    """E[x x^T] of these layers' inputs, float32 ``[in_features, in_features]`` each."""
    sums: dict[str, Tensor] = {}
    kept: Tensor | None = None

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert kept is not None
            x = inputs[0].detach().flatten(0, -2)[kept.to(inputs[0].device).flatten()].float()
            if name not in sums:
                sums[name] = x.new_zeros(x.shape[1], x.shape[1])
            sums[name].addmm_(x.t(), x)

        return hook

    device: torch.device = structure.causal_lm.get_input_embeddings().weight.device  # type: ignore[assignment]
    ordered = sorted((w for w in windows if len(w) > 1), key=len)
    with contextlib.ExitStack() as hooks:
        for down_proj in layers:
            hook = down_proj.module.register_forward_pre_hook(watch(down_proj.name))
            hooks.callback(hook.remove)
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            ids = torch.zeros(len(batch), len(batch[-1]), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for i, window in enumerate(batch):
                ids[i, : len(window)] = torch.tensor(window)
                mask[i, : len(window)] = 1
            kept = mask.bool()
            kept[:, 0] = False  # where attention's sinks have inputs of another size
            structure.decoder(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            )
    count = sum(len(window) - 1 for window in ordered)
    return {name: total / count for name, total in sums.items()}


def moment_of(protection: Protection, name: str, device: torch.device) -> Tensor:
    directions = protection.directions[name].to(device)
    return (directions * protection.energies[name].to(device)) @ directions.t()


def top_eigenvectors(
    moment: Tensor, share: float, most: int | None
) -> tuple[Tensor, Tensor, float]:
    """The eigenvectors that hold ``share`` of the trace, their eigenvalues, and the trace."""
    if moment.device.type not in ("cpu", "cuda"):
        moment = moment.cpu()
    total = float(moment.trace())
    if most is None or len(moment) <= _EXACT:
        values, vectors = torch.linalg.eigh(moment)
    else:
        values, vectors = _subspace(moment, min(len(moment), most + 64))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    count = int((values.cumsum(0) < share * total).sum()) + 1
    # all directions would leave nothing to train
    count = min(count, most or count, len(values), len(moment) - 1)
    return vectors[:, :count].contiguous().cpu(), values[:count].contiguous().cpu(), total


def _subspace(moment: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues, rising, and eigenvectors, by subspace iteration."""
    generator = torch.Generator(moment.device).manual_seed(0)
    basis = torch.randn(len(moment), width, generator=generator, device=moment.device)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(moment @ torch.linalg.qr(basis)[0])[0]
    values, small = torch.linalg.eigh(basis.t() @ moment @ basis)
    return values, basis @ small
