"""A job's model: the base's, with what its arm trains."""

from __future__ import annotations

import copy
import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn

from .arms import Job
from .laboratory import Laboratory
from .layers import FactoredLinear, OrthogonalSubspaceLinear, UpdatedLinear, singular, start_of
from .moments import linears, projection, rank_of

Memo = dict[tuple[Any, ...], Any]


def prepare(job: Job, lab: Laboratory, generator: torch.Generator, memo: Memo) -> Any:
    """A job's model: the base's, with what is trained as copies or updates.

    Args:
        generator: of LoRA's factors.
        memo: masks and starts that jobs share, by what they are.
    """
    arm = job.arm
    shared = itertools.chain(lab.base.parameters(), lab.base.buffers())
    model = copy.deepcopy(lab.base, {id(tensor): tensor for tensor in shared})
    layers = linears(model)
    names = list(layers)
    rows_generator = torch.Generator().manual_seed(77 + job.seed)
    for name, linear in layers.items():
        part = name.rpartition(".")[2]
        wanted = {
            "down_proj": part == "down_proj",
            "mlp": part in ("gate_proj", "up_proj", "down_proj"),
            "linears": True,
        }[arm.targets]
        protected = arm.protect is not None and (part == "down_proj" or not arm.whole)
        if not wanted or (arm.whole and not protected):
            continue
        mask = _mask(job, lab, names, name, memo) if protected else None
        rows, entries = None, None
        if arm.entries is not None:
            entries = _entries(job, linear, rows_generator)
        elif arm.quota < 100:
            count = round(arm.quota / 100 * linear.out_features)
            if arm.rows == "random":
                order = torch.randperm(linear.out_features, generator=rows_generator)
            else:
                sensitivity = lab.moments[arm.moments].sensitivity[name]
                order = sensitivity.argsort(descending=arm.rows == "most")
            rows = order[:count].sort().values.to(lab.device)
        scale = None
        if arm.row_steps:
            sensitivity = lab.moments[arm.moments].sensitivity[name]
            chosen = sensitivity if rows is None else sensitivity[rows]
            scale = (chosen / chosen.median()).rsqrt().clamp(0.25, 4.0)
            scale = scale / scale.mean()
        parent, _, attribute = name.rpartition(".")
        start = _start(job, lab, name, linear, memo)
        layer: UpdatedLinear
        if arm.start == "svd":
            layer = OrthogonalSubspaceLinear(linear, start)
        else:
            layer = FactoredLinear(linear, rows, scale, arm.rank, mask, generator, start, entries)
        setattr(model.get_submodule(parent), attribute, layer)
    if arm.whole:
        _train_the_rest(model)
    return model


def _train_the_rest(model: nn.Module) -> None:
    """Copies of all parameters outside updated layers in their places, tied ones once."""
    copies: dict[int, nn.Parameter] = {}
    updated = [n for n, m in model.named_modules() if isinstance(m, UpdatedLinear)]
    for name, module in model.named_modules():
        if any(name == outer or name.startswith(f"{outer}.") for outer in updated):
            continue
        for own, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone())
            setattr(module, own, copies[id(parameter)])


def _entries(job: Job, linear: nn.Linear, generator: torch.Generator) -> Tensor:
    """Which entries of a weight are trained, ``[out, in]`` of zeros and ones."""
    weight = linear.weight.detach()
    if job.arm.entries == "random":
        scores = torch.rand(weight.shape, generator=generator).to(weight.device)
    else:
        scores = weight.abs()
    count = round(job.arm.quota / 100 * weight.numel())
    chosen = scores.flatten().topk(count, largest=False).indices
    entries = torch.zeros(weight.numel(), device=weight.device)
    entries[chosen] = 1
    return entries.view_as(weight)


def _start(job: Job, lab: Laboratory, name: str, linear: nn.Linear, memo: Memo) -> Any:
    """What the update is trained from, by the arm's ``start``."""
    arm = job.arm
    if arm.start is None:
        return None
    key = (arm.start, name)
    if key not in memo:
        if arm.start == "svd":
            memo[key] = singular(linear.weight.detach())
        else:
            moments = lab.moments[arm.moments]
            values, vectors = moments.values[name], moments.vectors[name]
            rank = cast(int, arm.rank)
            memo[key] = start_of(arm.start, linear.weight, values, vectors, rank)
    return memo[key]


def _mask(job: Job, lab: Laboratory, names: list[str], name: str, memo: Memo) -> Tensor:
    """M of a layer's update."""
    arm, other = job.arm, name
    if arm.protect == "other":  # the same matrix, seven layers on
        part = name.rpartition(".")[2]
        alike = [n for n in names if n.rpartition(".")[2] == part]
        other = alike[(alike.index(name) + 7) % len(alike)]
    moments = lab.moments[arm.moments]
    values, vectors = moments.values[other], moments.vectors[other]
    rank = rank_of(values, arm.share, arm.directions)
    number = 10_000 * job.seed + names.index(name)
    key = arm.moments, arm.protect, other, rank, number if arm.protect == "random" else 0
    if key not in memo:
        memo[key] = projection(cast(str, arm.protect), values, vectors, rank, number)
    return cast(Tensor, memo[key])
