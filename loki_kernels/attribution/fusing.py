"""RMS norms, and gated products in large batches, by one kernel each while an analysis runs.

transformers' RMSNorm is seven launches, three of them in float32: in bfloat16 36 bytes an element
forwards and about 72 backwards, where one kernel each way moves 4 and 6. Its MLPs multiply in two
launches and five passes forwards, nine backwards, where `gated_product` takes three and six. What
is replaced is the ``forward`` of instances, found by what they hold and known by what they compute.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ..gating import Gating, find_gating
from ..ops import gated_product
from ..ops._dispatch import has_kernel
from ..placement import memory_is_full
from ..structure import (
    DownProjection,
    Structure,
    alike,
    embedding_weight,
    has_hooks,
    in_float64,
)
from .integration import guard_tolerance, relative_error
from .steering import replacing

logger = logging.getLogger(__name__)

# In float64 a model stays what it is: transformers' norms work in float32 there too, and whoever
# takes it wants to compare.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# From how many tokens * hidden_size * intermediate_size on an MLP's product is fused. A call of
# `gated_product` keeps the host some .1 ms longer than the two of torch, backwards included, and
# Triton's launches perhaps as much again. The MLP's three products, of 6 operations for each of
# these, take a quarter of a millisecond at 800 TFLOP/s, which hides that: 585 tokens of an 8B
# model, 39,000 of SmolLM2-135M.
_HIDES_THE_HOST = 2**35

_FEW = 4  # MLPs of a layer

_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, type(None))

Forward = Callable[..., Tensor]

# Why a model is not run so, or None, by its dtype and how many modules are replaced.
_reasons: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str | None]] = (
    weakref.WeakKeyDictionary()
)


def find_fusion(structure: Structure, tokens: int, prompt: Tensor) -> dict[nn.Module, Forward]:
    """What runs a borrowed model's norms and gated products as one kernel each, by module.

    A model whose weights come and go, sharded by FSDP2 or offloaded, stays as it is. So does a
    module with hooks, or with a ``forward`` of its own. Prompts and path points alike run what is
    replaced, so a wrong replacement would show in no guard: the model's logits are compared with
    its own first, once for a model.

    Args:
        structure: a borrowed model.
        tokens: of a typical forward pass, path points included. Which modules are replaced is
            decided by it once, since the points must round as the prompt before them did.
        prompt: int64 ``[1, T]``, on which the model is tried.
    """
    if structure.reruns:
        return {}
    forwards = {**_norms(structure), **_products(structure, tokens)}
    reason = _why_not(structure, forwards, prompt) if forwards else None
    if reason is None:
        return forwards
    logger.warning(
        "%s is attributed with its own norms and activations: %s",
        type(structure.causal_lm).__name__,
        reason,
    )
    return {}


def _why_not(
    structure: Structure, forwards: dict[nn.Module, Forward], prompt: Tensor
) -> str | None:
    model = structure.causal_lm
    known = _reasons.setdefault(model, {})
    key = embedding_weight(model).dtype, len(forwards)
    if key not in known:
        try:
            with torch.no_grad():
                own = structure.run(input_ids=prompt, use_cache=False).logits[:, -1]
                with replacing(forwards):
                    got = structure.run(input_ids=prompt, use_cache=False).logits[:, -1]
        except Exception as error:  # some refuse tokens alone
            reason = f"one kernel each could not be tried ({error})"
            if memory_is_full(error):  # another time there may be room
                return reason
            known[key] = reason
        else:
            agree = relative_error(got, own) <= guard_tolerance(own.dtype, key[0])
            known[key] = None if agree else "one kernel each gives other logits"
    return known[key]


@dataclass(frozen=True)
class _Norm:
    """``rms_norm(x, weight, eps)``, or with ``1 + weight``.

    Attributes:
        eps: added to the mean square.
        one_added: whether 1 is added to the weight.
    """

    eps: float
    one_added: bool

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """``[..., D]`` for x ``[..., D]`` and weight ``[D]`` of one dtype."""
        if self.one_added and weight.dtype != torch.float32:
            # 1 + weight would be rounded to 8 bits in bfloat16; here the kernel adds in float32.
            y = functional.rms_norm(x, weight.shape, None, self.eps)
            return torch.addcmul(y, y, weight)
        scale = weight + 1 if self.one_added else weight
        return functional.rms_norm(x, weight.shape, scale, self.eps)

    def exactly(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same, in float64."""
        x, weight = in_float64(x), in_float64(weight)
        scale = weight + 1 if self.one_added else weight
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * scale

    def of(self, module: nn.Module) -> Forward:
        """What a module computes, as its ``forward``."""
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            (x,) = (*args, *kwargs.values())
            weight: Tensor = module.weight  # type: ignore[assignment]
            if x.dtype == weight.dtype and x.shape[-1:] == weight.shape:
                return self(x, weight)
            y: Tensor = own(x)  # torch has no kernel for two dtypes
            return y

        return forward


def _norms(structure: Structure) -> dict[nn.Module, Forward]:
    """The decoder's RMS norms; of those that are alike one is tried."""
    known: dict[Hashable, _Norm | None] = {}
    forwards: dict[nn.Module, Forward] = {}
    for module in structure.decoder.modules():
        if not _has_one_vector(module) or has_hooks(module):
            continue
        kind = _kind(module)
        if kind not in known:
            known[kind] = _find_norm(module)
        norm = known[kind]
        if norm is not None:
            forwards[module] = norm.of(module)
    return forwards


def _has_one_vector(module: nn.Module) -> bool:
    """Whether a module holds ``weight`` ``[D]``, here and whole, and nothing else."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and len(module._parameters) == 1
        and not module._modules
        and not module._buffers
        and weight.ndim == 1
        and _is_here(weight)
        and not isinstance(module, nn.RMSNorm)  # one kernel already
    )


def _find_norm(module: nn.Module) -> _Norm | None:
    """Which norm a module computes; None if it is another function."""
    if not _takes_one_tensor(module):
        return None
    epsilons = {v for v in vars(module).values() if type(v) is float and 0 < v < 1}
    for eps in sorted(epsilons):
        for one_added in (False, True):
            norm = _Norm(eps, one_added)
            with contextlib.suppress(Exception):  # a module of any kind may not take this
                if _computes(module, norm):
                    return norm
    return None


def _computes(module: nn.Module, norm: _Norm) -> bool:
    """Whether a module gives what ``norm`` does of rows of several sizes, in two dtypes."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    # A mean of .5, since a LayerNorm would subtract it. The float32 rows are also as small as
    # sqrt(eps), where without eps the result would be 1.4 times as large.
    x = torch.randn(4, len(weight), generator=generator, device="cpu") + 0.5
    # Of any weight, since a new norm's zeros or ones could be multiplied in another way too.
    weight = torch.randn(len(weight), generator=generator, device="cpu").to(weight)
    for dtype, sizes in (
        (torch.float32, [1, 30, norm.eps**0.5, 3 * norm.eps**0.5]),
        (weight.dtype, [1, 30, 1, 3]),
    ):
        given = (x * torch.tensor(sizes)[:, None]).to(weight.device, dtype)
        with torch.no_grad():
            got = functional_call(module, {"weight": weight}, (given,))
        if not isinstance(got, Tensor) or got.dtype != dtype or got.shape != given.shape:
            return False
        want = norm.exactly(given, weight)
        if not (want.any(-1).all() and alike(got, want, dtype)):
            return False
    return True


def _products(structure: Structure, tokens: int) -> dict[nn.Module, Forward]:
    """The gated MLPs whose product is fused; of those that are alike one is tried."""
    known: dict[Hashable, Gating | None] = {}
    forwards: dict[nn.Module, Forward] = {}
    # Where each token goes to some of many MLPs, each has too few to hide a launch.
    few = (ffn for ffn in structure.present().values() if len(ffn.projections) <= _FEW)
    for down in (down for ffn in few for down in ffn.projections):
        mlp = down.parent
        if down.of_experts or not _pays(structure, down, tokens) or not _is_free(mlp):
            continue
        kind = down.attribute, _kind(mlp)
        if kind not in known:
            known[kind] = _find_gating(down)
        gating = known[kind]
        if gating is not None:
            forwards[mlp] = _gated_forward(mlp, down.attribute, gating)
    return forwards


def _pays(structure: Structure, down: DownProjection, tokens: int) -> bool:
    """Whether an MLP's product is worth a kernel, and there is one."""
    if tokens * structure.hidden_size * down.in_features < _HIDES_THE_HOST:
        return False
    weight = getattr(down.module, down.parameter, None)  # a quantized linear may have none
    if not isinstance(weight, Tensor) or weight.dtype not in _DTYPES:
        return False
    x = torch.empty(1, dtype=weight.dtype, device=weight.device)
    # Without a kernel the op takes a CPU three times as long as the two of torch, and back.
    return has_kernel("gated_product", [x, x, "silu"])


def _is_free(mlp: nn.Module) -> bool:
    """Whether an MLP may be tried and replaced."""
    weights = [weight for m in mlp.modules() for weight in m._parameters.values()]
    return (
        not isinstance(getattr(mlp, "gating", None), Gating)  # `FusedMLP` has the op already
        and not any(map(has_hooks, mlp.modules()))
        and all(weight is None or _is_here(weight) for weight in weights)
    )


def _find_gating(down: DownProjection) -> Gating | None:
    if not _takes_one_tensor(down.parent):
        return None
    with contextlib.suppress(Exception):  # a module of any kind may not take what it is tried on
        gating = find_gating(down)
        return gating if isinstance(gating, Gating) else None
    return None


def _gated_forward(mlp: nn.Module, down: str, gating: Gating) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        product = gated_product(*gating.split(mlp, x), gating.activation)
        y: Tensor = getattr(mlp, down)(product)  # a call, since the points come in by its hooks
        return y

    return forward


def _is_here(weight: Tensor) -> bool:
    """Whether a parameter is an ordinary one of floating-point numbers, in memory."""
    return type(weight.data) is Tensor and weight.dtype in _DTYPES and not weight.is_meta


def _takes_one_tensor(module: nn.Module) -> bool:
    """Whether ``forward`` has one argument: a gate or a residual would be another."""
    _, *arguments = inspect.signature(type(module).forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(arguments) == 1 and arguments[0].kind in kinds


def _kind(module: nn.Module) -> Hashable:
    """Equal for modules of the same classes, attributes, shapes, dtypes and devices throughout."""
    return tuple(
        (
            name,
            type(part),
            tuple((n, _identity(v)) for n, v in vars(part).items() if n not in _OF_ANY_MODULE),
            tuple(
                (n, None if w is None else (w.shape, w.dtype, w.device))
                for n, w in part._parameters.items()
            ),
        )
        for name, part in module.named_modules()
    )


def _identity(value: Any) -> Hashable:
    """A number or string by its value, anything else by what it is."""
    return value if type(value) in _PLAIN else id(value)
