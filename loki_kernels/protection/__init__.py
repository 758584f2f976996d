"""The input directions of general text, which a protected update leaves alone."""

from .estimate import estimate_protection
from .result import Protection, fingerprint_of, warn_of_another_model

__all__ = ["Protection", "estimate_protection", "fingerprint_of", "warn_of_another_model"]
