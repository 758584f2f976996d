"""Which prompts are attributed together: windows of a stream, and the batches of each."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..options import EngineName
from ..structure import Structure, embedding_weight, text_config
from .prefill import Batch
from .prompts import Tokens

logger = logging.getLogger(__name__)

_POINTS = 16_384  # on a GPU, where nothing says how many fit
_POSITIONS = "max_position_embeddings"
# As `BatchLimits.border`; of a file's JSON it is a list.
Border = Sequence[int]


@dataclass(frozen=True)
class BatchLimits:
    """How large a batch may be.

    Attributes:
        prompts: that many in each, whatever they cost; None for as many as the rest allows.
        tokens: of all its prompts, padded to the longest.
        points: of all its prompts' paths.
        processes: that share the batches; none is left without one for the size of the others'.
        border: tokens, and whether dynamic: a prompt of more is with others such alone, since its
            rotary embedding has other frequencies, which all of a batch would get, and where these
            go by the length with its equals alone. None where they are always the same.
        apart: whether prompts that are not plain, which the staircase would refuse with all of
            their batch, are with others such alone, and after the rest.
    """

    prompts: int | None
    tokens: int
    points: int
    processes: int = 1
    border: Border | None = None
    apart: bool = False

    @classmethod
    def of(
        cls,
        device: torch.device,
        prompts: int | None,
        processes: int = 1,
        points: int | None = None,
        border: Border | None = None,
    ) -> BatchLimits:
        """Those of a device, or so many ``prompts``.

        Args:
            device: where the model is.
            prompts: in each batch.
            processes: that share the batches.
            points: that its memory holds, and as many tokens; None if that is not known.
            border: as of the limits.

        Raises:
            ValueError: if ``prompts`` is no positive integer, or there is no process.
        """
        if prompts is not None and (not isinstance(prompts, int) or prompts < 1):
            raise ValueError(f"batch_size must be a positive integer; it is {prompts!r}.")
        if processes < 1:
            raise ValueError(f"{processes} processes or GPUs do nothing; there must be one.")
        # Measured on 2 cores (benchmarks/NOTES.md): more points leave the cache, fewer idle the
        # cores.
        sizes = (1024, 512) if device.type == "cpu" else (_POINTS, _POINTS)
        return cls(prompts, *(sizes if points is None else (points, points)), processes, border)

    def of_engine(self, name: EngineName) -> BatchLimits:
        """Those of an engine: decode and reforward take a prompt after the other.

        They gain nothing by large batches, which are what a log keeps.
        """
        if name == "staircase":
            return replace(self, apart=True)
        return replace(self, tokens=min(self.tokens, _POINTS), points=min(self.points, _POINTS))

    def size(self, longest: int, points: int, among: int) -> int:
        """How many make a batch.

        Args:
            longest: tokens of the longest prompt.
            points: path points of a prompt.
            among: prompts in the window.
        """
        fitting = min(self.tokens // longest, self.points // points)
        return self.prompts or max(1, min(fitting, -(-among // self.processes)))


def rotary_border(model: nn.Module) -> Border | None:
    """Tokens from which on a model's rotary embedding has other frequencies, and whether dynamic.

    LongRoPE's (Phi-3) and dynamic ones go by the longest sequence of a batch; None of the others.
    """
    config = text_config(model)
    kinds = [k for k in _rotary_kinds(config) if k.get("rope_type") in ("longrope", "dynamic")]
    borders = [k.get(f"original_{_POSITIONS}") or getattr(config, _POSITIONS, None) for k in kinds]
    dynamic = any(kind["rope_type"] == "dynamic" for kind in kinds)
    return min(((border, dynamic) for border in borders if border), default=None)


def _rotary_kinds(config: Any) -> list[dict[str, Any]]:
    """What a config says of its rotary embeddings, of which each type of layer may have its own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [kind for kind in (parameters, *parameters.values()) if isinstance(kind, dict)]


def check_lengths(sequences: Iterable[Tokens], structure: Structure) -> Iterator[Tokens]:
    """The same prompts; it is logged of one beyond what a rotary embedding was made for.

    Raises:
        ValueError: for one longer than a table of learned positions. A GPU that looks up what is
            beyond it does nothing more for the process.
    """
    config = text_config(structure.causal_lm)
    name = type(structure.causal_lm).__name__
    kinds = {kind.get("rope_type"): kind for kind in _rotary_kinds(config)}
    told = not kinds or "dynamic" in kinds  # which is for such prompts
    table, most = _position_table(structure) or (None, getattr(config, _POSITIONS, None))
    if isinstance(most, int) and "yarn" in kinds:  # Qwen's are written beside an unchanged number
        yarn = kinds["yarn"]
        original, factor = (yarn.get(key) or 0 for key in (f"original_{_POSITIONS}", "factor"))
        most = max(most, int(original * factor))
    for i, tokens in enumerate(sequences):
        answers = (x for x in (tokens.answer, tokens.contrast) if x is not None)
        length = len(tokens) + max(map(len, answers), default=1) - 1
        if isinstance(most, int) and length > most:
            if table is not None:
                raise ValueError(
                    f"prompt {i} has {length} tokens, and {name} has {most} positions ({table}); "
                    "leave it out, or give less of it."
                )
            if not told and not tokens.media:  # images may have fewer positions than tokens
                told = True
                logger.warning(
                    "prompt %d has %d tokens, more than the %d of max_position_embeddings that %s "
                    "was made for: what it predicts there may say little. It is said once.",
                    i, length, most, name,
                )  # fmt: skip
        yield tokens


def _position_table(structure: Structure) -> tuple[str, int] | None:
    """The name of a decoder's embedding of positions, and how many it has; None without one.

    It lies outside of the layers, is as wide as they are, as the embedding of tokens or, of
    RoFormer, as a head, and has a row for each of ``max_position_embeddings``: OPT's and BART's
    have two more before them, and of RoBERTa's the first ones are the padding's.
    """
    model, in_layers = structure.causal_lm, set(map(id, structure.parts))
    tokens, config = model.get_input_embeddings(), text_config(model)
    heads = getattr(config, "num_attention_heads", None) or 1
    widths = {structure.hidden_size, embedding_weight(model).shape[-1]}
    widths.add(structure.hidden_size // heads)
    most = getattr(config, _POSITIONS, None)
    if not isinstance(most, int):
        return None
    modules: Iterator[tuple[str, nn.Module]] = structure.decoder.named_modules()
    for name, module in modules:
        if not isinstance(module, nn.Embedding) or module is tokens or id(module) in in_layers:
            continue
        if most <= module.num_embeddings <= most + 2 and module.embedding_dim in widths:
            padding = -1 if module.padding_idx is None else module.padding_idx
            return name, min(most, module.num_embeddings - padding - 1)
    return None


@dataclass(frozen=True)
class PlannedBatch:
    """Prompts that are attributed together.

    Attributes:
        number: of the batch, counted from 0.
        members: the prompts' places in the result.
        sequences: their tokens.
    """

    number: int
    members: list[int]
    sequences: list[Tokens]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, to which all are padded."""
        return max(map(len, self.sequences))

    def tokens_at_once(self, points: int, *, alone: bool) -> int:
        """Of the larger of its two forward passes, in the average layer.

        Args:
            points: path points of a prompt, of which half are there in the average layer.
            alone: whether one prompt runs after the other.
        """
        return (1 if alone else len(self.members)) * max(self.longest, points // 2)

    def cost(self, points: int) -> int:
        """In tokens, with so many path points a prompt.

        A point passes half of the layers on average, forward and backward.
        """
        return len(self.members) * (self.longest + points)

    def digest(self) -> str:
        """A hash of all that the batch's results depend on beside the model and the definition."""
        digest = hashlib.sha256(repr(self.members).encode())
        for tokens in self.sequences:
            digest.update(tokens.content())
        return digest.hexdigest()[:32]

    def halves(self) -> list[PlannedBatch]:
        """The same prompts in two batches; there are two at least."""
        middle = len(self.members) // 2
        return [
            replace(self, members=self.members[part], sequences=self.sequences[part])
            for part in (slice(middle), slice(middle, None))
        ]

    def on(self, device: torch.device) -> Batch:
        """The batch itself, padded on the right, where the model takes its tokens."""
        lengths = torch.tensor([len(tokens) for tokens in self.sequences])
        input_ids = torch.zeros(len(self.members), self.longest, dtype=torch.int64)
        for padded, tokens in zip(input_ids, self.sequences, strict=True):
            padded[: len(tokens)] = torch.from_numpy(tokens.ids)
        return Batch(
            input_ids.to(device),
            lengths.to(device),
            _tensors(tokens.answer for tokens in self.sequences),
            [tokens.media for tokens in self.sequences],
            contrast=_tensors(tokens.contrast for tokens in self.sequences),
        )


def _tensors(answers: Iterable[np.ndarray | None]) -> list[Tensor] | None:
    """All or none of a batch's prompts have one."""
    found = [torch.from_numpy(answer) for answer in answers if answer is not None]
    return found or None


@dataclass(frozen=True)
class Window:
    """Prompts that are sorted by length together.

    Attributes:
        first: the place of the first in the result.
        sequences: their tokens.
    """

    first: int
    sequences: list[Tokens]

    @property
    def end(self) -> int:
        return self.first + len(self.sequences)

    def batches(self, number: int, limits: BatchLimits, points: int) -> list[PlannedBatch]:
        """The longest prompts first, so that what does not fit fails now.

        Where prompts that are not plain are apart, their batches are as large as decode's.

        Args:
            number: of the first batch.
            limits: of each batch.
            points: path points of a prompt.
        """

        def kind(i: int) -> tuple[bool, int]:
            tokens, border = self.sequences[i], limits.border
            if border is None or len(tokens) <= border[0]:
                return limits.apart and not tokens.plain, 0
            return limits.apart and not tokens.plain, -len(tokens) if border[1] else -1

        places = range(len(self.sequences))
        order = sorted(places, key=lambda i: (kind(i), -len(self.sequences[i])))
        batches: list[PlannedBatch] = []
        start = 0
        while start < len(order):
            first = order[start]
            own = limits.of_engine("decode") if kind(first)[0] else limits
            size = own.size(len(self.sequences[first]), points, len(order))
            chosen = [i for i in order[start : start + size] if kind(i) == kind(first)]
            start += len(chosen)
            members = [self.first + i for i in chosen]
            sequences = [self.sequences[i] for i in chosen]
            batches.append(PlannedBatch(number + len(batches), members, sequences))
        return batches


def windows(sequences: Iterable[Tokens], size: int | None) -> Iterator[Window]:
    """Windows of ``size`` prompts, or one window of all."""
    source, first = iter(sequences), 0
    while True:
        read = list(itertools.islice(source, size))
        if read:
            yield Window(first, read)
        first += len(read)
        if size is None or len(read) < size:
            return
