"""The operations LoKI is made of, one folder each.

Every folder holds the public function (``__init__.py``) and ``reference.py``, the definition in
plain PyTorch that every faster implementation is tested against. An op with kernels of its own has
``torch_impl.py`` beside them and ``triton_impl.py``, ``cuda_impl.py`` (``csrc/<op>.cu``) or
``cpp_impl.py`` (``csrc/<op>.cpp``); `row_masked_linear`, `row_delta_linear` and
`swiglu_row_masked_linear` are composed of such ops and of dense products.
"""

from .count_lowest import count_lowest
from .gated_product import gated_product
from .integrate_path import integrate_path
from .row_delta_linear import row_delta_linear
from .row_masked_linear import row_masked_linear
from .shared_prefix_attention import shared_prefix_attention
from .swiglu_row_masked_linear import swiglu_row_masked_linear
from .sync_rows import sync_rows
from .target_probability import TargetProbability, target_probability

__all__ = [
    "TargetProbability",
    "count_lowest",
    "gated_product",
    "integrate_path",
    "row_delta_linear",
    "row_masked_linear",
    "shared_prefix_attention",
    "swiglu_row_masked_linear",
    "sync_rows",
    "target_probability",
]
