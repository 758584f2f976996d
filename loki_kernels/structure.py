"""Finds the parts of a decoder language model by structure, not by model name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import UnsupportedModelError
from .sharding import full_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# An attribute only attention modules carry; one of these marks the branch of a layer to leave out.
_ATTENTION_MARKS = ("head_dim", "num_heads", "head_size", "num_key_value_groups")


@dataclass(frozen=True)
class Head:
    """The output projection: ``logits = softcap(scale * (hidden @ weight.T + bias))``."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """``[rows, V]`` for hidden ``[rows, D]``."""
        hidden = hidden.to(self.weight.device)
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


@dataclass(frozen=True)
class DownProjection:
    """One layer's FFN down-projection: ``module`` is ``getattr(parent, attribute)``."""

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Linear  # or a module that stands in for one


@dataclass(frozen=True)
class Structure:
    """A causal language model seen as embeddings, decoder layers and head."""

    causal_lm: PreTrainedModel
    decoder: nn.Module
    layers: tuple[nn.Module, ...]
    down_projs: tuple[DownProjection, ...]
    hidden_size: int
    intermediate_size: int
    vocab_size: int

    def width(self, site: str) -> int:
        """How many nodes a layer has at the attributed site."""
        return self.hidden_size if site == "down_proj" else self.intermediate_size

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens."""
        return _embedding(self.causal_lm).device

    def head(self) -> Head:
        """The output projection, with the logit scale and soft-cap its config names."""
        module = self.causal_lm.get_output_embeddings()
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise UnsupportedModelError(
                f"{type(self.causal_lm).__name__} has no linear output head; "
                "attribution needs a causal language model with one."
            )
        config = text_config(self.causal_lm)
        scale = 1.0
        if getattr(config, "logit_scale", None) is not None:  # Cohere multiplies
            scale = float(config.logit_scale)
        elif getattr(config, "logits_scaling", None) is not None:  # Granite divides
            scale = 1.0 / float(config.logits_scaling)
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(weight, getattr(module, "bias", None), scale, softcap)


def text_config(model: nn.Module) -> Any:
    """The text part of a Hugging Face config."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no transformers config; "
            "pass a transformers causal language model (or a PEFT model around one)."
        )
    return config.get_text_config()


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT, DDP or ``torch.compile`` wrapper."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return cast("PreTrainedModel", model)


def is_linear_like(module: nn.Module) -> bool:
    """``nn.Linear``, or a module that stands in for one (a PEFT tuner layer, LokiLinear)."""
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer is an ``nn.Linear`` of floating-point numbers, whole or sharded."""
    return (
        type(module) is nn.Linear
        and type(module.weight.data) in (Tensor, DTensor)
        and module.weight.is_floating_point()
    )


def _linears(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module, str, nn.Linear]]:
    """(dotted name, parent, attribute, linear) outside attention, wrappers not entered."""
    found: list[tuple[str, nn.Module, str, nn.Linear]] = []
    for attribute, child in module.named_children():
        name = f"{prefix}{attribute}"
        if is_linear_like(child):
            found.append((name, module, attribute, cast(nn.Linear, child)))
        elif not any(hasattr(child, mark) for mark in _ATTENTION_MARKS):
            found += _linears(child, f"{name}.")
    return found


def _find_down_proj(layer: nn.Module, hidden_size: int, layer_name: str) -> DownProjection:
    linears = _linears(layer)
    feeds = {linear.out_features for _, _, _, linear in linears}
    candidates = [
        DownProjection(f"{layer_name}.{name}", parent, attribute, linear)
        for name, parent, attribute, linear in linears
        if linear.out_features == hidden_size
        # fed by a plain or gated up-projection, or by one that fuses gate and up
        and (linear.in_features in feeds or 2 * linear.in_features in feeds)
    ]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise UnsupportedModelError(
            f"{layer_name} ({type(layer).__name__}) has no FFN down-projection: no linear outside "
            f"attention with out_features = hidden_size = {hidden_size} that another linear feeds. "
            "Mixture-of-experts and Conv1D feed-forward layers are not supported."
        )
    names = ", ".join(candidate.name for candidate in candidates)
    raise UnsupportedModelError(
        f"{layer_name} has {len(candidates)} linears that could be its FFN down-projection "
        f"({names}); mixture-of-experts layers and intermediate_size = hidden_size "
        "are not supported."
    )


def find_structure(model: nn.Module) -> Structure:
    """Find the decoder layers and their down-projections.

    Raises:
        UnsupportedModelError: if there is no stack of ``num_hidden_layers`` decoder layers, or a
            layer has no single FFN down-projection.
    """
    causal_lm = unwrap(model)
    config = text_config(causal_lm)
    decoder = causal_lm.get_decoder() if hasattr(causal_lm, "get_decoder") else causal_lm
    stacks = [
        (name, module)
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == config.num_hidden_layers
        # a list of norms can have the same length; a decoder layer has matrices
        and any(len(full_shape(parameter)) == 2 for parameter in module[0].parameters())
    ]
    if not stacks:
        raise UnsupportedModelError(
            f"{type(causal_lm).__name__} has no list of {config.num_hidden_layers} decoder layers."
        )
    stack_name, stack = stacks[0]
    down_projs = tuple(
        _find_down_proj(layer, config.hidden_size, f"{stack_name}.{i}")
        for i, layer in enumerate(stack)
    )
    widths = {down_proj.module.in_features for down_proj in down_projs}
    return Structure(
        causal_lm=causal_lm,
        decoder=decoder,
        layers=tuple(stack),
        down_projs=down_projs,
        hidden_size=config.hidden_size,
        intermediate_size=max(widths),
        vocab_size=full_shape(_embedding(causal_lm))[0],
    )


def _embedding(model: PreTrainedModel) -> Tensor:
    return cast(Tensor, model.get_input_embeddings().weight)


def first_non_finite(model: nn.Module) -> str | None:
    """The name of the first parameter holding NaN or infinity."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            return name
    return None
