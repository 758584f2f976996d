"""Exceptions raised by loki_kernels, and the check of options that are one of a few words."""

from collections.abc import Collection


class UnsupportedModelError(ValueError):
    """The model's structure is one this library cannot treat exactly, so it refuses."""


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise ValueError, naming the choices, unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}.")
