"""Which state dicts a model with adapters takes: what is asked before PEFT loads one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import explained
from ..sharding import is_sharded
from ..structure import plain_name
from ..training.adapter_file import PROTECTION_FILE, base_rows_of, why_other_protection
from ..training.arithmetic import whole_update
from .layer import LokiLayer


def check_loading(base: nn.Module) -> None:
    """Have `check_saved` asked of every state dict for a base with adapters.

    It is the base that asks, since transformers' ``add_adapter`` and PEFT's
    ``inject_adapter_in_model`` keep nothing else; once, however often it is wrapped.
    """
    if not _own_hooks(base):
        base.register_load_state_dict_pre_hook(check_saved)


def forget_loading(base: nn.Module) -> None:
    """Undo `check_loading`."""
    for key in _own_hooks(base):
        del base._load_state_dict_pre_hooks[key]


def _own_hooks(base: nn.Module) -> list[int]:
    hooks = base._load_state_dict_pre_hooks
    return [key for key, hook in hooks.items() if getattr(hook, "hook", None) is check_saved]


def check_saved(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a state dict of other rows, rank or protection, or whose rows were merged before.

    PEFT loads one into an adapter that is there without reading its config.
    """
    modules = ((f"{prefix}{plain_name(n)}", m) for n, m in model.named_modules())
    layers = [(name, module) for name, module in modules if isinstance(module, LokiLayer)]
    for name, layer in layers:
        for adapter, index in layer.rows.items():
            other = state_dict.get(f"{name}.loki_index.{adapter}", index)
            if not torch.equal(other.cpu(), index.cpu()):
                raise ValueError(
                    f"{name.removeprefix(prefix)} trains other rows in adapter {adapter!r} than "
                    "those that were saved; load them as an adapter of their own."
                )
            if f"{name}.loki_index.{adapter}" in state_dict:
                # of a key that the model lacks PEFT 0.21 leaves the adapter's name out
                key = f"{name}.loki_protection"
                saved = state_dict.get(f"{key}.{adapter}", state_dict.get(key))
                _check_protection(layer, adapter, saved)
    saved = [key.partition(".loki_index")[0] for key in state_dict if ".loki_index" in key]
    if layers and saved and not set(saved) & {name for name, _ in layers}:
        theirs, own = (name.removeprefix(prefix) for name in (saved[0], layers[0][0]))
        raise ValueError(
            f"what was saved is of {theirs}, which this model lacks (it has {own}): none of it "
            "would be loaded. Load it onto the class that it was trained on."
        )
    for adapter in {adapter for _, layer in layers for adapter in layer.rows}:
        own = {name: layer for name, layer in layers if adapter in layer.rows}
        _check_whole(own, adapter, state_dict, prefix)
        _refuse_merged(own, adapter, state_dict)


def _check_whole(
    own: Mapping[str, LokiLayer], adapter: str, saved: Mapping[str, Any], prefix: str
) -> None:
    """Raise ValueError if PEFT, which loads what it finds, would load a part, or nothing.

    Args:
        own: the adapter's layers by their names in ``saved``.
        adapter: its name.
        saved: the state dict, perhaps without anything of it.
        prefix: of all names of this model in it.
    """
    if not any(f"{name}.loki_index.{adapter}" in saved for name in own):
        return
    # of a key that the model lacks PEFT 0.21 leaves the adapter's name out
    ends = (f".loki_index.{adapter}", ".loki_index")
    keys = [key for key in saved if key.startswith(prefix) and key.endswith(ends)]
    other = {key.rpartition(".loki_index")[0] for key in keys} ^ own.keys()
    if other:
        raise ValueError(
            f"what was saved has rows of other layers than adapter {adapter!r} ("
            f"{min(other).removeprefix(prefix)} is of one of the two alone); load it as an adapter "
            "of its own."
        )
    for name, layer in own.items():
        for part in layer.adapter_layer_names:
            if adapter in getattr(layer, part) and f"{name}.{part}.{adapter}" not in saved:
                raise ValueError(
                    f"what was saved has another rank than adapter {adapter!r}: it lacks the "
                    f"{part} of {name.removeprefix(prefix)}; load it as an adapter of its own."
                )


def _check_protection(layer: LokiLayer, adapter: str, saved: Tensor | None) -> None:
    """Raise ValueError if an update that was formed with one would be formed with another."""
    named = None if saved is None else bytes(saved.tolist()).hex()
    reason = why_other_protection(named, layer.configs[adapter].protection)
    if reason is not None:
        message = f"what was saved of {adapter!r} belongs to a model patched otherwise: {reason}."
        if saved is not None:
            message += f" The folder that it was saved in has it in {PROTECTION_FILE}."
        raise explained(ValueError(message))


def _refuse_merged(own: Mapping[str, LokiLayer], adapter: str, saved: Mapping[str, Any]) -> None:
    """Raise ValueError if rows hold a saved update already, in layers by their names in ``saved``.

    Of whole tensors alone, as a file has them.
    """
    config = next(iter(own.values())).configs[adapter]
    trained_on = base_rows_of(vars(config))
    if trained_on is None or config.present is None:
        return
    keys = ("loki_update",) if config.rank is None else ("loki_delta_a", "loki_delta_b")
    parts: list[list[Any]] = [
        [saved.get(f"{name}.{key}.{adapter}") for key in keys] for name in own
    ]
    if any(part is None or part.is_meta or is_sharded(part) for pair in parts for part in pair):
        return
    updates = (whole_update(*pair) for pair in parts)
    reason = trained_on.why_merged(config.present, updates)
    if reason is not None:
        raise explained(ValueError(f"adapter {adapter!r} was trained on another base: {reason}."))
