"""Quantized linear layers, by PEFT's means of reading and writing their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..structure import is_linear_like, is_plain_linear


def quantization_of(layer: nn.Module, model: nn.Module) -> Any:
    """PEFT's means of reading and writing the weight of a quantized layer; None for a plain one."""
    weight = getattr(layer, "weight", None)
    if is_plain_linear(layer):
        return None
    try:
        from peft.utils.quantization_utils import (
            get_quantization_kwargs,
            resolve_quantization_backend,
        )
    except ImportError as error:
        raise UnsupportedModelError(
            f"a {type(layer).__name__} with a {type(weight).__name__} is no plain linear layer; "
            "quantized bases need peft 0.20 or newer."
        ) from error
    return resolve_quantization_backend(layer, **get_quantization_kwargs(model))


def is_repacked(layer: Any) -> bool:
    """Whether bitsandbytes has brought 4-bit weights into the layout of AVX512-BF16 kernels."""
    state = getattr(layer.weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def dequantized_weight(layer: Any, backend: Any, dtype: torch.dtype | None) -> Tensor:
    """The weight of a quantized layer, in the model's dtype (bitsandbytes gives float32)."""
    weight: Tensor
    if not is_repacked(layer):
        weight = backend.get_base_weight(layer)
        return weight.to(dtype)
    # bitsandbytes 0.50.2 can multiply such a weight but not dequantize it.
    identity = torch.eye(layer.in_features, dtype=dtype, device=layer.weight.device)
    weight = layer(identity).t()
    return (weight if layer.bias is None else weight - layer.bias[:, None]).contiguous()


def plain_linear(weight: Tensor, layer: Any) -> nn.Linear:
    """An ``nn.Linear`` of this weight and the layer's bias."""
    linear = nn.Linear(1, 1, bias=False)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    bias = layer.bias
    linear.bias = None if bias is None else nn.Parameter(bias.detach().to(weight), False)  # type: ignore[assignment]
    return linear.train(layer.training)


def dequantize_model(model: Any) -> None:
    """Turn every quantized linear layer into a plain one, and the model's config with them."""
    linears = [(n, m) for n, m in model.named_modules() if is_linear_like(m)]
    for name, module in linears:
        backend = quantization_of(module, model)
        if backend is not None:
            parent, _, attribute = name.rpartition(".")
            plain = plain_linear(dequantized_weight(module, backend, model.dtype), module)
            setattr(model.get_submodule(parent), attribute, plain)
    for owner, names in (
        (model.config, ("quantization_config",)),
        (model, ("hf_quantizer", "quantization_method", "is_quantized")),
    ):
        for name in names:
            if name in owner.__dict__:
                delattr(owner, name)
