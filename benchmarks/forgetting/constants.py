"""What the best answer scores that is the same for every record: below it nothing is learned."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence

from loki_kernels.demo.training import Encoded

from . import metrics
from .study import Study
from .tasks import Ranking
from .workshop import Workshop


def commonest(answers: Iterable[Hashable]) -> float:
    """The share of the commonest answer."""
    counts = Counter(answers)
    return max(counts.values()) / counts.total()


def of_calls(records: Sequence[Encoded]) -> float:
    """Exact match of the call that is right most often."""
    return commonest(tuple(t for t in record["labels"] if t != -100) for record in records)


def of_rankings(rankings: Sequence[Ranking]) -> tuple[float, float]:
    """(loss of the answers' shares as the prediction, nDCG@10 of equal scores)."""
    grades = [grade for ranking in rankings for grade in ranking.relevance]
    share = sum(grades) / len(grades)
    loss = -sum(p * math.log(p) for p in (share, 1 - share) if p)
    gains = [metrics.ndcg([0.0] * len(r.relevance), r.relevance, 10) for r in rankings]
    return loss, sum(gains) / len(gains)


def constants(study: Study, shop: Workshop) -> Iterator[str]:
    """A line a figure; of the tasks the mean over the seeds' test folds."""
    seeds = study.evaluation.seeds
    calls = [of_calls(shop.task("function_calling", seed).test) for seed in seeds]
    yield f"function_calling, exact: {statistics.mean(calls):.3f}"
    ranked = [of_rankings(shop.task("reranking", seed).test) for seed in seeds]
    losses, gains = zip(*ranked, strict=True)
    yield f"reranking, loss: {min(losses):.3f} to {max(losses):.3f}"
    yield f"reranking, ndcg@10: {statistics.mean(gains):.3f}"
    for name, (_, gold) in shop.retention.choices.items():
        yield f"{name}: {commonest(gold):.3f}"
    words = [tuple(t for t in r["labels"] if t != -100) for r in shop.retention.lambada]
    yield f"lambada: {commonest(words):.3f}"
