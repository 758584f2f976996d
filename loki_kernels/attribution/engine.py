"""Which engine runs an attribution: the cheapest that reproduces the model's own logits."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..options import EngineName
from ..structure import Structure, embedding_weight
from .copies import Copies
from .definitions import Definition, PathIntegral
from .integration import relative_error
from .plan import PlannedBatch
from .prefill import Batch, run_prefill
from .probe import check_model, check_sums
from .prompts import Tokens
from .scores import Scores
from .sequence import scaled_prefixes
from .staircase import Staircase
from .steering import forget_lengths, why_no_staircase

logger = logging.getLogger(__name__)

_TOKENS = 16  # of the prompt that engines are tried with
# Relative error allowed of a layer's gradient, by bytes of a number. Rounding alone is 4e-6 in
# float32 and .054 in bfloat16 in the worst of SmolLM2-135M's layers, in bfloat16 .03 in those of
# tiny hybrids and mixtures. Without the inner path of a convolution it is .29 in a random model of
# three layers, one of which has one.
_GRADIENT_TOLERANCE = {8: 1e-2, 4: 1e-2, 2: 0.2}


@dataclass(frozen=True)
class OnStaircase:
    """All path points in one growing batch over the prompt's keys and values (`Staircase`)."""

    structure: Structure
    integral: PathIntegral
    name: ClassVar[EngineName] = "staircase"

    def attribute(self, batch: Batch) -> Scores:
        structure, integral = self.structure, self.integral
        if any(batch.media):
            raise UnsupportedModelError(
                "prompts with images or sounds count their positions in a way of their own, which "
                "engine='decode' leaves to the model."
            )
        if any(len(answer) > 1 for answer in batch.answers or ()):
            raise UnsupportedModelError(
                "an answer of several tokens is processed after the prompt, as engine='decode' "
                "does it."
            )
        forget_lengths(structure)
        layers = list(structure.present())
        prefill = run_prefill(structure, batch, integral)
        staircase = Staircase(structure, batch, prefill, integral)
        if integral.definition.path == "last_token":
            prefix = prefill.prefix
            if any(keys.shape[-1] != values.shape[-1] for keys, values in prefix.values()):
                # Latent attention caches what it makes keys and values of, at every step anew.
                prefix = scaled_prefixes(structure, batch, prefill, integral, [])
            return staircase.run(layers, prefix)
        parts = []
        # One layer at a time: a copy of the whole prompt's keys and values a path point is what the
        # memory holds.
        for layer in layers:
            prefix = scaled_prefixes(structure, batch, prefill, integral, [layer])
            parts.append(staircase.run([layer], prefix))
        return Scores.of_layers(parts)


# Each has a `name` and an `attribute`, the scores of a batch's layers that have an FFN.
Engine = OnStaircase | Copies
# What makes an engine of a structure and what is integrated.
_Make = Callable[[Structure, PathIntegral], Engine]

# Trying engines takes as long as a short prompt does; each batch is guarded anyway.
_chosen: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], _Make]] = (
    weakref.WeakKeyDictionary()
)


def attribute_batch(engine: Engine, batch: Batch) -> Scores:
    """Scores of a batch, those of its contrast subtracted: the integral is linear in F.

    They are where the model takes its tokens: of a model on several devices the staircase's are
    with the head, decode's with the logits, and those of one attribution are joined and counted.
    """
    scores = engine.attribute(batch)
    if batch.contrast is not None:
        scores = scores.minus(engine.attribute(replace(batch, answers=batch.contrast)))
    return scores.to(engine.structure.device)


def choose_engine(
    structure: Structure,
    prompts: Sequence[Tokens],
    integral: PathIntegral,
    wanted: EngineName | None,
) -> Engine:
    """The first engine that passes its own guard on a short prompt, or one with images or sounds.

    The staircase, if it takes more than half of the prompts: `Job` leaves others to decode.

    Args:
        structure: a borrowed model.
        prompts: some of those that will be attributed.
        integral: what will be integrated.
        wanted: an engine by name; None tries the staircase, then decode.

    Raises:
        UnsupportedModelError: if none does; it names each one's reason. Or if a layer's FFN is no
            sum of its blocks.
        ValueError: if the logits are NaN.
    """
    if wanted is None and not structure.sharded:  # else `Job` leaves none to another
        most = _staircase_of_most(structure, prompts, integral)
        if most is not None:
            return most
    prompt, definition = _prompt_to_try(prompts), integral.definition
    config = structure.causal_lm.config
    known = _chosen.setdefault(structure.causal_lm, {})
    # Sharded or not: processes that had tried different engines would make different numbers of
    # passes here, which they make together.
    key = (
        wanted, definition.path, definition.site, bool(prompt.media), prompt.several,
        structure.sharded,
        embedding_weight(structure.causal_lm).dtype, getattr(config, "_attn_implementation", None),
    )  # fmt: skip
    if key in known:
        return known[key](structure, integral)
    one = replace(integral, alphas=integral.alphas[-1:], weights=integral.weights[-1:])
    probe = PlannedBatch(0, [0], [prompt]).on(structure.device)
    text = PlannedBatch(0, [0], [Tokens(short_prompt(prompt).numpy()[0])]).on(structure.device)
    check_sums(structure, text.input_ids)
    reasons = []
    for make in _candidates(wanted, media=bool(prompt.media)):
        engine = make(structure, one)
        try:
            _refuse_early(engine)
            if isinstance(engine, OnStaircase) and not prompt.media:  # with it all are refused
                check_model(structure, text.input_ids)
            attribute_batch(engine, probe)
            if isinstance(engine, Copies) and engine.cached:
                _check_gradient(engine, text)
        except UnsupportedModelError as error:
            reasons.append(f"{engine.name}: {error}")
            continue
        known[key] = make
        _say(engine, reasons, wanted)
        return make(structure, integral)
    hint = ""
    if wanted is None:
        hint = (
            " engine='reforward' runs whole prompts for every path point, which takes about a "
            "hundred times as long."
        )
    raise UnsupportedModelError("; ".join(dict.fromkeys(reasons)) + hint)


def _staircase_of_most(
    structure: Structure, prompts: Sequence[Tokens], integral: PathIntegral
) -> Engine | None:
    """The staircase, where it takes more than half of the prompts and decode the others.

    One image or one long answer among thousands of prompts makes none of the others slower.
    """
    others = [tokens for tokens in prompts if not tokens.plain]
    if not others or 2 * len(others) >= len(prompts):
        return None
    plain = [tokens for tokens in prompts if tokens.plain]
    try:
        engine = choose_engine(structure, plain, integral, "staircase")
        choose_engine(structure, others, integral, "decode")
    except UnsupportedModelError:
        return None
    return engine


def _prompt_to_try(prompts: Sequence[Tokens]) -> Tokens:
    """The first with images, sounds or a long answer; else a few tokens of the first."""
    prompt = next((tokens for tokens in prompts if not tokens.plain), None)
    if prompt is not None:
        return prompt
    return replace(prompts[0], ids=short_prompt(prompts[0]).numpy()[0])


def short_prompt(tokens: Tokens) -> Tensor:
    """int64 ``[1, 16]``, the last tokens of a prompt, over and over if it is shorter.

    Of one with images or sounds the very last, which stands for none of them.
    """
    ids = tokens.ids[-1:] if tokens.media else tokens.ids
    ids = np.tile(ids, -(-_TOKENS // len(ids)))[-_TOKENS:]
    return torch.from_numpy(ids.astype(np.int64))[None]


def _candidates(wanted: EngineName | None, *, media: bool) -> Iterator[_Make]:
    if wanted in (None, "staircase"):
        yield OnStaircase
    if wanted in (None, "decode"):
        yield functools.partial(Copies, cached=True)
        if media:  # else it is the same
            yield functools.partial(Copies, cached=True, numbered="all")
        yield functools.partial(Copies, cached=True, numbered="none")
    if wanted == "reforward":
        yield functools.partial(Copies, cached=False)


def _refuse_early(engine: Engine) -> None:
    """Raise UnsupportedModelError for what is known before anything runs."""
    if engine.name == "staircase":
        reason = why_no_staircase(engine.structure.decoder)
        if reason is not None:
            raise UnsupportedModelError(reason)
    if engine.name == "decode" and engine.integral.definition.path == "sequence":
        raise UnsupportedModelError(
            "path='sequence' scales every token, and the earlier ones are in the cache."
        )


def _check_gradient(engine: Copies, text: Batch) -> None:
    """Raise UnsupportedModelError if one token over a cache has another gradient than in a prompt.

    A fused kernel for one token may have no backward pass. Beside a gate, as in Mamba, the mixer's
    output keeps some gradient then, and the logits are as they should be. It is compared at the
    prompt itself, and of a logit: that of a probability which is nearly one depends on how 16 bits
    round the logits. Where whole prompts are refused, there is nothing to compare with.
    """
    structure, one = engine.structure, torch.ones(1, dtype=torch.float64)
    definition = Definition(objective="logit", multiply=False, site=engine.integral.definition.site)
    gradient = replace(engine, integral=PathIntegral(definition, one, one))
    try:
        (got,) = gradient.attribute(text).scores
        (want,) = replace(gradient, cached=False).attribute(text).scores
    except UnsupportedModelError:
        return
    error = relative_error(got, want)
    tolerance = _GRADIENT_TOLERANCE[embedding_weight(structure.causal_lm).dtype.itemsize]
    if error > tolerance:
        raise UnsupportedModelError(
            f"the gradient of one token of {type(structure.causal_lm).__name__} over its cache is "
            f"not that of whole prompts (relative error {error:.2g}, allowed {tolerance:g}): a "
            "fused kernel for one token without a backward pass (mamba_ssm, causal_conv1d, fla) "
            "may be installed; uninstall it, or engine='reforward'."
        )


def _say(engine: Engine, reasons: list[str], wanted: EngineName | None) -> None:
    if engine.name == "decode" and wanted is None:
        because = f" ({reasons[0]})" if reasons else ""
        logger.info("attributing with the decode engine%s", because)
    elif engine.name == "reforward":
        logger.warning(
            "the reforward engine runs the whole prompt for every path point of every layer, about "
            "a hundred times the staircase's work at 128 tokens."
        )
