"""Names that moved: each still works for one release, with a warning that says what it is now."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(
    module: str,
    names: Mapping[str, str],
    gone: Mapping[str, str] | None = None,
    *,
    depth: int = 2,
) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that finds old ``names`` under their new ``module:name``.

    Names that are ``gone`` raise AttributeError, which says what to use instead. ``depth`` is how
    many calls lie between the warning and the line that uses the name.
    """

    def __getattr__(name: str) -> Any:
        if gone and name in gone:
            raise AttributeError(f"{module}.{name} is gone; use {gone[name]}")
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = names[name].partition(":")
        warnings.warn(
            f"{module}.{name} is {place}.{new} now; the old name goes with the next release.",
            DeprecationWarning,
            stacklevel=depth,
        )
        return getattr(importlib.import_module(place), new)

    return __getattr__
