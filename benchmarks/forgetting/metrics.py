"""The study's figures, each from numbers alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def token_loss(log_p: Sequence[Tensor]) -> float:
    """Nats a token, over the tokens of all records."""
    return -float(torch.cat(list(log_p)).mean())


def exact_match(best: Sequence[Tensor]) -> float:
    """Share of records whose every token is the most likely one, given the right ones before it."""
    return sum(bool(record.all()) for record in best) / len(best)


def perplexity(log_p: Sequence[Tensor]) -> float:
    """exp of `token_loss`."""
    return math.exp(token_loss(log_p))


def choice_accuracy(log_p: Sequence[Sequence[Tensor]], gold: Sequence[int]) -> float:
    """Share of questions whose right choice has the highest mean log-probability a token."""
    right = 0
    for choices, answer in zip(log_p, gold, strict=True):
        means = [float(choice.mean()) for choice in choices]
        right += means.index(max(means)) == answer
    return right / len(gold)


def ndcg(scores: Sequence[float], relevance: Sequence[float], k: int) -> float:
    """Normalized discounted cumulative gain of the first k (Järvelin & Kekäläinen 2002).

    The gain of relevance r is 2^r - 1, its discount at rank i is log2(i + 1). Ties keep the
    order in which they came reversed, so that equal scores cannot profit from it. 1 if nothing is
    relevant.
    """

    def gain(ranked: Sequence[float]) -> float:
        return sum((2**r - 1) / math.log2(i + 2) for i, r in enumerate(ranked[:k]))

    order = sorted(range(len(scores)), key=lambda i: (-scores[i], -i))
    best = gain(sorted(relevance, reverse=True))
    return gain([relevance[i] for i in order]) / best if best else 1.0


def average_change(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Mean relative change over the benchmarks in per cent, negative where a model got worse.

    ``100 / n * sum((after - before) / before)``, the paper's summary of what was forgotten with the
    other sign; over the benchmarks of which the model could do anything before.
    """
    changes = [(after[name] - value) / value for name, value in before.items() if value > 0]
    return 100 * sum(changes) / len(changes) if changes else 0.0


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values."""
    return statistics.stdev(values) / math.sqrt(len(values))
