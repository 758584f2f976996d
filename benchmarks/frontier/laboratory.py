"""What trainings share: the base, the texts and the moments, and what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .data import DOMAINS, TASKS, Data
from .moments import Moments
from .stacked import heads

_LOGITS = 2**27  # that are in memory at a time, in float32 and some five copies


@dataclass(frozen=True)
class Look:
    """What is to be measured of several models as they are at one time.

    Attributes:
        losses: nats a token of a task's held-out texts.
        states: last hidden states ``[models, tokens, hidden]`` of each domain.
        heads: output embeddings ``[V, hidden]`` of each model.
    """

    losses: list[float]
    states: dict[str, Tensor]
    heads: Sequence[Tensor]


class Laboratory:
    """The base, the data and the moments, on one device.

    With ``bfloat16`` trainings run under autocast; what is measured is in float32.
    """

    def __init__(
        self, base: Any, data: Data, moments: dict[str, Moments], bfloat16: bool = False
    ) -> None:
        self.bfloat16 = bfloat16
        self.base = base.eval().requires_grad_(False)
        # The texts hold the padding token as one of their own. Of a stack torch.vmap would keep its
        # gradient out of the first model's embedding and no other's.
        base.get_input_embeddings().padding_idx = None
        self.device = next(base.parameters()).device
        self.data, self.moments = data, moments
        self._states = {name: self._hidden(self.base, name, 1)[0][0] for name in DOMAINS}
        self.before = {task: self.losses(self.base, task, 1)[0] for task in TASKS}

    @torch.no_grad()
    def _hidden(self, model: Any, name: str, count: int) -> tuple[Tensor, Tensor]:
        """Last hidden states of the places that predict a label, of each of ``count`` models.

        Sequences of like length go together, and nothing runs behind their last label.

        Returns:
            ``[count, tokens, hidden]``, and the labels ``[tokens]``.
        """
        ids, labels = self.data.ids[name], self.data.labels[name]
        places = torch.arange(ids.shape[1], device=ids.device)
        ends = ((labels != -100) * places).amax(1)
        states, wanted = [], []
        for chosen in ends.argsort(stable=True).split(16):
            end = int(ends[chosen[-1]])
            hidden = model.model(input_ids=ids[chosen, :end].repeat(count, 1), use_cache=False)
            following = labels[chosen, 1 : end + 1]
            labelled = following != -100
            states.append(hidden.last_hidden_state.unflatten(0, (count, -1))[:, labelled])
            wanted.append(following[labelled])
        return torch.cat(states, 1), torch.cat(wanted)

    @torch.no_grad()
    def losses(self, model: Any, task: str, count: int) -> list[float]:
        """Nats a token of a task's held-out texts, of each of ``count`` models."""
        states, wanted = self._hidden(model, f"{task}/test", count)
        figures = []
        for own, head in zip(states, heads(model, count), strict=True):
            loss = torch.zeros((), device=self.device)
            size = min(2048, _LOGITS // len(head))
            for part, target in zip(own.split(size), wanted.split(size), strict=True):
                loss += functional.cross_entropy(part @ head.T, target, reduction="sum")
            figures.append(digits(loss / len(wanted)))
        return figures

    @torch.no_grad()
    def look(self, model: Any, task: str, count: int) -> Look:
        """At ``count`` models as they are now."""
        return Look(
            self.losses(model, task, count),
            {domain: self._hidden(model, domain, count)[0] for domain in DOMAINS},
            [h.detach().clone() if h.requires_grad else h for h in heads(model, count)],
        )

    @torch.no_grad()
    def measure(self, looks: Sequence[Look]) -> list[list[dict[str, float]]]:
        """Nats a token, of each look and each of its models: held-out loss and each domain's KL.

        The base's distributions are formed once for all looks: of a vocabulary of 262,144 a CPU
        spends most of a measurement on them.
        """
        figures = [[{"loss": loss} for loss in look.losses] for look in looks]
        (base_head,) = heads(self.base, 1)
        size = min(2048, _LOGITS // len(base_head))
        for domain in DOMAINS:
            totals = [torch.zeros(len(look.heads), device=self.device) for look in looks]
            tokens = self._states[domain].shape[0]
            for start in range(0, tokens, size):
                part = slice(start, start + size)
                p = (self._states[domain][part] @ base_head.T).log_softmax(-1)
                probabilities = p.exp()
                for look, total in zip(looks, totals, strict=True):
                    for i, (states, head) in enumerate(
                        zip(look.states[domain], look.heads, strict=True)
                    ):
                        difference = (states[part] @ head.T).log_softmax(-1).neg_().add_(p)
                        total[i] += difference.mul_(probabilities).sum()
            for own, total in zip(figures, totals, strict=True):
                for figure, divergence in zip(own, total / tokens, strict=True):
                    figure[domain] = digits(divergence)
        return figures


def digits(value: Tensor) -> float:
    return float(f"{float(value):.6g}")
