"""A meter of forgetting: how far a model has moved from its base, on any texts."""

from .callback import DriftCallback
from .limit import limit_drift
from .meter import drift
from .result import Drift

__all__ = ["Drift", "DriftCallback", "drift", "limit_drift"]
