"""LoKI: fine-tune a language model in the weights its knowledge depends on least.

import loki_kernels as loki
loki.patch(model, tokenizer=tokenizer)
"""

from . import ops
from ._deprecated import moved
from ._version import __version__
from .attribution import Attribution, AttributionCounts, attribute
from .errors import UnsupportedModelError
from .ops import row_masked_linear
from .ops._dispatch import backends
from .questions import load_questions, read_questions
from .selection import RowSelection, select
from .training import (
    LokiLinear,
    Patch,
    export_lora,
    load_adapter,
    patch,
    save_adapter,
    suppress,
)

__all__ = [
    "Attribution",
    "AttributionCounts",
    "LokiLinear",
    "Patch",
    "RowSelection",
    "UnsupportedModelError",
    "__version__",
    "attribute",
    "backends",
    "export_lora",
    "load_adapter",
    "load_questions",
    "ops",
    "patch",
    "read_questions",
    "row_masked_linear",
    "save_adapter",
    "select",
    "suppress",
]

__getattr__ = moved(__name__, {"LoKILinear": "loki_kernels:LokiLinear"})
