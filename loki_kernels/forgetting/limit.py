"""`limit_drift`: so much of an update as keeps a model near its base."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from ..default_device import made_on_cpu
from ..options import DEFAULT_LENGTH, DEFAULT_TOKENS
from ..team import Team
from ..training import Patch
from .measure import compare, record
from .meter import check_positive
from .models import layers_to_scale, name_of, scaler_of
from .result import Drift, summarize
from .texts import read_texts, tokenize

_ROUNDS = 8
_NEAR = 0.95  # of the limit, which is near enough


def check_limit(kl: float) -> None:
    """
    Raises:
        ValueError: if it is not positive and finite.
    """
    if not (0 < kl < math.inf):
        raise ValueError(f"kl must be a positive number of nats a token; it is {kl}.")


@made_on_cpu
def limit_drift(
    model: nn.Module | Patch,
    kl: float,
    texts: Any = None,
    *,
    tokenizer: Any = None,
    length: int = DEFAULT_LENGTH,
    tokens: int | None = DEFAULT_TOKENS,
    progress: bool | None = None,
) -> tuple[float, Drift]:
    """Scale a patched model's update down until its KL from the base is at most ``kl``.

    ``W + delta`` becomes ``W + share * delta`` on the trained rows, in place, for the largest share
    found in eight measurements at most; one whose KL is within 5 % below the limit ends the search.
    The KL is that of `drift`: KL(base || model), nats a token, the mean over all texts. It is
    measured and not extrapolated, so on these texts the limit holds; if none of eight shares is
    within it, 0 is left, the base itself. Weights between a base and a tuned model are WiSE-FT's
    (2109.01903).

    Call it after training: an optimizer's state knows nothing of it. In distributed training every
    process has to call it, and all take the same share.

    Args:
        model: a patched model, or its handle.
        kl: the limit, nats a token.
        texts: as for `drift`.
        tokenizer: as for `drift`.
        length: as for `drift`.
        tokens: as for `drift`.
        progress: as for `drift`.

    Returns:
        The share that was kept, 1 where the whole update is within the limit, and the drift that is
        left.

    Raises:
        ValueError: for a limit that is not positive, a model that is not patched or trains modules
            whole beside the rows, texts that are empty or damaged, or logits that are NaN. The
            update is what it was then.
        TypeError: for text without a tokenizer, or what is no text.
        OSError: if a file is missing.
    """
    check_limit(kl)
    check_positive(length=length, tokens=tokens)
    if isinstance(model, Patch):
        model = model.model
    layers = layers_to_scale(model)
    corpus = tokenize(read_texts(texts), tokenizer, length, tokens)
    keep = scaler_of(layers)

    def measure(share: float) -> Drift:
        keep(share)
        moves = compare(base, model, progress=progress)
        return summarize(corpus, moves, (name_of(model),) * 2, tokenizer)

    share = 1.0
    try:
        with Team() as team:  # around all that may fail in one process
            keep(0.0)
            base = record(model, corpus, progress=progress)
            share, found = _search(measure, kl, team)
    finally:
        keep(share)
    return share, found


def _search(measure: Callable[[float], Drift], limit: float, team: Team) -> tuple[float, Drift]:
    """The largest share found whose drift is within the limit, and that drift."""

    def largest(drift: Drift) -> float:
        """Of all processes, whose devices may round differently."""
        told = team.tell(repr(drift.overall.kl), "all have to call limit_drift")
        return max(map(float, told))

    found = measure(1.0)
    kl = largest(found)
    if kl <= limit:
        return 1.0, found
    low, high, share, best = 0.0, 1.0, 1.0, None
    power = 2.0  # of the share, by which the KL grows: near the base it is the square
    for _ in range(_ROUNDS - 1):
        wanted = share * ((1 + _NEAR) / 2 * limit / kl) ** (1 / power) if kl else math.inf
        if not low < wanted < high:
            wanted = (low + high) / 2
        found = measure(wanted)
        last, kl = kl, largest(found)
        if 0 < last < math.inf and 0 < kl < math.inf:
            power = min(4.0, max(0.25, math.log(kl / last) / math.log(wanted / share)))
        share = wanted
        if kl > limit:
            high = share
            continue
        low, best = share, found
        if kl >= _NEAR * limit:
            break
    return low, measure(0.0) if best is None else best
