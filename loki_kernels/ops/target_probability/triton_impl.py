"""Between the dense products, one program a token reads its logits twice and overwrites them."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._check import unsupported_dtype
from .._triton import DTYPES, Compilation, narrow, tanh
from .torch_impl import in_chunks

_CONFIG = triton.Config({"BLOCK": 4096}, num_warps=8, num_stages=1)


def unsupported(hidden: Tensor, *_: object) -> str | None:
    return unsupported_dtype(hidden)


@triton.jit
def _final(logits, scale, softcap, SOFTCAP: tl.constexpr):
    logits = logits.to(tl.float32) * scale
    if SOFTCAP:
        logits = softcap * tanh(logits / softcap)
    return logits


@triton.jit
def forward_kernel(
    logits, target, logit, log_odds, vocabulary, scale, softcap,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    logits += token * vocabulary
    # read before the gradient takes the logits' place: nothing orders a later read in one warp and
    # another warp's store
    wanted = tl.load(target + token)
    logit_wanted = _final(tl.load(logits + wanted), scale, softcap, SOFTCAP)
    # a running maximum and sum of the others for each lane; they meet once, at the end
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        value = _final(tl.load(logits + entry, mask=entry < vocabulary), scale, softcap, SOFTCAP)
        value = tl.where((entry < vocabulary) & (entry != wanted), value, float("-inf"))
        peak = tl.maximum(highest, value)
        met = (peak > float("-inf")) | (value != value)  # a maximum passes over NaN
        total = tl.where(met, total * tl.exp(highest - peak) + tl.exp(value - peak), total)
        highest = peak
    top = tl.maximum(tl.max(highest, 0), -3.4e38)  # all others may be -inf
    log_total = tl.log(tl.sum(total * tl.exp(highest - top), 0) + 1.2e-38)
    tl.store(log_odds + token, logit_wanted - top - log_total)
    tl.store(logit + token, logit_wanted)
    if GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            mask = entry < vocabulary
            value = _final(tl.load(logits + entry, mask=mask, other=0.0), scale, softcap, SOFTCAP)
            slope = tl.where(entry == wanted, 1.0, -tl.exp(value - top - log_total))
            if SOFTCAP:
                slope = slope * (1 - (value / softcap) * (value / softcap))
            tl.store(logits + entry, narrow(slope * scale, logits.dtype.element_ty), mask=mask)


def _reduce(
    logits: Tensor, target: Tensor, softcap: float | None, logit_scale: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    tokens, vocabulary = logits.shape
    logits = logits.contiguous()
    logit = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    log_odds = torch.empty_like(logit)
    with torch.cuda.device_of(logits):
        forward_kernel[(tokens,)](
            logits,
            target.contiguous(),
            logit,
            log_odds,
            vocabulary,
            logit_scale,
            1.0 if softcap is None else softcap,
            SOFTCAP=softcap is not None,
            GRADIENT=gradient,
            **_CONFIG.all_kwargs(),
        )
    return logit, log_odds, logits if gradient else None


forward = functools.partial(in_chunks, _reduce)


def compilations() -> Iterator[Compilation]:
    for name in DTYPES.values():
        types = {"logits": f"*{name}", "target": "*i64", "vocabulary": "i32"}
        types |= {"logit": "*fp32", "log_odds": "*fp32", "scale": "fp32", "softcap": "fp32"}
        for options in (False, True):
            yield Compilation(
                forward_kernel, types, {"SOFTCAP": options, "GRADIENT": True}, (_CONFIG,), name
            )
