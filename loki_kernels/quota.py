"""How many rows a percentage is."""

from __future__ import annotations

from fractions import Fraction

DEFAULT_QUOTA = 10.0  # percent


def rows_per_layer(quota: float | Fraction, width: int) -> int:
    """``max(1, floor(quota * width / 100))`` in exact arithmetic: 29 % of 100 is 29.

    Raises:
        ValueError: for a quota outside (0, 100].
    """
    if isinstance(quota, bool):
        raise ValueError("quota must be a percentage in (0, 100]; it is a bool.")
    try:
        exact = Fraction(str(quota))
    except ValueError:
        raise ValueError(f"quota must be a percentage in (0, 100]; it is {quota!r}.") from None
    if not 0 < exact <= 100:
        raise ValueError(f"quota must be a percentage in (0, 100]; it is {quota}.")
    return max(1, int(exact * width // 100))
