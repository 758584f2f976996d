"""What happens beside a patched model's ``save_pretrained``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..sharding import is_sharded
from . import adapter_file
from .adapter_file import SIDE_FILE, Layers, Parts
from .linear import TRAINED, low_rank_rows


@dataclass(eq=False)
class SavePretrained:
    """An instance's ``save_pretrained``, for what the class's own cannot know.

    It writes a side file where a merged checkpoint cannot hold the trained rows, and merges a state
    dict that an engine collected parameter by parameter (ZeRO-3). It lies in the model's
    ``__dict__`` and is copied and pickled with it.
    """

    model: Any  # a module whose class has a ``save_pretrained``
    layers: Layers

    @classmethod
    def attach(cls, model: nn.Module, layers: Layers) -> SavePretrained | None:
        if not hasattr(type(model), "save_pretrained"):
            return None
        model.__dict__["save_pretrained"] = saver = cls(model, layers)
        return saver

    def detach(self) -> None:
        del self.model.__dict__["save_pretrained"]

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        parts = adapter_file.parts_of(self.layers)
        if state_dict is not None:
            state_dict = _merge_trained(state_dict, parts)
        needs_side_file = any(layer.needs_side_file for layer in self.layers.values())
        is_main_process = kwargs.get("is_main_process", True)
        needed = needs_side_file and is_main_process
        # what FSDP shards is gathered when every process makes the state dict
        sharded = any(is_sharded(layer.weight) for layer in self.layers.values())
        gathered = state_dict is not None or not sharded
        if needed and gathered:  # before the class's own, which may upload the folder
            self._write_side_file(save_directory, parts)
        elif not needs_side_file and is_main_process:  # an earlier run's would be read for ours
            (Path(save_directory) / SIDE_FILE).unlink(missing_ok=True)
        save = type(self.model).save_pretrained
        result = save(self.model, save_directory, *args, state_dict=state_dict, **kwargs)
        if needed and not gathered:
            self._write_side_file(save_directory, parts)
        return result

    def _write_side_file(self, folder: str | os.PathLike[str], parts: dict[str, Parts]) -> None:
        for name, layer in self.layers.items():
            parts[name] |= layer.gathered or {}
        Path(folder).mkdir(parents=True, exist_ok=True)
        adapter_file.write_side_file(folder, self.layers, parts)


def _merge_trained(state_dict: dict[str, Tensor], parts: dict[str, Parts]) -> dict[str, Tensor]:
    """Move trained parameters that a state dict may hold into its weights, and into ``parts``."""
    merged = dict(state_dict)
    for name, layer_parts in parts.items():
        found = {p: merged.pop(f"{name}.{p}") for p in TRAINED if f"{name}.{p}" in merged}
        if not found:
            continue
        layer_parts |= found
        weight = merged[f"{name}.weight"]
        index = layer_parts["index"].to(weight.device)
        if "rows" in found:
            rows = found["rows"]
        else:
            rows = low_rank_rows(weight[index], found["delta_a"], found["delta_b"])
        merged[f"{name}.weight"] = weight.index_copy(0, index, rows.to(weight))
    return merged
