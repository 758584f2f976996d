"""What a user would otherwise train some rows of a linear layer with."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional

from loki_kernels import LokiLinear


class SplitLinear(nn.Module):
    """The layer of the LoKI authors' repository, from its definition: the trained and the frozen
    rows as two linear layers, their outputs concatenated and gathered into the rows' order."""

    def __init__(self, linear: nn.Linear, rows: Tensor) -> None:
        super().__init__()
        everything = torch.arange(linear.out_features, device=rows.device)
        frozen = everything[~torch.isin(everything, rows)]
        self.active = nn.Parameter(linear.weight.detach()[rows].clone())
        self.frozen = nn.Parameter(linear.weight.detach()[frozen].clone(), requires_grad=False)
        self.order = torch.cat([rows, frozen]).argsort()

    def forward(self, x: Tensor) -> Tensor:
        parts = functional.linear(x, self.active), functional.linear(x, self.frozen)
        return torch.cat(parts, dim=-1)[..., self.order]


class MaskedLinear(nn.Module):
    """A dense weight whose gradient is zeroed outside the rows."""

    def __init__(self, linear: nn.Linear, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone())
        mask = torch.zeros(linear.out_features, 1, device=rows.device, dtype=linear.weight.dtype)
        mask[rows] = 1
        self.weight.register_hook(lambda gradient: gradient * mask)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class FullLinear(nn.Module):
    """The whole weight trained."""

    def __init__(self, linear: nn.Linear, _rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


def delta_form(linear: nn.Linear, rows: Tensor) -> nn.Module:
    """Our own layer as it computes where the weight is not written: sharded, and with PEFT."""
    layer = LokiLinear(copy.deepcopy(linear), rows)
    layer.sharded = True
    return layer


def trainable_tokens(linear: nn.Linear, rows: Tensor) -> nn.Module:
    """PEFT's ``TrainableTokensConfig`` on a ``down_proj``: row updates, merged at every forward."""
    from peft import TrainableTokensConfig, get_peft_model

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Linear(linear.in_features, linear.out_features, bias=False)
            self.down_proj.weight = nn.Parameter(linear.weight.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(x)

    config = TrainableTokensConfig(target_modules=["down_proj"], token_indices=rows.tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(Holder(), config).to(linear.weight.device)


def lora(
    model: nn.Module, targets: str | list[str] = "all-linear", *, dora: bool = False
) -> nn.Module:
    """PEFT's LoRA of rank 16 on every linear layer of the decoder, or some; DoRA if so asked.

    The factors have the model's dtype, which is LoRA at its fastest: PEFT would make them float32,
    and multiply in float32 where the step is under no autocast.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config, autocast_adapter_dtype=False)
