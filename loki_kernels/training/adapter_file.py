"""The format of a trained update on disk: tensors named as PEFT names them, files, the base."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from ..errors import explained
from ..files import atomic_path, of_a_whole_file, read_safetensors, write_safetensors
from ..fingerprint import BaseRows
from ..protection import Protection, fingerprint_of
from ..sharding import full_values, shard_like
from ..structure import plain_name
from .arithmetic import digest_of, whole_update
from .rows import TRAINED, LokiRows

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
# Under it a model keeps the name that it was loaded by, once an update is merged into it.
MERGED = "_loki_merged"
# Beside a merged checkpoint, which does not hold the update exactly. A safetensors file, but not by
# its name: vLLM reads every *.safetensors of a folder without an index as weights. Nor is it
# `ADAPTER_FILE`: together with a config transformers would load that by itself.
SIDE_FILE = "loki_rows.update"
# What a protected update was trained with, a `Protection`'s file, beside it or in an adapter's
# folder: training on takes it, reading does not.
PROTECTION_FILE = "loki_rows.protection"

PREFIX = "base_model.model."
_KEY = re.compile(rf"(.+)\.loki_(index|{'|'.join(TRAINED)})")

# PEFT saves a resized embedding that is trained whole under its own name and under these.
_PEFT_COPY = re.compile(r"\.(original_module|modules_to_save)\.")

# The patched layers of a model by their names.
Layers = Mapping[str, LokiRows]
# What is kept of a layer: "index", and "update" or "delta_a" and "delta_b".
Parts = dict[str, Tensor]


def base_rows_of(content: Mapping[str, Any]) -> BaseRows | None:
    """What a config, or the metadata of a side file, says of the rows an update is added to."""
    if content.get("fingerprint") is None:
        return None
    sketch = content["base_sketch"]
    if isinstance(sketch, str):  # metadata are strings
        sketch = json.loads(sketch)
    return BaseRows(content["fingerprint"], content["base_dtype"], sketch)


def base_rows_content(base: BaseRows) -> dict[str, Any]:
    """What `base_rows_of` reads."""
    return {
        "fingerprint": base.fingerprint,
        "base_dtype": base.dtype,
        "base_sketch": base.sketch,
    }


@dataclass(frozen=True)
class SavedUpdate:
    """What `ADAPTER_FILE` or `SIDE_FILE` holds.

    Attributes:
        layers: layer name -> its parts.
        others: name in the model -> a parameter that was trained whole beside the rows.
        trained_on: the rows that the update is added to.
        protection: fingerprint of the one that the update was trained with.
        protection_file: where that one's `PROTECTION_FILE` lies, or would.
        base: name or path of the model it was trained on, where an adapter's config has one.
    """

    layers: dict[str, Parts]
    others: dict[str, Tensor]
    trained_on: BaseRows | None
    protection: str | None
    protection_file: str
    base: str | None = None

    def rows_of(self, names: Sequence[Sequence[str]]) -> list[list[int]]:
        """The rows of each layer of a model whose down-projections have these names, by layer.

        Raises:
            ValueError: if there is an update of a layer that is none of them, or two of one layer
                are of different rows.
        """
        strangers = self.layers.keys() - {name for layer in names for name in layer}
        if strangers:
            raise ValueError(f"it has an update of {min(strangers)}, which the model lacks.")
        found: list[list[int]] = []
        for layer in names:
            own = [self.layers[name]["index"].tolist() for name in layer if name in self.layers]
            if any(rows != own[0] for rows in own):
                raise ValueError(f"it has other rows of {layer[0]} than of {layer[-1]}.")
            found.append(own[0] if own else [])
        return found

    @property
    def modules(self) -> set[str]:
        """Names of all modules that it is of."""
        return {*self.layers, *modules_of(self.others)}

    @property
    def rank(self) -> int | None:
        """Of LoKI*, or None."""
        ranks = {parts["delta_a"].shape[-1] for parts in self.layers.values() if "delta_a" in parts}
        return min(ranks, default=None)


def modules_of(parameters: Iterable[str]) -> list[str]:
    """Names of the modules that parameters of these names belong to."""
    return sorted({name.rpartition(".")[0] for name in parameters})


def whole_modules(model: nn.Module, parameters: Iterable[str]) -> tuple[list[str], list[str]]:
    """Modules that parameters of these names are all of, and the names of the other ones.

    Such as LLaVA's ``image_newline``, which lies in the module that holds all the layers, or the
    bias alone of a linear layer. A module that the model lacks is one of the first.
    """
    names, modules = set(parameters), dict(model.named_modules())
    whole = [
        owner
        for owner in modules_of(names)
        if owner not in modules
        or {plain_name(f"{owner}.{n}") for n, _ in modules[owner].named_parameters()} <= names
    ]
    alone = [n for n in sorted(names) if not any(n.startswith(f"{owner}.") for owner in whole)]
    return whole, alone


def parts_of(layers: Layers) -> dict[str, Parts]:
    """What is kept of each layer; sharded parameters as they are."""
    return {n: {"index": x.index, **dict(x.trained_parameters())} for n, x in layers.items()}


def adapter_tensors(
    layers: Layers, parts_by_layer: Mapping[str, Parts], *, keep: bool = True
) -> dict[str, Tensor]:
    """The tensors of a file, on the host; with sharded parameters every process has to ask.

    Of a protected update what acts of it, so that reading it takes no protection. Without ``keep``
    a process takes part in the gathering and has nothing of it: of all rows 7.5 GB at 8B.
    """
    tensors = {}
    for name, parts in parts_by_layer.items():
        values = {part: full_values(tensor) for part, tensor in parts.items()}
        if not keep:
            continue
        formed = layers[name].formed({p: values.pop(p) for p in TRAINED if p in values})
        for part, tensor in (values | formed).items():
            tensors[f"{PREFIX}{name}.loki_{part}"] = tensor.detach().cpu()
    return tensors


def write_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write tensors as PEFT reads them."""
    write_safetensors(path, tensors, {"format": "pt", **metadata})


def other_tensors(parameters: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Parameters that are trained whole, named as PEFT names them; as of `adapter_tensors`."""
    tensors = {}
    for name, parameter in parameters.items():
        values = full_values(parameter)
        if keep:
            tensors[f"{PREFIX}{name}"] = values.cpu()
    return tensors


def refuse_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError if an adapter would lie in a checkpoint's folder.

    transformers loads it onto the weights there by itself, which hold the update already.
    """
    for name in ("config.json", SIDE_FILE):
        if Path(folder, name).is_file():
            raise ValueError(
                f"{folder} is a checkpoint's folder ({name}), whose weights transformers would add "
                "the adapter to; name another folder for the adapter."
            )


def refuse_adapter(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError if a checkpoint, or the update beside it, would lie beside an adapter."""
    if Path(folder, CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} is an adapter's folder ({CONFIG_FILE}), and transformers would add that "
            "adapter to the weights of a checkpoint there; name another folder for the checkpoint."
        )


def write_adapter(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], task_type: str | None
) -> None:
    """Write the two files of an adapter for PEFT, of this method or another."""
    folder.mkdir(exist_ok=True)
    write_tensors(folder / ADAPTER_FILE, tensors)
    content = config | {"task_type": task_type, "inference_mode": True}
    with atomic_path(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_side_file(
    folder: str | os.PathLike[str], layers: Layers, tensors: dict[str, Tensor]
) -> None:
    """Write `SIDE_FILE`: the layers' `adapter_tensors`, and what they are an update of.

    And `other_tensors`, which are in the checkpoint too, but under the names that its family gives
    them.
    """
    path = Path(folder) / SIDE_FILE
    metadata = base_rows_content(base_of(layers))
    metadata["base_sketch"] = json.dumps(metadata["base_sketch"])
    write_protection_of(layers, path.parent)
    protected = protected_with(layers)
    if protected is not None:
        metadata["protection"] = protected
    write_tensors(path, tensors, **metadata)


def write_protection(
    folder: str | os.PathLike[str],
    protection: Protection | None,
    fingerprint: str | None,
    source: str | bool | None,
) -> None:
    """Write `PROTECTION_FILE`; of no protection take away the one that an earlier update left.

    Of an update that was loaded to be used the ``fingerprint`` alone is in memory: the file is
    copied from ``source`` if that is this one still.
    """
    path = Path(folder) / PROTECTION_FILE
    if protection is None and fingerprint is not None:
        if _protection_in(path, fingerprint) is not None:
            return
        protection = _protection_in(Path(source), fingerprint) if isinstance(source, str) else None
        if protection is None:
            logger.warning(
                "what the update in %s is protected with was not found (%s), so there is no %s: "
                "the update can be used and not trained on.", folder, source, PROTECTION_FILE,
            )  # fmt: skip
    if protection is None:
        path.unlink(missing_ok=True)
    else:
        protection.save(path)


def _protection_in(path: Path, fingerprint: str) -> Protection | None:
    """The protection of this fingerprint, if the file holds it."""
    try:
        found = Protection.load(path)
    except (OSError, ValueError):
        return None
    return found if found.fingerprint == fingerprint else None


def write_protection_of(layers: Layers, folder: str | os.PathLike[str]) -> None:
    """Write `PROTECTION_FILE` of what the layers' update was trained with."""
    write_protection(folder, protection_of(layers), *_loaded_with(layers))


def protected_with(layers: Layers) -> str | None:
    """Fingerprint of what the layers' update was trained with.

    Of one that was loaded to be used the layers protect nothing, and the update is protected still.
    """
    return fingerprint_of(protection_of(layers)) or _loaded_with(layers)[0]


def _loaded_with(layers: Layers) -> tuple[str | None, str | None]:
    loaded = (x.trained_with for x in layers.values() if x.trained_with is not None)
    return next(loaded, (None, None))


def read_update(path: str | os.PathLike[str]) -> SavedUpdate:
    """Read `SIDE_FILE`, or the tensors of `ADAPTER_FILE`, whose config says what they are of.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or no such file.
    """
    tensors, metadata = read_safetensors(path, "pt")
    layers: dict[str, Parts] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            raise ValueError(f"{path} is not a LoKI adapter: it holds {key}.")
        match = _KEY.fullmatch(name)
        if name.endswith(".loki_protection"):  # the config's, or the metadata's, again
            continue
        if match is not None:
            layers.setdefault(match[1], {})[match[2]] = tensor
        elif not _PEFT_COPY.search(name):
            others[name] = tensor
    if not layers:
        raise ValueError(f"{path} is not a LoKI adapter: it holds no trained rows.")
    for name, parts in layers.items():
        if set(parts) not in ({"index", "update"}, {"index", "delta_a", "delta_b"}):
            raise ValueError(f"{path} is not whole: of {name} it has {', '.join(sorted(parts))}.")
    with of_a_whole_file(path):
        base = base_rows_of(metadata)
    beside = os.path.abspath(Path(path).with_name(PROTECTION_FILE))
    return SavedUpdate(layers, others, base, metadata.get("protection"), beside)


def protection_tensors(layers: Layers, protection: str) -> dict[str, Tensor]:
    """Its fingerprint as PEFT's adapters hold it, of each layer."""
    return {f"{PREFIX}{name}.loki_protection": digest_of(protection) for name in layers}


def _folder_of(name: str | os.PathLike[str]) -> Path:
    """The folder that is named, or else what a hub's repository of that name has of an update."""
    if os.path.exists(name):
        return Path(name)
    try:
        files = [CONFIG_FILE, ADAPTER_FILE, SIDE_FILE]
        return Path(snapshot_download(os.fspath(name), allow_patterns=files))
    except (OSError, ValueError) as error:  # no such name, no connection, none that a hub takes
        raise FileNotFoundError(
            f"there is no folder {name}, nor was an update of that name found on the hub: {error}"
        ) from error


def read_saved(name: str | os.PathLike[str]) -> SavedUpdate:
    """Read the update in an adapter's folder or repository on the hub, or beside a checkpoint.

    Raises:
        FileNotFoundError: if the folder has neither, or there is none.
        ValueError: if it is damaged, another method's, or has embeddings of single tokens; or if
            it has both, which may be two updates.
    """
    folder = _folder_of(name)
    path = folder / CONFIG_FILE
    if not path.is_file():
        if not (folder / SIDE_FILE).is_file():
            raise FileNotFoundError(
                f"{folder} holds no update of rows: it is not an adapter, which has {CONFIG_FILE}, "
                f"and has no {SIDE_FILE}."
            )
        return read_update(folder / SIDE_FILE)
    if (folder / SIDE_FILE).is_file():
        raise ValueError(
            f"{folder} holds an adapter ({CONFIG_FILE}) and the update of a checkpoint "
            f"({SIDE_FILE}), which may be two; move the one that is meant into another folder."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        method, trained_on = config["peft_type"], base_rows_of(config)
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an adapter's config: {error!r}.") from error
    if method != "LOKI":
        raise explained(ValueError(f"{path} is an adapter of type {method}; load it with PEFT."))
    saved = read_update(folder / ADAPTER_FILE)
    if any(".token_adapter." in name for name in saved.others):
        raise ValueError(
            f"{folder} has embeddings of single tokens (trainable_token_indices), which only PEFT "
            "can load: import loki_kernels.peft and call PeftModel.from_pretrained; its "
            "merge_and_unload() gives an ordinary model."
        )
    return replace(
        saved,
        trained_on=trained_on,
        protection=config.get("protection"),
        base=config.get("base_model_name_or_path"),
    )


def protection_of(layers: Layers) -> Protection | None:
    """What the layers are protected with; None if they protect nothing."""
    return next((x.protection for x in layers.values() if x.protection is not None), None)


def why_other_protection(saved: str | None, present: str | None) -> str | None:
    """Why training cannot go on with the protection that there is."""
    if saved == present:
        return None
    if present is None:
        return "it was trained with a protection; patch with the same one (protect=)"
    if saved is None:
        return "it was trained without a protection; patch without one"
    return "it was trained with another protection"


def load_update(layers: Layers, saved: SavedUpdate) -> str | None:
    """Copy what was saved into layers of the same rows; else change nothing and say why not."""
    if saved.layers.keys() != layers.keys():
        return "it has rows of other layers"
    for name, layer in layers.items():
        parts = saved.layers[name]
        if not torch.equal(parts["index"], layer.index.cpu()):
            return f"{name} has other rows there"
        if not layer.is_like(parts):
            return f"{name} has another rank or width there"
    base, reason = saved.trained_on, None
    if base is not None:
        present = base_of(layers)
        kept = (saved.layers[name] for name in layers)
        updates = (whole_update(*(x[part] for part in TRAINED if part in x)) for x in kept)
        reason = base.why_other(present) or base.why_merged(present, updates)
    if reason is not None:
        return (
            f"it was trained on another base ({saved.base or 'a model without a name'}): {reason}"
        )
    with torch.no_grad():
        for name, layer in layers.items():
            for part, parameter in layer.trained_parameters():
                values = saved.layers[name][part].to(parameter.dtype)
                parameter.copy_(shard_like(values, parameter))
            layer.mark_read()
            protected = saved.protection
            layer.trained_with = (protected, saved.protection_file) if protected else None
    return None


def base_of(layers: Layers) -> BaseRows:
    """What the layers' updates are added to."""
    return BaseRows.of([layer.base_rows.flatten(0, -2) for layer in layers.values()])


def check_base(
    wanted: BaseRows | None, present: BaseRows, trained_on: str | None, loading: str | None
) -> None:
    """Raise ValueError if an update would be added to other rows than it was trained on."""
    reason = wanted.why_other(present) if wanted is not None else None
    if reason is not None:
        message = (
            f"the adapter was trained on another base ({trained_on or 'a model without a name'}) "
            f"than this one ({loading or 'without a name'}): {reason}. Load the model it was "
            "trained on, of the same revision; its dtype and quantization may differ."
        )
        raise explained(ValueError(message))
