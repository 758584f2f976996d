"""Every way to train: which weights, and how they are parameterized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import loki_kernels as loki
from loki_kernels import Attribution


@dataclass(frozen=True)
class Method:
    """One way to train, as the study's file describes it.

    Attributes:
        kind: ``full``, ``down_proj``, ``lora``, ``dora``, ``pissa`` or ``rows``.
        learning_rates: those that validation chooses from.
        strategy: of `loki_kernels.select`, for ``rows``.
        criterion: of `loki_kernels.select`, for ``rows``.
        definition: of the attribution, for ``rows``.
        quota: percentage, for ``rows``.
        rank: of the adapter; for ``rows``, LoKI*'s.
    """

    kind: str
    learning_rates: tuple[float, ...]
    strategy: str = "layer_balanced"
    criterion: str = "signed"
    definition: str = "published"
    quota: float = 10.0
    rank: int | None = None


def prepare(
    model: Any, method: Method, attribution: Attribution | None, seed: int
) -> tuple[Any, list[nn.Parameter]]:
    """The model to train and evaluate, and what of it is trained. ``model`` is used up."""
    torch.manual_seed(seed)
    if method.kind in ("lora", "dora", "pissa"):
        import peft

        config = peft.LoraConfig(
            r=method.rank or 16,
            lora_alpha=method.rank or 16,
            target_modules="all-linear",
            use_dora=method.kind == "dora",
            init_lora_weights="pissa" if method.kind == "pissa" else True,
        )
        model = peft.get_peft_model(model, config)
    elif method.kind == "rows":
        assert attribution is not None
        rows = loki.select(attribution, method.quota, method.strategy, method.criterion, seed)  # type: ignore[arg-type]
        loki.patch(model, rows, rank=method.rank)
    elif method.kind == "down_proj":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("down_proj" in name)
    else:
        assert method.kind == "full", method.kind
    return model, [p for p in model.parameters() if p.requires_grad]
