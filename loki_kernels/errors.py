"""Exceptions raised by loki_kernels, and checks of options and of what is installed."""

import importlib
from collections.abc import Collection
from typing import Any, TypeVar

E = TypeVar("E", bound=Exception)

# Of the repository and, from there, of the site; the messages themselves are in tables and logs.
_PAGE = "docs/troubleshooting.md"
_REFUSED = "UnsupportedModelError"
# The headings of that page that are a part of an error's message; `tests/docs` compares the two.
ENTRIES = (
    "has no FFN down-projection",
    "over the prompt's keys and values gives other logits",
    "does not run its attention through transformers' AttentionInterface",
    "logits are NaN",
    "is text, so a tokenizer is needed",
    "the model has no name to find its tokenizer by",
    "the model is already patched",
    "nn.DataParallel, which HF Trainer uses",
    "the rows of this patched model are frozen",
    "hold trained rows merged into them and not the update itself",
    "this process trains other rows than another one",
    "is not a row file",
    "belongs to a model patched otherwise",
    "was trained on another base",
    "cannot be trained with FSDP1",
    "is split by tensor parallelism",
    "which a PEFT adapter of LoKI does not support",
    "is an adapter of type",
    "the adapter was trained with a protection",
    "cannot run on backend",
    "pip install 'loki-kernels[",
    "fields; MMLU's csv has 6",
    "is not a whole safetensors file",
    "another process is writing",
)


def explained(error: E) -> E:
    """The error, with a note of the page's entry for its message, which a traceback shows.

    One that has none is given as it is, unless a model is refused, of which the page says more.
    """
    message = str(error)
    own = _REFUSED if isinstance(error, UnsupportedModelError) else None
    entry = next((entry for entry in ENTRIES if entry in message), own)
    if entry is None:
        return error
    anchor = "".join(c for c in entry.lower() if c.isalnum() or c in " -_").replace(" ", "-")
    error.add_note(f"What can be done: {_PAGE}#{anchor}")
    return error


def import_extra(module: str, extra: str, need: str) -> Any:
    """A module that an extra of this package brings; an ImportError says what for and how."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"{need}: pip install 'loki-kernels[{extra}]'."
        raise explained(ImportError(message)) from error


class UnsupportedModelError(ValueError):
    """The model's structure is one this library cannot treat exactly, so it refuses.

    A note, which a traceback shows under the message, names the page that says what can be done.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        explained(self)


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise ValueError, naming the choices, unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}.")
