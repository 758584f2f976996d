"""The analysis that `patch(model, quota=10)` runs, kept by a fingerprint of the model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from torch import nn

from .._version import __version__
from ..cache import cache_folder, read_cached, write_cached
from ..fingerprint import model_fingerprint
from ..options import DEFAULT_DEFINITION, DEFAULT_STEPS
from ..placement import memory_is_full, on_accelerator
from ..questions import CALIBRATION_PER_SUBJECT, load_questions
from ..structure import Structure
from ..team import Team
from ..tokenizing import find_tokenizer
from .answers import with_answers
from .attribute import Options, attribute
from .definitions import PathIntegral
from .prompts import Tokens, tokenize_prompts
from .result import Attribution, model_settings

logger = logging.getLogger(__name__)


class AnalysisOptions(Options, total=False):
    """What `patch` passes to its own `attribute`; ``prompts`` replace the bundled questions."""

    prompts: Iterable[Any]


def check_analysis_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for what `AnalysisOptions` has not, or what cannot choose rows."""
    unknown = sorted(set(options) - set(get_type_hints(AnalysisOptions)))
    if unknown:
        raise ValueError(
            f"analysis has no option {unknown[0]}; it has "
            f"{', '.join(sorted(get_type_hints(AnalysisOptions)))}."
        )
    if options.get("site", "down_proj") != "down_proj":
        raise ValueError("analysis chooses rows to train, so its site is 'down_proj'.")


def cached_attribution(
    structure: Structure,
    tokenizer: Any,
    analysis: AnalysisOptions | None = None,
) -> Attribution:
    """The attribution of the model on the bundled questions, from the cache if it is there.

    A model that lies on the CPU is on the accelerator meanwhile, if it fits there.

    Raises:
        ValueError: if there is no tokenizer to be found, or `attribute` refuses an option.
    """
    options: dict[str, Any] = dict(analysis or {})
    prompts = options.pop("prompts", None)
    if prompts is None:
        tokenizer = tokenizer if tokenizer is not None else find_tokenizer(structure.causal_lm)
        prompts = load_questions(CALIBRATION_PER_SUBJECT)
    chat = options.pop("chat_template_kwargs", None)
    vocabulary = structure.vocab_size
    sequences = tokenize_prompts(prompts, tokenizer, vocabulary, chat)
    target, contrast = options.get("target"), options.get("contrast")
    tokens = list(with_answers(sequences, target, contrast, tokenizer, vocabulary))
    key = _key(structure.causal_lm, tokens, options)
    path = cache_folder() / f"{key}.safetensors"
    found = read_cached(path, Attribution.load)
    with Team() as team:
        told = [each.split() for each in team.tell(f"{key} {found is not None}")]
    # Loaded in one process alone, or without weights in the others: each looks after itself.
    options["share"] = len({its_key for its_key, _ in told}) == 1
    everywhere = all(has_it == "True" for _, has_it in told)
    if found is not None and (everywhere or not options["share"]):
        logger.info("using the analysis cached in %s", path)
        return found
    held = [{"input_ids": prompt.ids, **prompt.media} for prompt in tokens]
    result = _analyse(structure, held, tokenizer, options)
    if team.size > 1 and int(os.environ.get("LOCAL_RANK", team.rank)):
        return result  # another process of this machine writes it
    write_cached(path, result.save)
    return result


def _key(model: nn.Module, tokens: list[Tokens], options: Mapping[str, Any]) -> str:
    """What the result depends on: the model, the tokens, and what is computed."""
    how = {k: v for k, v in options.items() if k not in ("batch_size", "progress")}
    for of_the_tokens in ("target", "contrast"):
        how.pop(of_the_tokens, None)
    name, steps, engine = (how.pop(k, None) for k in ("definition", "steps", "engine"))
    name = DEFAULT_DEFINITION if name is None else name
    steps = DEFAULT_STEPS if steps is None else steps
    integral = PathIntegral.resolve(name, how, steps)  # type: ignore[arg-type]
    computed = [integral.described(), steps, engine]
    key = hashlib.sha256(model_fingerprint(model).encode())
    key.update(f"{__version__} {model_settings(model)} {json.dumps(computed)}".encode())
    for prompt in tokens:
        key.update(prompt.content())
    return key.hexdigest()[:32]


def _analyse(
    structure: Structure, prompts: list[Any], tokenizer: Any, options: Mapping[str, Any]
) -> Attribution:
    """`attribute`, on the accelerator if the model fits there and a prompt beside it.

    Where processes share the weights none can halve a batch by itself; all try a smaller one.
    """
    model, chosen = structure.given, options.get("batch_size")
    sizes = [None, 8, 1] if structure.sharded and chosen is None else [chosen]

    def run(size: int | None) -> Attribution:
        sized = {**options, "batch_size": size}
        result: Attribution = attribute(model, prompts, tokenizer=tokenizer, **sized)
        return result

    for size in sizes:
        moved = False
        try:
            with on_accelerator(model) as moved:
                return run(size)
        except Exception as error:
            if not memory_is_full(error):
                raise
            logger.warning("the analysis ran out of memory (batch_size=%s): %s", size, error)
            if size == sizes[-1] and not moved:
                raise
    logger.warning("the accelerator has no room for the analysis; the CPU does it")
    return run(chosen)
