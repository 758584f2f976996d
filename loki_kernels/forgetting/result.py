"""`Drift`: what was measured, as a table, a JSON file and a picture."""

from __future__ import annotations

import bisect
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..files import atomic_path, check_writable
from ..plots import plot_drift
from .measure import Moves
from .texts import UNKNOWN, Corpus

_TOP = 10  # texts and positions that moved most
_QUANTILES = (0.5, 0.9, 0.99, 1.0)
_LINES = 20  # domains in the table
_BARS = 60  # and in the picture


@dataclass(frozen=True)
class Group:
    """All texts, or those of one domain.

    Attributes:
        name: the domain.
        kl: nats a token.
        kl_error: its standard error, texts being drawn at random; NaN for one text.
        perplexity_before: of the texts in the base.
        perplexity_after: in the other model. Both NaN where every text is of one token.
    """

    name: str
    texts: int
    tokens: int
    kl: float
    kl_error: float
    perplexity_before: float
    perplexity_after: float


@dataclass(frozen=True)
class MovedText:
    """A text: its domain, how it begins, and its mean KL in nats a token."""

    domain: str
    excerpt: str
    tokens: int
    kl: float


@dataclass(frozen=True)
class MovedPosition:
    """A position in a text.

    Attributes:
        context: what stands before it, without what all texts begin with.
        kl: nats.
        likeliest_before: the next token that the base finds likeliest.
        likeliest_after: the one that the other model does.
        token: the text's next token; None after its last one.
        probability_before: of ``token`` in the base; NaN without one.
        probability_after: in the other model.
    """

    domain: str
    context: str
    kl: float
    likeliest_before: str
    likeliest_after: str
    token: str | None
    probability_before: float
    probability_after: float


@dataclass(frozen=True)
class Drift:
    """How far a model has moved from its base; ``str()`` of it is a table.

    Attributes:
        base: name of the base.
        tuned: name of the other model.
        overall: all texts together.
        domains: each domain, the one that moved most first.
        texts: those that moved most.
        positions: those that moved most.
        left_out: how many texts the limit of tokens left out.
        token_kl: float32 ``[tokens]``, the KL at every token.
    """

    base: str
    tuned: str
    overall: Group
    domains: list[Group]
    texts: list[MovedText]
    positions: list[MovedPosition]
    left_out: int
    token_kl: Tensor = field(repr=False)

    @property
    def quantiles(self) -> dict[str, float]:
        """Of the KL at a token."""
        values = self.token_kl.sort().values
        return {f"{q:g}": float(values[math.ceil(q * len(values)) - 1]) for q in _QUANTILES}

    def content(self) -> dict[str, Any]:
        """What `save` writes: everything but the single tokens' KL, of which quantiles."""
        content = {k: v for k, v in vars(self).items() if k != "token_kl"}
        content["overall"] = asdict(self.overall)
        for name in ("domains", "texts", "positions"):
            content[name] = [asdict(entry) for entry in content[name]]
        content["token_kl_quantiles"] = self.quantiles
        finite: dict[str, Any] = _without_nan(content)
        return finite

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``.json``, whole or not at all; what is not finite is null.

        Raises:
            ValueError: for another suffix.
            OSError: if it cannot be written.
        """
        check_writable(path, ".json")
        with atomic_path(path) as temporary:
            text = json.dumps(self.content(), indent=1, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the KL with standard errors of the 60 domains that moved most, and over tokens.

        Raises:
            ValueError: for another suffix than ``.png``.
            ImportError: without the ``plot`` extra.
        """
        bars = [(group.name, group.kl, group.kl_error) for group in self.domains[:_BARS]]
        plot_drift(path, f"{self.tuned} from {self.base}", bars, self.token_kl)

    def __str__(self) -> str:
        width = max(len(g.name) for g in (self.overall, *self.domains[:_LINES]))
        lines = [
            f"{self.tuned} from {self.base}",
            "",
            f"{'domain':{width}}  texts   tokens  KL, nats a token     perplexity",
            _line(self.overall, width),
        ]
        if len(self.domains) > 1 or self.domains[0].name != self.overall.name:
            lines += [_line(group, width) for group in self.domains[:_LINES]]
        if len(self.domains) > _LINES:
            lines.append(f"and {len(self.domains) - _LINES} domains that moved less")
        quantiles = ", ".join(
            f"{'largest' if q == '1' else f'{100 * float(q):g} %'} {kl:.2g}"
            for q, kl in self.quantiles.items()
        )
        lines += ["", f"KL at a token: {quantiles}", "", "texts that moved most"]
        lines += [f"{t.kl:8.3g}  {t.domain}: {_short(t.excerpt)}" for t in self.texts]
        lines += ["", "positions that moved most, and the likeliest next token before and after"]
        lines += [
            f"{t.kl:8.3g}  {t.domain}: {_short(t.context, end=True)} "
            f"{t.likeliest_before!r} -> {t.likeliest_after!r}"
            for t in self.positions
        ]
        if self.left_out:
            lines += ["", f"{self.left_out} texts were left out: the limit of tokens was reached"]
        return "\n".join(lines)


def summarize(corpus: Corpus, moves: Moves, names: tuple[str, str], tokenizer: Any) -> Drift:
    """Means, errors and extremes of what was measured; without a tokenizer tokens are numbers."""
    owner = torch.cat([torch.full_like(chunk.targets, chunk.text) for chunk in corpus.chunks])
    sums = _Sums.over(owner, moves, len(corpus.domains))
    by_domain: dict[str, list[int]] = {}
    for i, domain in enumerate(corpus.domains):
        by_domain.setdefault(domain, []).append(i)
    domains = [sums.group(name, torch.tensor(members)) for name, members in by_domain.items()]
    mean = sums.kl / sums.tokens
    begins = {chunk.text: chunk.ids[chunk.first :][:60] for chunk in reversed(corpus.chunks)}
    return Drift(
        *names,
        overall=sums.group("all", torch.arange(len(corpus.domains))),
        domains=sorted(domains, key=lambda group: -group.kl),
        texts=[
            MovedText(
                corpus.domains[i],
                _decode(tokenizer, begins[i]),
                int(sums.tokens[i]),
                float(mean[i]),
            )
            for i in mean.argsort(descending=True)[:_TOP].tolist()
        ],
        positions=[
            _moved_position(corpus, moves, tokenizer, place)
            for place in moves.kl.argsort(descending=True)[:_TOP].tolist()
        ],
        left_out=corpus.left_out,
        token_kl=moves.kl,
    )


def _moved_position(corpus: Corpus, moves: Moves, tokenizer: Any, place: int) -> MovedPosition:
    chunk = corpus.chunks[bisect.bisect(corpus.chunks, place, key=lambda c: c.start) - 1]
    end = chunk.first + place - chunk.start + 1
    target = chunk.targets[place - chunk.start]
    return MovedPosition(
        domain=corpus.domains[chunk.text],
        context=_decode(tokenizer, chunk.ids[max(chunk.first, end - 24) : end]),
        kl=float(moves.kl[place]),
        likeliest_before=_decode(tokenizer, moves.likeliest_before[place][None]),
        likeliest_after=_decode(tokenizer, moves.likeliest_after[place][None]),
        token=None if target == UNKNOWN else _decode(tokenizer, target[None]),
        probability_before=math.exp(float(moves.before[place])),
        probability_after=math.exp(float(moves.after[place])),
    )


@dataclass(frozen=True)
class _Sums:
    """Float64 ``[texts]``: KL and tokens; negative log-likelihoods and the tokens they are of."""

    kl: Tensor
    tokens: Tensor
    before: Tensor
    after: Tensor
    predicted: Tensor

    @classmethod
    def over(cls, owner: Tensor, moves: Moves, texts: int) -> _Sums:
        def total(values: Tensor) -> Tensor:
            return torch.zeros(texts, dtype=torch.float64).index_add_(0, owner, values.double())

        return cls(
            total(moves.kl),
            total(torch.ones_like(moves.kl)),
            total(-moves.before.nan_to_num(0.0, neginf=-math.inf)),
            total(-moves.after.nan_to_num(0.0, neginf=-math.inf)),
            total(~moves.before.isnan()),
        )

    def group(self, name: str, members: Tensor) -> Group:
        kl, tokens = self.kl[members], self.tokens[members]
        count, ratio = len(members), kl.sum() / tokens.sum()
        error = math.nan
        if count > 1:  # of a ratio of two sums over texts
            spread = (kl - ratio * tokens).square().sum() * count / (count - 1)
            error = float(spread.sqrt() / tokens.sum())
        predicted = float(self.predicted[members].sum())
        return Group(
            name=name,
            texts=count,
            tokens=int(tokens.sum()),
            kl=float(ratio),
            kl_error=error,
            perplexity_before=_perplexity(float(self.before[members].sum()), predicted),
            perplexity_after=_perplexity(float(self.after[members].sum()), predicted),
        )


def _perplexity(nll: float, tokens: float) -> float:
    if not tokens:
        return math.nan
    mean = nll / tokens
    return math.exp(mean) if mean < 700 else math.inf


def _decode(tokenizer: Any, ids: Tensor) -> str:
    if not hasattr(tokenizer, "decode"):
        return " ".join(map(str, ids.tolist()))
    return str(tokenizer.decode(ids.tolist()))


def _line(group: Group, width: int) -> str:
    error = "" if math.isnan(group.kl_error) else f"± {group.kl_error:.2g}"
    return (
        f"{group.name:{width}}  {group.texts:5d}  {group.tokens:7d}  {group.kl:8.4g} {error:10}  "
        f"{group.perplexity_before:.4g} -> {group.perplexity_after:.4g}"
    )


def _short(text: str, *, end: bool = False, width: int = 60) -> str:
    text = " ".join(text.split())
    if len(text) <= width:
        return repr(text)
    return repr("…" + text[-width:] if end else text[:width] + "…")


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nan(item) for item in value]
    return value
