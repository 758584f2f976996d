from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# Logits alive at once, in elements. On a CPU 32 Mi float32 = 128 MiB, 680 tokens of a 49,152-token
# vocabulary; larger chunks were not faster on 2 cores. On a GPU every chunk reads the whole weight
# twice (1 GB for Llama-3.1-8B), which about 300 tokens of arithmetic hide (by count, unmeasured):
# 128 Mi bfloat16 = 256 MiB, 1,046 tokens of its vocabulary.
CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 27}

# (logits, target, softcap, logit_scale, gradient) -> target's final logit [tokens], its log-odds
# log(p / (1 - p)) [tokens], and, in the logits' dtype, d log-odds / d logits [tokens, V] or None
Reduce = Callable[[Tensor, Tensor, float | None, float, bool], tuple[Tensor, Tensor, Tensor | None]]


def in_chunks(
    reduce: Reduce,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    gradient: bool,
) -> tuple[Tensor, ...]:
    """The op by two dense products a chunk of tokens, with ``reduce`` between them."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    tokens, width = hidden.shape
    logit = torch.empty(tokens, dtype=wide, device=hidden.device)
    log_odds = torch.empty_like(logit)
    pull = torch.empty(tokens if gradient else 0, width, dtype=hidden.dtype, device=hidden.device)
    elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cpu"])
    chunk = max(1, elements // weight.shape[0])
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        logits = functional.linear(hidden[part], weight, bias)
        logit[part], log_odds[part], grad_logits = reduce(
            logits, target[part], softcap, logit_scale, gradient
        )
        if grad_logits is not None:
            pull[part] = grad_logits @ weight
    slope = torch.full_like(logit if gradient else logit[:0], logit_scale)
    if gradient and softcap is not None:
        slope *= 1.0 - (logit / softcap).square()
    log_probability = functional.logsigmoid(log_odds)
    return log_probability.exp(), logit, log_probability, pull, slope


def _reduce(
    logits: Tensor, target: Tensor, softcap: float | None, logit_scale: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = logits.dtype
    logits = logits if dtype == torch.float64 else logits.float()
    if logit_scale != 1.0:
        logits = logits.mul_(logit_scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    index = target[:, None]
    logit = logits.gather(1, index)
    limits = torch.finfo(logits.dtype)
    others = logits.scatter(1, index, float("-inf"))
    top = others.amax(1, keepdim=True).clamp_min_(limits.min)  # all others may be -inf
    others = others.sub_(top).exp_()
    total = others.sum(1, keepdim=True).add_(limits.tiny)
    log_odds = logit - top - total.log()
    grad_logits = None
    if gradient:
        grad_logits = others.div_(total.neg_()).scatter_(1, index, 1.0)
        if softcap is not None:
            grad_logits.mul_(logits.div_(softcap).square_().neg_().add_(1.0))
        grad_logits = grad_logits.mul_(logit_scale).to(dtype)
    return logit.squeeze(1), log_odds.squeeze(1), grad_logits


forward = functools.partial(in_chunks, _reduce)
