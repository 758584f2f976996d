"""What an adapter trains beside the rows, which PEFT keeps in wrappers: heads, modules, tokens."""

from __future__ import annotations

from typing import TypeGuard

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


def drop_modules(model: nn.Module, adapter: str) -> None:
    """Undo what an adapter trains, which PEFT would let another of its name go on from."""
    for name, wrapper in list(model.named_modules(remove_duplicate=False)):
        if not _trains(wrapper, adapter):
            continue
        if len(wrapper._adapters) > 1:
            wrapper.delete_adapter(adapter, None)
        else:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, wrapper.original_module)


def turn_on_modules(model: nn.Module, adapter: str, frozen: bool) -> None:
    """Have an adapter's head act, and be trained, also where another adapter has one.

    There PEFT turns on what is in its wrapper before the new one is.
    """
    for wrapper in model.modules():
        if _trains(wrapper, adapter):
            wrapper.enable_adapters(True)
            wrapper.set_adapter(adapter, inference_mode=frozen)


def _trains(module: nn.Module, adapter: str) -> TypeGuard[AuxiliaryTrainingWrapper]:
    return isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters
