"""What the model is without the rows that matter least or most (the paper's Table 5a)."""

from __future__ import annotations

import loki_kernels as loki

from . import stability
from .workshop import Workshop

# (strategy, criterion) of the rows that suppression zeroes
_SUPPRESSED = (
    ("layer_balanced", "signed"),
    ("layer_balanced_highest", "signed"),
    ("layer_balanced", "magnitude"),
    ("layer_balanced_highest", "magnitude"),
)


def suppress(
    shop: Workshop, definition: str, quotas: tuple[float, ...]
) -> dict[str, dict[str, float]]:
    """Perplexity with rows zeroed, by kind of rows and quota. Draws the scores' heatmap."""
    attribution, model = shop.attribution(definition), shop.model()
    attribution.heatmap(shop.drawings / f"heatmap-{definition}.png", stability.QUOTA)
    kinds = [*_SUPPRESSED, *([("random", "signed")] if definition == "published" else [])]
    result: dict[str, dict[str, float]] = {}
    for strategy, criterion in kinds:
        kind = "random" if strategy == "random" else f"{criterion} {strategy}"
        for quota in quotas:
            with loki.suppress(model, loki.select(attribution, quota, strategy, criterion)):  # type: ignore[arg-type]
                perplexity = shop.retention.perplexity(model)
            result.setdefault(kind, {})[f"{quota:g}"] = perplexity
    return result
