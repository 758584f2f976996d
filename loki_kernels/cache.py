"""The analysis `patch(model)` runs by itself, kept by a fingerprint of the weights."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._version import __version__
from .attribution import Attribution, attribute
from .questions import load_questions
from .structure import Structure

logger = logging.getLogger(__name__)

# Of 5 bundled questions a subject, the analysis uses 3 (171 in all) and leaves 2 for evaluation.
CALIBRATION_PER_SUBJECT = 3


def cache_folder() -> Path:
    """``$LOKI_KERNELS_CACHE``, else ``$XDG_CACHE_HOME/loki_kernels``, else ``~/.cache/...``."""
    if "LOKI_KERNELS_CACHE" in os.environ:
        return Path(os.environ["LOKI_KERNELS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loki_kernels"


def fingerprint(model: nn.Module) -> str:
    """A hash of every weight, its name, shape and dtype.

    Each tensor enters as two wrap-around integer sums over its bits, plain and weighted by
    position, which any change alters and which run where the tensor lies, at memory speed.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel():
            digest.update(" ".join(map(str, _bit_sums(tensor.detach()))).encode())
    return digest.hexdigest()


def _bit_sums(tensor: Tensor) -> tuple[int, int]:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.contiguous().view(-1)
    if bits.dtype == torch.bool or bits.is_complex():
        bits = bits.view(torch.uint8)
    else:
        bits = bits.view(integers[bits.element_size()])
    plain = weighted = 0
    for start in range(0, bits.numel(), 1 << 22):  # the int64 copies stay at 64 MiB
        part = bits[start : start + (1 << 22)].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + part.numel(), device=part.device)
        plain += int(part.sum())
        weighted += int((part * place).sum())
    return plain, weighted


def cached_attribution(model: nn.Module, structure: Structure, tokenizer: Any) -> Attribution:
    """The default attribution of ``model`` on the bundled questions, from the cache if it is there.

    Raises:
        ValueError: if there is no tokenizer to be found.
    """
    tokenizer = tokenizer if tokenizer is not None else _find_tokenizer(structure.causal_lm)
    questions = load_questions(CALIBRATION_PER_SUBJECT)
    prompts = [question.prompt(tokenizer) for question in questions]
    key = hashlib.sha256(fingerprint(structure.causal_lm).encode())
    key.update(__version__.encode())
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
