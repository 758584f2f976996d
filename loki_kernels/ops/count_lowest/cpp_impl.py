"""``csrc/count_lowest.cpp``: a radix step instead of a sort, a layer a thread."""

from __future__ import annotations

from torch import Tensor

from ... import _native

_count_lowest = _native.define(
    "cpp", "count_lowest(Tensor scores, int k, Tensor(a!) counts, bool magnitude) -> ()"
)
_DTYPES = ("float64", "float32", "float16", "bfloat16")


def unsupported(scores: Tensor, *_: object) -> str | None:
    name = str(scores.dtype).removeprefix("torch.")
    return None if name in _DTYPES else f"it takes {', '.join(_DTYPES)}, not {name}."


def forward(scores: Tensor, k: int, counts: Tensor, magnitude: bool) -> None:
    if scores.numel():
        _count_lowest(scores, k, counts, magnitude)
