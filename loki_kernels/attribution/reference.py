"""The three definitions as they are usually computed, one layer and one full forward at a time.

Independent of the staircase: no shared prefix, no custom attention, plain hooks on the whole model.
It is the definition every faster path is tested against, and the benchmarks' peer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..discovery import find_structure
from ..options import DEFAULT_DEFINITION, DefinitionName
from .definitions import DEFINITIONS, Definition, path_rule
from .steering import hook_site, hooking, like


def attribute_reference(
    model: nn.Module,
    input_ids: Tensor,
    *,
    definition: DefinitionName | Definition = DEFAULT_DEFINITION,
    steps: int = 7,
    target: int | None = None,
    layers: range | None = None,
) -> Tensor:
    """Scores ``[L, D]`` of one unpadded prompt ``[T]``, in the model's dtype or float32.

    L are the layers that have an FFN, or ``layers`` of them.
    """
    if isinstance(definition, str):
        definition = DEFINITIONS[definition]
    structure = find_structure(model)
    alphas, weights = path_rule(definition.rule, steps)
    ids = input_ids[None]
    nodes = structure.present()
    wide = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32

    def hook(layer: int, change: Any) -> Any:
        return hook_site(nodes[layer], definition.site, change)

    def keep(store: list[Tensor]) -> Any:
        def change(x: Tensor) -> Tensor:
            store.append(x.detach().clone().view(1, -1, x.shape[-1]))
            return x

        return change

    def record(tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        values: list[Tensor] = []
        hooks = (handle for layer in nodes for handle in hook(layer, keep(values)))
        with torch.no_grad(), hooking(hooks):
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[0, -1]
        return values, logits

    ends, logits = record(ids)
    token = int(logits.argmax()) if target is None else target
    starts = [torch.zeros_like(end) for end in ends]
    if definition.baseline == "token_zero":
        starts, _ = record(torch.zeros_like(ids))

    scores = []
    for layer in layers or nodes:
        place = list(nodes).index(layer)
        end, start = ends[place], starts[place]
        steps_ = alphas.to(end)[:, None, None]
        if definition.path == "sequence":
            path = start + steps_ * (end - start)  # [m, T, D]
        else:
            path = end.repeat(len(alphas), 1, 1)
            path[:, -1:] = start[:, -1:] + steps_ * (end - start)[:, -1:]
        path.requires_grad_()
        put = hook(layer, lambda x, path=path: like(path, x).clone())
        with torch.enable_grad(), hooking(put):
            output = model(input_ids=ids.expand(len(alphas), -1), use_cache=False, logits_to_keep=1)
            last = output.logits[:, -1].to(wide)
            value = {
                "probability": last.softmax(-1),
                "log_probability": last.log_softmax(-1),
                "logit": last,
            }[definition.objective][:, token]
            (gradient,) = torch.autograd.grad(value.sum(), path)
        score = (weights.to(end.device, wide)[:, None] * gradient[:, -1].to(wide)).sum(0)
        if definition.multiply:
            score = score * (end - start)[0, -1].to(wide)
        scores.append(score)
    return torch.stack(scores)
