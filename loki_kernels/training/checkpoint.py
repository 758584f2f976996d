"""What happens beside a patched model's ``save_pretrained``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..placement import free_bytes
from ..sharding import full_state_dict, has_fsdp, is_first, is_partitioned, is_released, is_sharded
from . import adapter_file
from .adapter_file import Layers, Parts
from .arithmetic import HOST, updated_rows
from .experts import LokiExperts
from .loading import check_known
from .rows import BESIDE, TRAINED
from .targets import trained_whole

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class SavePretrained:
    """An instance's ``save_pretrained``, for what the class's own cannot know.

    It writes the update to a side file and merged weights alone to the checkpoint, and merges a
    state dict that an engine collected parameter by parameter (ZeRO-3). It lies in the model's
    ``__dict__`` and is copied and pickled with it.
    """

    model: Any  # a module whose class has a ``save_pretrained``
    layers: Layers

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        check_known(self.layers.values())
        adapter_file.refuse_adapter(save_directory)
        written = [layer for layer in self.layers.values() if layer.written]
        try:
            return self._save(save_directory, is_main_process, state_dict, **kwargs)
        finally:
            # Where the update was lent to the file alone. Else an average that is swapped in right
            # after would be added to what holds it, and compiled steps would be compiled anew.
            for layer in self.layers.values():
                if not (layer.can_write and layer in written):
                    layer.take_back()

    def _save(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool,
        state_dict: dict[str, Tensor] | None,
        **kwargs: Any,
    ) -> Any:
        parts = adapter_file.parts_of(self.layers)
        if state_dict is None and has_fsdp(self.model):
            # Every process is here, and the first one has it all and writes alone, as transformers
            # does it where it has sharded a model itself.
            state_dict = full_state_dict(self.model)
            is_main_process = is_main_process and is_first()
        elif state_dict is None and any(is_released(x.frozen) for x in self.layers.values()):
            # DeepSpeed gives the first process all of it and the others None, and accelerate's
            # documented lines call this in every process: an error there would end the first one
            # while it writes.
            if is_main_process and is_first():
                raise RuntimeError(
                    "ZeRO-3 has split the weights, so the model's own state dict is empty; in "
                    "every process pass state_dict=accelerator.get_state_dict(ENGINE) to "
                    "save_pretrained, with stage3_gather_16bit_weights_on_model_save."
                )
            state_dict, is_main_process = {}, False
        elif state_dict is None:
            state_dict = self._lent_state_dict()
        whole = {n: state_dict[n] for n in trained_whole(self.model) if n in state_dict}
        others = adapter_file.other_tensors(whole)
        lacks = self._lacks_sharded(state_dict)
        state_dict = self._merge_trained(state_dict, parts)
        if lacks and is_main_process:
            # HF Trainer's way under ZeRO-3 where 16-bit weights are not to be gathered: the first
            # process alone would wait for the others' parts.
            logger.warning(
                "the state dict that is saved has none of the sharded updates of rows, so no %s is "
                "written. Under ZeRO-3 DeepSpeed's own checkpoint has them; set "
                "stage3_gather_16bit_weights_on_model_save for an ordinary checkpoint.",
                adapter_file.SIDE_FILE,
            )
        elif is_main_process:
            # before the class's own, which may upload the folder
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            tensors = adapter_file.adapter_tensors(self.layers, parts) | others
            adapter_file.write_side_file(save_directory, self.layers, tensors)
        save = type(self.model).save_pretrained
        own: dict[str, Any] = {}
        if kwargs.get("push_to_hub"):
            own["_upload_modified_files"] = partial(_upload, self.model._upload_modified_files)
        count = self.model.num_parameters() - sum(
            parameter.numel()
            for layer in self.layers.values()
            for _, parameter in layer.trained_parameters()
        )
        own["num_parameters"] = lambda: count  # for the index, which has none of the update
        if getattr(self.model, "hf_quantizer", None) is not None:
            # transformers drops the state dict that it is given then, and asks the quantizer, which
            # asks the model, or else the model itself
            merged = state_dict
            own["state_dict"] = lambda *_, **__: dict(merged)
        with _standing_in(self.model, own):
            return save(
                self.model,
                save_directory,
                is_main_process=is_main_process,
                state_dict=state_dict,
                **kwargs,
            )

    def _lent_state_dict(self) -> dict[str, Tensor]:
        """The model's, of which nothing is copied since it is saved at once.

        Experts' weights as trained would take 19 GB more of Qwen3-30B-A3B, by count. Their other
        matrices transformers takes apart, of all layers at once and where they lie: where 39 GB of
        that model's, 60 of Mixtral-8x7B's, have no room there, they go to the host first.
        """
        for layer in self.layers.values():
            layer.lent = True
        try:
            state_dict: dict[str, Tensor] = self.model.state_dict()
        finally:
            for layer in self.layers.values():
                layer.lent = False
        taken_apart = {
            f"{name}.{part}": weight
            for name, layer in self.layers.items()
            if isinstance(layer, LokiExperts)
            for part, weight in layer.own_parameters()
            if part != layer.parameter
        }
        for device in {weight.device for weight in taken_apart.values()}:
            there = {name: w for name, w in taken_apart.items() if w.device == device}
            free = free_bytes(device)
            if free is not None and sum(w.nbytes for w in there.values()) > free:
                state_dict |= {name: state_dict[name].to(HOST) for name in there}
        return state_dict

    def _lacks_sharded(self, state_dict: dict[str, Tensor]) -> bool:
        """Whether a state dict has not every update that FSDP2 or ZeRO-3 looks after."""
        return any(
            f"{name}.{part}" not in state_dict
            for name, layer in self.layers.items()
            if is_sharded(layer.frozen)
            for part, _ in layer.trained_parameters()
        )

    def _merge_trained(
        self, state_dict: dict[str, Tensor], parts: dict[str, Parts]
    ) -> dict[str, Tensor]:
        """Take the trained parameters out of a state dict, into its weights and ``parts``."""
        merged = dict(state_dict)
        for name, layer in self.layers.items():
            found = {p: merged.pop(f"{name}.{p}") for p in TRAINED if f"{name}.{p}" in merged}
            for part in BESIDE:
                merged.pop(f"{name}.{part}", None)
            if is_partitioned(layer.frozen) and found:  # its weight was collected as it lies
                weight = merged[f"{name}.{layer.parameter}"]
                # Not those of the weight, which hold an update if one was written before the split.
                base = layer.base_rows.to(weight)
                rows = updated_rows(base, *layer.formed(found).values())
                merged[f"{name}.{layer.parameter}"] = layer.put_rows(weight, rows)
            parts[name] |= found
        return merged


def _upload(
    upload: Callable[..., Any], folder: Any, repo_id: str, times: dict[str, float], **kwargs: Any
) -> Any:
    """transformers uploads what is newer than its call; these files are older."""
    own = (adapter_file.SIDE_FILE, adapter_file.PROTECTION_FILE)
    return upload(folder, repo_id, times | dict.fromkeys(own, 0.0), **kwargs)


@contextmanager
def _standing_in(model: Any, own: Mapping[str, Any]) -> Iterator[None]:
    """Attributes of this instance alone, for a while."""
    held = model.__dict__
    before = {name: held[name] for name in own if name in held}
    held.update(own)
    try:
        yield
    finally:
        for name in own:
            del held[name]
        held.update(before)
