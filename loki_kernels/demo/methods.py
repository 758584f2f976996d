"""The three methods that the demo compares, and a share of what each has trained."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import peft
import torch
from torch import nn

from ..protection import Protection
from ..training import patch

FULL, LORA, LOKI = "full fine-tuning", "LoRA, r = 16", "LoKI, protected"

# Chosen on another split of the task (seed 1), see benchmarks/NOTES.md: of full fine-tuning the one
# that forgets least at equal loss, of two.
LEARNING_RATES = {FULL: 5e-5, LORA: 1e-3, LOKI: 5e-4}


@contextlib.contextmanager
def trainable(method: str, base: nn.Module, protection: Protection) -> Iterator[nn.Module]:
    """What ``method`` trains: a copy of the base, or the base itself, which is given back."""
    torch.manual_seed(0)  # LoRA's first factors
    if method == FULL:
        yield copy.deepcopy(base).requires_grad_(True)
    elif method == LORA:
        config = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
        model = peft.get_peft_model(base, config)
        yield model
        model.unload()
    else:
        with patch(base, protect=protection) as handle:
            yield handle.model


class Update:
    """What is trained of a model, from before its training on, to leave only a share of it."""

    def __init__(self, model: nn.Module) -> None:
        # LoRA's update is a product, and one factor of it is enough.
        self._start = {
            parameter: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and "lora_A" not in name
        }
        self._end: dict[nn.Parameter, torch.Tensor] = {}

    @torch.no_grad()
    def keep(self, share: float) -> None:
        """Scale the trained update to a share of it; 1 is all."""
        if not self._end:
            self._end = {p: p.detach().clone() for p in self._start}
        for parameter, start in self._start.items():
            parameter.copy_(start.to(parameter.device).lerp(self._end[parameter], share))
