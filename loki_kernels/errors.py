"""Exceptions raised by loki_kernels, and the check of options that are one of a few words."""

from collections.abc import Collection

# Of the repository and, from there, of the site; the messages themselves are in tables and logs.
_PAGE = "docs/troubleshooting.md#unsupportedmodelerror"


class UnsupportedModelError(ValueError):
    """The model's structure is one this library cannot treat exactly, so it refuses.

    A note, which a traceback shows under the message, names the page that says what can be done.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.add_note(f"What can be done: {_PAGE}")


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise ValueError, naming the choices, unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}.")
