"""Knowledge Vector Attribution: integrated gradients of every FFN node (arXiv 2505.22120)."""

from .attribute import attribute
from .definitions import DEFINITIONS, Definition
from .result import Attribution, AttributionCounts

__all__ = ["DEFINITIONS", "Attribution", "AttributionCounts", "Definition", "attribute"]
