"""Quantized linear layers, by PEFT's means of reading and writing their weights."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..sharding import is_sharded, linear_of
from ..structure import Structure, is_linear_like, is_plain_linear
from ..training.targets import computes_linear, is_plain_weight


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


def refuse_other_products(structure: Structure, model: nn.Module) -> None:
    """Raise UnsupportedModelError for a down-projection that is neither linear nor read by PEFT.

    PEFT knows no kind of quantization in it either: BitNet's layers round their weight in every
    pass, so that merging an update would round it away, and others hold it packed or scaled.
    """
    for down_proj in structure.projections():
        layer, weight = down_proj.module, getattr(down_proj.module, "weight", None)
        # one of ours was asked about when it was put around its base
        if isinstance(layer, BaseTunerLayer) or is_plain_linear(layer):
            continue
        if quantization_of(layer, model) is not None:
            continue
        if is_plain_weight(weight) and (
            weight.is_meta or is_sharded(weight) or computes_linear(layer, 0)
        ):
            continue
        raise UnsupportedModelError(
            f"{down_proj.name} is a {type(layer).__name__} with a {type(weight).__name__} of "
            f"{getattr(weight, 'dtype', 'no dtype')}, which is no plain linear layer and of no "
            "quantization that PEFT reads; load the model unquantized, or quantize it by "
            "bitsandbytes or torchao."
        )


def is_repacked(layer: Any) -> bool:
    """Whether bitsandbytes has brought 4-bit weights into the layout of AVX512-BF16 kernels."""
    weight = getattr(layer, "weight", None)  # GPTQ's layers have none
    state = getattr(weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def base_weight(layer: Any, backend: Any) -> Tensor:
    """The weight of a quantized layer, as precise as PEFT gives it.

    Raises:
        UnsupportedModelError: if it gives none.
    """
    try:
        weight: Tensor = backend.get_base_weight(layer)
        return weight
    except (TypeError, NotImplementedError) as error:  # of GPTQ and AWQ; of a torchao kind
        raise UnsupportedModelError(
            f"the rows of a {type(layer).__name__} ({backend.backend_name}) cannot be read, by "
            "which an adapter knows its base. Quantize the base by bitsandbytes or torchao, or "
            "train over it in full precision, merge, and quantize what that gives."
        ) from error


def dequantized_weight(layer: Any, backend: Any, dtype: torch.dtype | None) -> Tensor:
    """The weight of a quantized layer, in the model's dtype (bitsandbytes gives float32)."""
    if not is_repacked(layer):
        return base_weight(layer, backend).to(dtype)
    # bitsandbytes 0.50.2 can multiply such a weight but not dequantize it.
    identity = torch.eye(layer.in_features, dtype=dtype, device=layer.weight.device)
    weight: Tensor = layer(identity).t()
    return (weight if layer.bias is None else weight - layer.bias[:, None]).contiguous()


def plain_linear(weight: Tensor, layer: Any) -> nn.Linear:
    """An ``nn.Linear`` of this weight and the layer's bias."""
    bias = None if layer.bias is None else layer.bias.detach().to(weight)
    return linear_of(weight, bias).train(layer.training)


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
        (model, ("hf_quantizer", "quantization_method", "is_quantized", *_FLAGS)),
    ):
        for name in names:
            if name in owner.__dict__:
                delattr(owner, name)
    # What transformers read a quantized checkpoint by it would undo in saving, and cannot. The
    # conversions of an architecture's own names stay.
    if "_weight_conversions" in model.__dict__:
        kept = [c for c in model._weight_conversions if not _is_quantizer_s(c)]
        model._weight_conversions = kept


_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")


def _is_quantizer_s(conversion: Any) -> bool:
    """Whether one of transformers' weight conversions makes quantized tensors of a file's."""
    return any(hasattr(step, "hf_quantizer") for step in getattr(conversion, "operations", ()))
