"""The operations LoKI is made of, one folder each.

Every folder holds the public function (``__init__.py``) and ``reference.py``, the definition in
plain PyTorch that every faster implementation is tested against.
"""

from .count_lowest import count_lowest
from .expand_path import expand_path
from .integrate_path import integrate_path
from .row_delta_linear import row_delta_linear
from .row_masked_linear import row_masked_linear
from .shared_prefix_attention import shared_prefix_attention
from .target_probability import TargetProbability, target_probability

__all__ = [
    "TargetProbability",
    "count_lowest",
    "expand_path",
    "integrate_path",
    "row_delta_linear",
    "row_masked_linear",
    "shared_prefix_attention",
    "target_probability",
]
