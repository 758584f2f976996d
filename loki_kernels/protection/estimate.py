"""`estimate_protection`: second moments of the down-projections' inputs on general text."""

from __future__ import annotations

import hashlib
import logging
import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._version import __version__
from ..attribution.prompts import text_ids
from ..attribution.result import model_settings
from ..cache import cache_folder, read_cached, write_cached
from ..default_device import made_on_cpu
from ..discovery import find_structure
from ..fingerprint import model_fingerprint
from ..mixture import experts_per_token
from ..options import DEFAULT_SAMPLES
from ..placement import on_accelerator, warn_of_slow_products
from ..progress import progress_bar
from ..questions import Question, refuse_table
from ..sharding import is_sharded, of_the_first
from ..structure import Structure, evaluating, refuse_tensor_parallelism, text_config
from ..team import Team
from ..tokenizing import before_every_text, find_tokenizer, from_string, pieces, tokenizer_in
from .moments import (
    FEATURES_A_DIRECTION,
    Moment,
    default_directions,
    layers_at_a_time,
    moment_of,
    refuse_untold_inputs,
    second_moments,
    top_eigenvectors,
)
from .result import Protection, fingerprint_of
from .samples import LENGTH, draw_samples, openings_of, stops_of

logger = logging.getLogger(__name__)

_WINDOW = 512  # tokens of a text that are read at once
_TOKENS_A_DIRECTION = 112  # that full samples have, of experts on average
_MOST_SAMPLES = 2048  # unless more are asked for: of large mixtures they would take hours


@made_on_cpu
def estimate_protection(
    model: nn.Module,
    texts: Iterable[str | Sequence[Any] | Question | Mapping[str, Any]] | None = None,
    *,
    tokenizer: Any = None,
    samples: int | None = None,
    share: float | None = None,
    max_directions: int | None = None,
    earlier: Protection | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Protection:
    """The directions in which general text drives every down-projection of a model.

    Of a layer's inputs x the top eigenvectors of E[x x^T] (E over tokens, first ones of a text left
    out); of experts each one's own, x times the expert's share of the token. How many: a fourteenth
    of the features, which forgot less than the half or more of them that hold 90 % of the energy
    (docs/forgetting.md), and fewer where fewer hold 90 %; or as ``share`` and ``max_directions``
    say. A model on the CPU is on the accelerator meanwhile, if it fits there.

    Args:
        model: a transformers causal language model, patched or not.
        texts: strings, chats, questions, token ids, or records of one as `attribute` takes; longer
            ones are cut into windows of 512 tokens, each with its BOS. None draws ``samples``.
        samples: how many, of 256 tokens; None: 192 to 2,048, some 112 tokens a direction (448 at
            8B). With 447, 112 and 47 the KL was as 1 to 1.09 to 1.29 (SmolLM2-135M, one seed).
        tokenizer: for strings and samples; by default the one of ``model.name_or_path``.
        share: as many directions as hold so much of the inputs' energy, the trace; in (0, 1).
        max_directions: of a layer, and of each expert, at most. Layers of more than 4,096 features
            are done by subspace iteration if it is at most a quarter of them, which takes seconds
            where all eigenvectors of 14,336 take half a minute on a GPU, by count.
        earlier: a protection whose energy is added, to protect an earlier task too (``texts``).
        batch_size: texts at a time.
        seed: of the samples.
        progress: whether to show a bar; None: on a terminal and in a notebook.

    Raises:
        TypeError: for one string, which is no list of texts, or counts that are not whole.
        ValueError: for no text, a share or count out of range, an ``earlier`` of other layers, a
            model or tokenizer that samples cannot be drawn from, or weights that are split.
        UnsupportedModelError: if the model has no FFN down-projections, or experts whose inputs
            cannot be told (those that transformers does not decorate).
    """
    _check_options(texts, samples, share, max_directions, batch_size)
    structure = find_structure(model)
    _refuse_sharded(structure)
    refuse_untold_inputs(structure)
    if earlier is not None:
        earlier = earlier.of(structure)
    causal_lm = structure.causal_lm
    with on_accelerator(model), evaluating(causal_lm):
        warn_of_slow_products(next(structure.projections()).weight)
        own = texts is None
        if own:
            tokenizer = tokenizer or find_tokenizer(causal_lm)
            samples = samples or samples_to_draw(structure, max_directions)
            texts = draw_samples(causal_lm, tokenizer, count=samples, seed=seed, progress=progress)
        assert texts is not None
        windows = list(_windows(texts, tokenizer, structure))
        _check_windows(windows, structure.vocab_size)
        parts: dict[str, tuple[Tensor, Tensor, float]] = {}
        read: dict[str, float] = {}
        for name, moment in _moments(structure, windows, batch_size, earlier, progress):
            parts[name] = top_eigenvectors(moment.matrix, share, max_directions)
            read[name] = moment.tokens
    info = {
        "model": getattr(causal_lm, "name_or_path", None),
        "texts": "the model's own samples" if own else "given",
        "tokens": sum(len(window) - 1 for window in windows),
        "seed": int(seed) if own else None,
        "share": share and float(share),
        "max_directions": max_directions and int(max_directions),
        "earlier": fingerprint_of(earlier),
        "loki_kernels": __version__,
    }
    result = _of_parts(parts, info)
    if earlier is None:  # else there is more than was read now
        _warn_of_few(result, read)
    return result


def _refuse_sharded(structure: Structure) -> None:
    refuse_tensor_parallelism(structure)
    if any(map(is_sharded, structure.causal_lm.parameters())):
        raise ValueError(
            "FSDP2 or ZeRO-3 has split the weights, and a protection is estimated by one process "
            "from a whole model: write one first (loki-kernels protection MODEL FILE) and pass "
            "protect=FILE."
        )


def _check_options(
    texts: object,
    samples: int | None,
    share: float | None,
    max_directions: int | None,
    batch_size: int,
) -> None:
    refuse_table("texts", texts)
    if isinstance(texts, (str, os.PathLike)):
        raise TypeError(
            f"texts is {texts!r}; give a list of texts, or a file to `loki-kernels protection "
            "MODEL OUT --texts FILE`."
        )
    if isinstance(texts, Mapping):
        raise TypeError(
            f"texts is a {type(texts).__name__}; give texts, or the token ids of each without "
            "padding."
        )
    if texts is not None and samples is not None:
        raise ValueError("samples= are drawn where no texts are given; leave one of the two out.")
    if share is not None and not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1); it is {share}.")
    counts = (batch_size, samples, max_directions)
    if min(operator.index(x) for x in counts if x is not None) < 1:
        raise ValueError("samples, max_directions and batch_size must be positive.")


def samples_to_draw(structure: Structure, most: int | None = None) -> int:
    """How many samples give each of at most so many directions of a layer, or expert, tokens."""
    passed = experts_per_token(text_config(structure.causal_lm))
    tokens = 0.0
    for down_proj in structure.projections():
        reach = min(1.0, passed / math.prod(down_proj.experts))  # the share of tokens, on average
        width = down_proj.in_features
        wanted = _TOKENS_A_DIRECTION * min(width, most or default_directions(width))
        tokens = max(tokens, wanted / reach)
    return min(max(DEFAULT_SAMPLES, math.ceil(tokens / LENGTH)), _MOST_SAMPLES)


def _check_windows(windows: Sequence[list[int]], vocab_size: int) -> None:
    if not any(len(window) > 1 for window in windows):
        raise ValueError("there is no text of two tokens or more to estimate from.")
    for number in (min(map(min, windows)), max(map(max, windows))):
        if not 0 <= number < vocab_size:
            raise ValueError(
                f"the texts hold token id {number}, outside the model's vocabulary of {vocab_size}."
            )


def _moments(
    structure: Structure,
    windows: Sequence[list[int]],
    batch_size: int,
    earlier: Protection | None,
    progress: bool | None,
) -> Iterator[tuple[str, Moment]]:
    """(name of a down-projection, the moment of its inputs and of an earlier protection's)."""
    layers = list(structure.projections())
    with progress_bar(len(layers), "estimate the inputs' moments", progress) as bar:
        for group in layers_at_a_time(layers):
            moments = second_moments(structure, group, windows, batch_size)
            for down_proj in group:
                matrix, tokens = moments.pop(down_proj.name)
                if earlier is not None:
                    matrix = matrix + moment_of(earlier, down_proj.name, matrix.device)
                yield down_proj.name, Moment(matrix, tokens)
                bar.update()


def _warn_of_few(protection: Protection, read: dict[str, float]) -> None:
    """Of few tokens for the width: their directions hold their own energy whatever they are."""
    passed_by = [name for name, tokens in read.items() if not tokens]
    if passed_by:
        logger.warning(
            "no token reaches %d of the down-projections (%s, ...), whose updates are protected "
            "from nothing: texts are read without images and sounds.",
            len(passed_by), passed_by[0],
        )  # fmt: skip
    widths = {name: protection.directions[name].shape[-2] for name in read if read[name]}
    if not widths:
        return
    name = min(widths, key=lambda name: read[name] / widths[name])
    if read[name] < 2 * widths[name]:
        logger.warning(
            "the protection of %s is estimated from %d tokens%s, fewer than two for each of the %d "
            "inputs; it protects these texts and little else. Give more texts.",
            name, read[name], " an expert" if protection.directions[name].ndim == 3 else "",
            widths[name],
        )  # fmt: skip


def cached_protection(structure: Structure, tokenizer: Any) -> Protection:
    """`estimate_protection` on the model's own samples, from the cache if it is there.

    In distributed training the first process's reaches all: two processes would draw other samples.

    Raises:
        ValueError: as `estimate_protection`.
        RuntimeError: if the first process fails.
    """
    _refuse_sharded(structure)
    with Team() as team:
        if team.size == 1:
            return _cached_or_estimated(structure, tokenizer)
        found = None if team.rank else _cached_or_estimated(structure, tokenizer)
        team.meet("the first one estimates the protection of all")
        result = _of_the_first(found, [d.name for d in structure.projections()])
    result.check(structure)
    return result


def find_cached(structure: Structure) -> Protection | None:
    """The one that `cached_protection` would find, without estimating."""
    try:
        path = _cache_file(structure, find_tokenizer(structure.causal_lm))
    except ValueError:  # there is no tokenizer
        return None
    return read_cached(path, Protection.load)


def _cache_file(structure: Structure, tokenizer: Any) -> Path:
    stops = stops_of(structure.causal_lm, tokenizer)
    known = (
        __version__,
        FEATURES_A_DIRECTION,
        model_fingerprint(structure.causal_lm),
        model_settings(structure.causal_lm),
        openings_of(tokenizer),
        samples_to_draw(structure),
        *([stops] if stops else []),
    )
    key = hashlib.sha256(repr(known).encode())
    return cache_folder() / f"protection-{key.hexdigest()[:32]}.safetensors"


def _cached_or_estimated(structure: Structure, tokenizer: Any) -> Protection:
    tokenizer = tokenizer or find_tokenizer(structure.causal_lm)
    path = _cache_file(structure, tokenizer)
    found = read_cached(path, Protection.load)
    if found is not None:
        logger.info("using the protection cached in %s", path)
        return found
    result = estimate_protection(structure.given, tokenizer=tokenizer)
    write_cached(path, result.save)
    return result


def _of_parts(parts: dict[str, tuple[Tensor, Tensor, float]], info: dict[str, Any]) -> Protection:
    """Of each layer's directions, energies and total."""
    directions, energies, totals = ({n: part[i] for n, part in parts.items()} for i in range(3))
    return Protection(directions, energies, totals, info)  # type: ignore[arg-type]


def _of_the_first(found: Protection | None, names: Sequence[str]) -> Protection:
    """The first process's, in all of them; a layer at a time, of which one takes 59 MB at 8B."""
    parts: dict[str, Any] = {
        name: of_the_first(
            found and (found.directions[name], found.energies[name], found.totals[name])
        )
        for name in names
    }
    return _of_parts(parts, of_the_first(found and found.info))  # type: ignore[arg-type]


def _windows(texts: Iterable[Any], tokenizer: Any, structure: Structure) -> Iterator[list[int]]:
    """Each begins with what the tokenizer puts before every text, as models know it.

    Of token ids too, if they begin so: the command line makes ids of all texts.
    """
    for i, text in enumerate(texts):
        prompt = isinstance(text, (Question, Mapping)) or any(
            isinstance(part, Mapping) for part in text[:1]
        )
        ids = isinstance(text, Mapping) and "input_ids" in text
        if isinstance(text, str) or (prompt and not ids):
            tokenizer = tokenizer or find_tokenizer(structure.causal_lm)
        if prompt:
            text = text_ids(text, f"text {i}", tokenizer, structure.vocab_size).tolist()
        elif isinstance(text, str):
            text = from_string(text, tokenizer_in(tokenizer))
        start = before_every_text(tokenizer_in(tokenizer))
        head = start if list(text[: len(start)]) == start else []
        for part in pieces(len(text), _WINDOW, len(head)):
            yield [*(head if part.start else []), *text[part]]
