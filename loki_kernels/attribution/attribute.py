"""`attribute`: prompts in, scores out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sized
from typing import Any, Literal, Unpack, get_args, overload

import torch
from torch import Tensor, nn

from ..default_device import made_on_cpu
from ..discovery import find_structure
from ..errors import check_choice
from ..options import (
    DEFAULT_CRITERION,
    DEFAULT_DEFINITION,
    DEFAULT_QUOTA,
    DEFAULT_STEPS,
    Criterion,
    DefinitionName,
    EngineName,
    Keep,
)
from ..placement import warn_of_slow_products
from ..ranking import rows_per_layer
from ..structure import Structure, refuse_tensor_parallelism
from ..team import Team
from .answers import Target, check_answers, with_answers
from .definitions import Overrides, PathIntegral
from .fitting import points_that_fit
from .job import Job
from .plan import BatchLimits, check_lengths, rotary_border, windows
from .prompts import WINDOW, tokenize_prompts
from .result import Attribution, AttributionCounts, describe_run
from .scores import Counter

logger = logging.getLogger(__name__)

# Above this ratio of mean |completeness error| to mean |F(z) - F(baseline)| the path integral is
# not resolved at all; SmolLM2-135M has 0.1 to 0.6 at m = 7, post-norm models (Gemma-2) 10 and more.
_UNRESOLVED = 1.0

# A target that this share of at least so many prompts have in common says little of the prompts.
_ONE_TARGET, _ENOUGH_PROMPTS = 0.9, 20
_VANISHED = 1e-30  # a probability whose products with small gradients are subnormal or zero


class Options(Overrides, total=False):
    """What `attribute` and `patch`'s own analysis are told alike."""

    chat_template_kwargs: Mapping[str, Any] | None
    definition: DefinitionName
    steps: int
    engine: EngineName | None
    batch_size: int | None
    target: Target | None
    contrast: Target | None
    progress: bool | None


@overload
def attribute(
    model: nn.Module,
    prompts: Iterable[Any],
    *,
    tokenizer: Any = None,
    keep: Literal["scores"] = "scores",
    out: str | os.PathLike[str] | None = None,
    share: bool = True,
    **options: Unpack[Options],
) -> Attribution: ...
@overload
def attribute(
    model: nn.Module,
    prompts: Iterable[Any],
    *,
    tokenizer: Any = None,
    keep: Literal["counts"],
    quota: float | None = None,
    criterion: Criterion | None = None,
    out: str | os.PathLike[str] | None = None,
    share: bool = True,
    **options: Unpack[Options],
) -> AttributionCounts: ...
@made_on_cpu
def attribute(
    model: nn.Module,
    prompts: Iterable[Any],
    *,
    tokenizer: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    definition: DefinitionName = DEFAULT_DEFINITION,
    steps: int = DEFAULT_STEPS,
    engine: EngineName | None = None,
    batch_size: int | None = None,
    target: Target | None = None,
    contrast: Target | None = None,
    keep: Keep = "scores",
    quota: float | None = None,
    criterion: Criterion | None = None,
    out: str | os.PathLike[str] | None = None,
    share: bool = True,
    progress: bool | None = None,
    **overrides: Unpack[Overrides],
) -> Attribution | AttributionCounts:
    """Attribute the model's next token to every FFN node, for every prompt and layer.

    z_l is layer l's node vector at the last prompt token; F is the objective, a function of the
    target token's logit; the score is a quadrature of ``∂F/∂z`` along a path from the baseline to
    z (arXiv 2505.22120, Eq. 3-5; see `DEFINITIONS`). The model is as before afterwards.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        prompts: strings, questions or chat-message lists without the answer at their end (with
            ``tokenizer``, a transformers tokenizer or a processor), mappings with ``messages``,
            ``prompt`` or ``text``, or with ``input_ids`` and ``attention_mask``, padded on either
            side. Lists and tuples are checked whole before anything runs, another iterable as it is
            read. A prompt whose own last token is EOS is attributed at the token after it.
        chat_template_kwargs: for the chat template, such as ``{"enable_thinking": False}``.
        definition: ``"published"``, ``"paper"`` or ``"captum"``; by ``steps`` path points m.
        engine: ``"staircase"``, ``"decode"`` or ``"reforward"``; the first exact one of the former.
        batch_size: prompts at a time; by default what a GPU has room for by count, on a CPU 1,024
            tokens and 512 path points. What does not fit is halved, if each process has the model.
        target: each prompt's token to attribute, or answer of several (its tokens or its text); by
            default what the model predicts. With ``contrast``, of F(target) - F(contrast).
        keep: ``"counts"`` keeps only what `select` needs for one ``quota`` and ``criterion``, how
            often each node is among its layer's lowest: L * D numbers for any number of prompts.
        out: a ``.safetensors`` file that receives the results as they come; memory does not grow
            with N. If the process ends early, the same call goes on from ``OUT.partial`` beside it.
        share: under torchrun the processes share the prompts, and each returns all results; all
            have to make this call. False: this process attributes all by itself.
        progress: True or False for the bar; by default it shows on a terminal and in a notebook.
        **overrides: fields of `Definition` to change; ``baseline`` may be a tensor ``[L, D]``.

    Returns:
        An `Attribution` with scores ``[N, L, D]``, D = hidden_size, or intermediate_size for
        ``site="ffn_neurons"``; `AttributionCounts` for ``keep="counts"``.

    Raises:
        ValueError: for an unknown definition or option, empty prompts, token ids out of range, a
            mask with holes, more tokens than learned positions, a target that does not fit, NaN
            weights, counts of NaN scores, or an ``out`` begun otherwise; or processes with such.
        TypeError: for prompts of another kind, or text without a tokenizer.
        UnsupportedModelError: if no engine treats the model's layers exactly.
        RuntimeError, OSError: if ``out`` cannot be written or is another process's, or one failed.
    """
    integral = PathIntegral.resolve(definition, overrides, steps)
    structure = find_structure(model)
    _check_attributable(structure, engine)
    counter = _make_counter(keep, quota, criterion, _width(integral, structure))
    sequences = tokenize_prompts(prompts, tokenizer, structure.vocab_size, chat_template_kwargs)
    sequences = with_answers(sequences, target, contrast, tokenizer, structure.vocab_size)
    held = isinstance(prompts, (list, tuple))
    sequences = check_lengths(check_answers(sequences, integral.definition), structure)
    parts = windows(sequences, None if held else WINDOW)
    run = describe_run(structure, definition, integral, steps, target, contrast)
    with Team(share=share) as team:
        limits = _limits(structure, batch_size, team)
        first = next(parts)
        total = len(prompts) if isinstance(prompts, Sized) and not held else first.end
        job = Job(structure, integral, limits, counter, team, engine)
        result = job.run(first, parts, total, out, run, progress)
    if team.rank == 0:
        _warn(result, tokenizer, given=target is not None)
    return result


def _limits(structure: Structure, batch_size: int | None, team: Team) -> BatchLimits:
    """The batches' limits: those of the process that has least room, so that all plan the same.

    A model that one GPU has room for may be on the CPU in the process of another: then a CPU's.
    """
    room = points_that_fit(structure, structure.device)
    told = [each.split() for each in team.tell(f"{structure.device.type} {room or 0}")]
    least = min(int(points) for _, points in told)
    device = torch.device("cpu") if "cpu" in dict(told) else structure.device
    border = rotary_border(structure.causal_lm)
    return BatchLimits.of(device, batch_size, team.size, least or None, border)


def _check_attributable(structure: Structure, engine: EngineName | None) -> None:
    """Raise UnsupportedModelError for what no engine can do, ValueError for an unknown one.

    What will be slow is logged.
    """
    if engine is not None:
        check_choice("engine", engine, get_args(EngineName))
    if not structure.split:
        refuse_tensor_parallelism(structure)
    model = structure.causal_lm
    if model.get_output_embeddings() is not None or not model.can_generate():
        # raises; a model that generates has logits, with a linear head or not
        structure.head_module()
    down = next(structure.projections())
    warn_of_slow_products(getattr(down.module, down.parameter, None))  # GPTQ's have none


def _make_counter(
    keep: Keep,
    quota: float | None,
    criterion: Criterion | None,
    width: int,
) -> Counter | None:
    check_choice("keep", keep, get_args(Keep))
    if keep == "scores":
        if quota is not None or criterion is not None:
            raise ValueError("quota and criterion belong to keep='counts'; `select` takes them.")
        return None
    criterion = DEFAULT_CRITERION if criterion is None else criterion
    check_choice("criterion", criterion, get_args(Criterion))
    quota = DEFAULT_QUOTA if quota is None else float(quota)
    return Counter(quota, rows_per_layer(quota, width), criterion)


def _width(integral: PathIntegral, structure: Structure) -> int:
    """How many nodes a layer has; ValueError if a given baseline has other ones."""
    width, given = structure.width(integral.definition.site), integral.baseline
    shape = (len(structure.layers), width)
    if given is not None and tuple(given.shape) != shape:
        raise ValueError(
            f"baseline= must be [layers, nodes] = {list(shape)}; it is {list(given.shape)}."
        )
    return width


def _warn_if_unresolved(result: Attribution | AttributionCounts) -> None:
    if result.completeness is None or result.change is None:
        return
    error, change = _mean_size(result.completeness), _mean_size(result.change)
    if error > _UNRESOLVED * change:
        logger.warning(
            "The scores do not add up to the change they attribute: mean |sum of scores - "
            "(F(z) - F(baseline))| is %.3g where mean |F(z) - F(baseline)| is %.3g. Try more "
            "steps; models that normalise the FFN's output (Gemma-2, OLMo-2) make this path "
            "singular at zero, and only another baseline helps.",
            error,
            change,
        )


def _mean_size(values: Tensor) -> float:
    """The mean absolute value, a part at a time: it may be larger than memory."""
    return sum(float(part.abs().sum(dtype=torch.float64)) for part in values.split(1 << 16)) / max(
        values.numel(), 1
    )


def _warn(result: Attribution | AttributionCounts, tokenizer: Any, *, given: bool) -> None:
    _warn_if_unresolved(result)
    _warn_if_vanished(result)
    if not given:
        _warn_of_one_target(result, tokenizer)


def _warn_if_vanished(result: Attribution | AttributionCounts) -> None:
    """The probability of a long answer has no digits in float32, and ties go to the first rows."""
    value = result.value
    if result.run.get("objective") != "probability" or value is None:
        return
    vanished = (value.abs() < _VANISHED).nonzero().flatten()
    if len(vanished):
        logger.warning(
            "the probability of %d answers (prompt %d first) is below %.0e, of which float32 keeps "
            "few digits or none: their scores say nothing. Pass objective='log_probability'.",
            len(vanished), int(vanished[0]), _VANISHED,
        )  # fmt: skip


def _warn_of_one_target(result: Attribution | AttributionCounts, tokenizer: Any) -> None:
    """A model that thinks, or one that repeats the question, begins every answer the same way."""
    predicted = result.targets
    if len(predicted) < _ENOUGH_PROMPTS:
        return
    token = int(predicted.mode().values)
    share = (predicted == token).double().mean().item()
    if share > _ONE_TARGET:
        decode = getattr(tokenizer, "decode", None)
        logger.warning(
            "Token %d%s is the model's prediction for %.0f %% of the prompts, so the scores are of "
            "it and hardly of what the prompts ask. If the model begins its answers with it, as "
            "one that thinks does, pass chat_template_kwargs={'enable_thinking': False} (what its "
            "chat template knows) or target=, the tokens to attribute.",
            token,
            f" ({decode([token])!r})" if callable(decode) else "",
            100 * share,
        )
