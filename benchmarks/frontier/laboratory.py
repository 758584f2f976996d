"""What trainings share: the base, the texts and the moments, and what is measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .data import DOMAINS, TASKS, Data
from .moments import Moments
from .stacked import heads

_LOGITS = 2**27  # that are in memory at a time, in float32 and some five copies


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
    def measure(self, model: Any, task: str, count: int) -> list[dict[str, float]]:
        """Nats a token, of each of ``count`` models: held-out loss and each domain's KL."""
        figures = [{"loss": loss} for loss in self.losses(model, task, count)]
        (base_head,) = heads(self.base, 1)
        own_heads = heads(model, count)
        size = min(2048, _LOGITS // len(base_head))
        for domain in DOMAINS:
            states = self._hidden(model, domain, count)[0]
            totals = torch.zeros(count, device=self.device)
            for start in range(0, states.shape[1], size):
                before = self._states[domain][start : start + size]
                p = (before @ base_head.T).log_softmax(-1)
                for i, head in enumerate(own_heads):
                    q = (states[i, start : start + size] @ head.T).log_softmax(-1)
                    totals[i] += functional.kl_div(q, p, reduction="sum", log_target=True)
            for figure, total in zip(figures, totals / states.shape[1], strict=True):
                figure[domain] = digits(total)
        return figures


def digits(value: Tensor) -> float:
    return float(f"{float(value):.6g}")
