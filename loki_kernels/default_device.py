"""Public functions that work whatever ``torch.set_default_device`` says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def made_on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which makes tensors on the CPU unless it says where.

    Under a default device of a user's, those that a library counts, hashes and plans with would be
    there too, and meet others that are not.
    """

    @functools.wraps(function)
    def on_cpu(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.get_default_device().type == "cpu":  # a mode costs every operation something
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return on_cpu
