"""The three definitions as they are usually computed, one layer and one full forward at a time.

Independent of the staircase: no shared prefix, no custom attention, plain hooks on the whole model.
It is the definition every faster path is tested against, and the benchmarks' peer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..discovery import find_structure
from ..options import DefinitionName
from .definitions import DEFINITIONS, Definition, path_rule


def attribute_reference(
    model: nn.Module,
    input_ids: Tensor,
    *,
    definition: DefinitionName | Definition = "published",
    steps: int = 7,
    target: int | None = None,
    layers: range | None = None,
) -> Tensor:
    """Scores ``[L, D]`` of one unpadded prompt ``[T]``, in the model's dtype or float32."""
    if isinstance(definition, str):
        definition = DEFINITIONS[definition]
    structure = find_structure(model)
    alphas, weights = path_rule(definition.rule, steps)
    ids = input_ids[None]
    sites = [down_proj.module for down_proj in structure.every_down_proj()]
    wide = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32

    def hook(module: nn.Module, change: Any) -> Any:
        if definition.site == "down_proj":
            return module.register_forward_hook(lambda _m, _a, output: change(output))
        return module.register_forward_pre_hook(lambda _m, args: (change(args[0]),))

    def keep(store: list[Tensor]) -> Any:
        def change(x: Tensor) -> Tensor:
            store.append(x.detach())
            return x

        return change

    def record(tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        values: list[Tensor] = []
        handles = [hook(site, keep(values)) for site in sites]
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[0, -1]
        for handle in handles:
            handle.remove()
        return values, logits

    ends, logits = record(ids)
    token = int(logits.argmax()) if target is None else target
    starts = [torch.zeros_like(end) for end in ends]
    if definition.baseline == "token_zero":
        starts, _ = record(torch.zeros_like(ids))

    scores = []
    for layer in layers or range(len(sites)):
        end, start = ends[layer], starts[layer]
        steps_ = alphas.to(end)[:, None, None]
        if definition.path == "sequence":
            path = start + steps_ * (end - start)  # [m, T, D]
        else:
            path = end.repeat(len(alphas), 1, 1)
            path[:, -1:] = start[:, -1:] + steps_ * (end - start)[:, -1:]
        path.requires_grad_()
        handle = hook(sites[layer], lambda _x, path=path: path)
        with torch.enable_grad():
            output = model(input_ids=ids.expand(len(alphas), -1), use_cache=False, logits_to_keep=1)
            last = output.logits[:, -1].to(wide)
            value = {
                "probability": last.softmax(-1),
                "log_probability": last.log_softmax(-1),
                "logit": last,
            }[definition.objective][:, token]
            (gradient,) = torch.autograd.grad(value.sum(), path)
        handle.remove()
        score = (weights.to(end.device, wide)[:, None] * gradient[:, -1].to(wide)).sum(0)
        if definition.multiply:
            score = score * (end - start)[0, -1].to(wide)
        scores.append(score)
    return torch.stack(scores)
