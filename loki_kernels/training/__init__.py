"""Training some rows of a model's down-projections, and keeping what was trained."""

from .adapters import export_lora, load_adapter, save_adapter
from .handle import Patch
from .linear import LokiLinear
from .patching import patch
from .suppress import suppress

__all__ = [
    "LokiLinear",
    "Patch",
    "export_lora",
    "load_adapter",
    "patch",
    "save_adapter",
    "suppress",
]
