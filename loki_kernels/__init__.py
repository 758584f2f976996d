"""LoKI: fine-tune a language model in the weights its knowledge depends on least.

import loki_kernels as loki
loki.patch(model, tokenizer=tokenizer)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import ops
    from .attribution import Attribution, AttributionCounts
    from .attribution.attribute import attribute
    from .attribution.baseline import mean_activations
    from .errors import UnsupportedModelError
    from .forgetting import Drift, DriftCallback, drift, limit_drift
    from .ops._dispatch import backends
    from .protection import Protection, estimate_protection
    from .questions import PromptStream, load_questions, read_questions
    from .selection import RowSelection, select
    from .training import (
        LokiLinear,
        Patch,
        export_lora,
        load_adapter,
        patch,
        save_adapter,
    )
    from .training.suppress import suppress

__all__ = [
    "Attribution",
    "AttributionCounts",
    "Drift",
    "DriftCallback",
    "LokiLinear",
    "Patch",
    "PromptStream",
    "Protection",
    "RowSelection",
    "UnsupportedModelError",
    "__version__",
    "attribute",
    "backends",
    "drift",
    "estimate_protection",
    "export_lora",
    "limit_drift",
    "load_adapter",
    "load_questions",
    "mean_activations",
    "ops",
    "patch",
    "read_questions",
    "save_adapter",
    "select",
    "suppress",
]

# Where a name is looked up when it is first used: torch and transformers take seconds to import,
# and ``loki-kernels --help`` needs neither. What type checkers read above says the same.
_MODULES = {
    "Attribution": "attribution",
    "AttributionCounts": "attribution",
    "Drift": "forgetting",
    "DriftCallback": "forgetting",
    "LokiLinear": "training",
    "Patch": "training",
    "Protection": "protection",
    "PromptStream": "questions",
    "RowSelection": "selection",
    "UnsupportedModelError": "errors",
    "attribute": "attribution",
    "backends": "ops._dispatch",
    "drift": "forgetting",
    "estimate_protection": "protection",
    "export_lora": "training",
    "limit_drift": "forgetting",
    "load_adapter": "training",
    "load_questions": "questions",
    "mean_activations": "attribution.baseline",
    "patch": "training",
    "read_questions": "questions",
    "save_adapter": "training",
    "select": "selection",
    "suppress": "training",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
