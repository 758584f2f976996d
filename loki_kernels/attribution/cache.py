"""The analysis `patch(model)` runs by itself, kept by a fingerprint of the model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from .._version import __version__
from ..fingerprint import model_fingerprint
from ..questions import load_questions
from ..structure import Structure, text_config
from .attribute import attribute
from .result import Attribution

logger = logging.getLogger(__name__)

# Of 5 bundled questions a subject, the analysis uses 3 (171 in all) and leaves 2 for evaluation.
CALIBRATION_PER_SUBJECT = 3


def cache_folder() -> Path:
    """``$LOKI_KERNELS_CACHE``, else ``$XDG_CACHE_HOME/loki_kernels``, else ``~/.cache/...``."""
    if "LOKI_KERNELS_CACHE" in os.environ:
        return Path(os.environ["LOKI_KERNELS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loki_kernels"


def cached_attribution(model: nn.Module, structure: Structure, tokenizer: Any) -> Attribution:
    """The default attribution of ``model`` on the bundled questions, from the cache if it is there.

    Raises:
        ValueError: if there is no tokenizer to be found.
    """
    tokenizer = tokenizer if tokenizer is not None else _find_tokenizer(structure.causal_lm)
    questions = load_questions(CALIBRATION_PER_SUBJECT)
    prompts = [question.prompt(tokenizer) for question in questions]
    key = hashlib.sha256(model_fingerprint(structure.causal_lm).encode())
    key.update(__version__.encode())
    key.update(_settings(structure.causal_lm).encode())
    for prompt in prompts:
        if isinstance(prompt, list):
            prompt = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=False
            )
        key.update(prompt.encode())
    path = cache_folder() / f"{key.hexdigest()[:32]}.safetensors"
    if path.is_file():
        try:
            result = Attribution.load(path)
            logger.info("using the analysis cached in %s", path)
            return result
        except ValueError as error:
            logger.warning("%s; analysing again", error)
    result = attribute(model, prompts, tokenizer=tokenizer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        result.save(path)
    except OSError as error:
        logger.warning("the analysis could not be cached: %s", error)
    return result


def _settings(model: nn.Module) -> str:
    """What the config says of the function that the weights are a part of (RoPE, norms, ...)."""
    fields = text_config(model).to_dict()
    other = {"architectures", "dtype", "transformers_version", "use_cache"}
    kept = {k: v for k, v in fields.items() if k not in other and not k.startswith("_")}
    return json.dumps(kept, sort_keys=True, default=str)


def _find_tokenizer(model: nn.Module) -> Any:
    from transformers import AutoTokenizer

    name = getattr(model, "name_or_path", "")
    if name:
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no tokenizer was found under {name!r} ({error}); pass tokenizer=..."
            ) from error
    raise ValueError("the model has no name to find its tokenizer by; pass tokenizer=...")
