"""Several models of one structure as one: their batches one after the other, ``[G * B, ...]``.

What is trained, or is another tensor in every model, is stacked in a first dimension of G; the rest
is shared. A GPU computes ten trainings of a small model at once in little more time than one, whose
kernels leave most of it idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .layers import UpdatedLinear


class Stacked(nn.Module):
    """G modules of one structure, each on its own part of the input ``[G * B, ...]``.

    Args:
        modules: the G.
        known: stacks of the model's other modules, for parameters that are tied.
    """

    def __init__(
        self, modules: Sequence[nn.Module], known: dict[tuple[int, ...], nn.Parameter]
    ) -> None:
        super().__init__()
        self.count = len(modules)
        self._one = (modules[0],)  # its own tensors are no part of this module
        self._shared: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}
        each = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in modules]
        trained = {}
        for name, first in each[0].items():
            tensors = [named[name] for named in each]
            if all(tensor is first for tensor in tensors):
                self._shared[name] = first
                continue
            key = tuple(map(id, tensors))
            own = self._names[name] = name.replace(".", "_")
            if not first.requires_grad:
                self.register_buffer(own, torch.stack(tensors))
                continue
            if key not in known:
                known[key] = nn.Parameter(torch.stack([t.detach() for t in tensors]))
            self.register_parameter(own, known[key])
            trained[name] = known[key]
        if isinstance(modules[0], UpdatedLinear):
            modules[0].constrain(trained)

    def merge(self, share: float) -> None:
        """Take so much of an update, if it is one."""
        one = self._one[0]
        if isinstance(one, UpdatedLinear):
            one.share = share

    def forward(self, x: Tensor) -> Tensor:
        def call(own: dict[str, Tensor], part: Tensor) -> Any:
            return functional_call(self._one[0], self._shared | own, (part,))

        own = {name: getattr(self, attribute) for name, attribute in self._names.items()}
        parts: Tensor = torch.vmap(call)(own, x.unflatten(0, (self.count, -1)))
        return parts.flatten(0, 1)


def stack(models: Sequence[Any]) -> Any:
    """The first of the models, made all of them."""
    if len(models) == 1:
        return models[0]
    first = models[0]
    known: dict[tuple[int, ...], nn.Parameter] = {}
    done: list[str] = []
    for name, module in list(first.named_modules()):
        if any(name.startswith(f"{outer}.") for outer in done):
            continue
        trained = any(p.requires_grad for p in module.parameters(recurse=False))
        if not trained and not isinstance(module, UpdatedLinear):
            continue
        parent, _, attribute = name.rpartition(".")
        stacked = Stacked([m.get_submodule(name) for m in models], known)
        setattr(first.get_submodule(parent), attribute, stacked)
        done.append(name)
    return first


def heads(model: Any, count: int) -> Sequence[Tensor]:
    """The output embeddings ``[V, D]`` of each of ``count`` models."""
    weight = model.get_output_embeddings().weight
    return weight.unbind(0) if weight.ndim == 3 else [weight] * count
