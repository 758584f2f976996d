"""Adapters: the trained rows alone, in PEFT's file format; and as a LoRA adapter."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ..discovery import find_structure
from ..files import check_folder
from ..selection import RowSelection
from ..sharding import is_distributed
from ..structure import Structure
from . import adapter_file
from .adapter_file import ADAPTER_FILE, CONFIG_FILE, SIDE_FILE, AdapterConfig
from .handle import Patch
from .linear import LokiLinear
from .patching import patch


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the trained rows of a patched model, and nothing else of it.

    The folder gets ``adapter_model.safetensors`` (rows and their indices, in the dtype they were
    trained in) and ``adapter_config.json``. `load_adapter` reads it, and so does PEFT once
    ``loki_kernels.peft`` is imported. In distributed training call it in every process; the first
    one writes.

    Raises:
        ValueError: if the model is not patched.
        OSError: if the folder cannot be created or written.
    """
    structure, layers = _patched_layers(model)
    path = check_folder(folder)
    tensors = adapter_file.adapter_tensors(adapter_file.parts_of(layers))
    config = AdapterConfig(
        base=_base_name(structure),
        rows=[
            layers[d.name].index.tolist() if d is not None and d.name in layers else []
            for d in structure.down_projs
        ],
        rank=next(iter(layers.values())).rank,
        fingerprint=adapter_file.base_fingerprint(layers),
    )
    if not is_distributed() or torch.distributed.get_rank() == 0:
        adapter_file.write_adapter(path, tensors, config.content())
    return path


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Patch:
    """Patch a base model with saved rows: what `save_adapter` or PEFT wrote.

    ``merge()`` of the handle that is returned makes a plain model of it, ``unpatch()`` undoes it.

    Raises:
        FileNotFoundError: if the folder is not an adapter.
        ValueError: if it is damaged, or was made for another base. The model is unchanged.
        UnsupportedModelError: if the model cannot be patched.
    """
    folder = Path(folder)
    config = AdapterConfig.load(folder)
    saved = adapter_file.read_rows(folder / ADAPTER_FILE)
    trained = [t for parts in saved.layers.values() for part, t in parts.items() if part != "index"]
    dtype = trained[0].dtype if trained else None
    handle = patch(model, RowSelection(config.rows), rank=config.rank, dtype=dtype)
    layers = dict(handle.named_layers())
    try:
        adapter_file.check_fingerprint(
            config.fingerprint,
            adapter_file.base_fingerprint(layers),
            config.base,
            getattr(handle.model, "name_or_path", None),
        )
        reason = adapter_file.load_rows(layers, saved)
        if reason is not None:
            raise ValueError(f"{folder}: {ADAPTER_FILE} and {CONFIG_FILE} do not agree: {reason}.")
    except BaseException:
        handle.unpatch()
        raise
    return handle


def merge_folder(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Put the rows of an adapter, or of a checkpoint's side file, into its base model.

    Raises:
        FileNotFoundError: if the folder has neither.
        ValueError: if it is damaged or was made for another model; the model is unchanged then.
    """
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        return load_adapter(model, folder).merge()
    saved = adapter_file.read_rows(folder / SIDE_FILE)
    layers = saved.layers
    names = [d.name if d is not None else "" for d in find_structure(model).down_projs]
    strangers = layers.keys() - set(names)
    if strangers:
        raise ValueError(f"the side file has rows of {min(strangers)}, which the model lacks.")
    rows = [layers[name]["index"].tolist() if name in layers else [] for name in names]
    ranks = {parts["delta_a"].shape[1] for parts in layers.values() if "delta_a" in parts}
    with patch(model, rows, rank=min(ranks, default=None), dtype=torch.float32) as handle:
        reason = adapter_file.load_rows(dict(handle.named_layers()), saved)
        if reason is not None:
            raise ValueError(f"{folder / SIDE_FILE}: {reason}.")
        return handle.merge()


def export_lora(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the update of a patched model's rows as an exact LoRA adapter, for servers of those.

    An update of k rows is the matrix that puts row i in place S_i times the k differences:
    ``lora_B`` ``[out_features, k]`` of zeros and ones and ``lora_A`` ``[k, in_features]``, of rank
    k and scale 1. With LoKI* it has the rank of LoKI*. In float32; the base must be the one that
    was trained.

    Raises:
        ValueError: if the model is not patched.
        OSError: if the folder cannot be created or written.
    """
    structure, layers = _patched_layers(model)
    path = check_folder(folder)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in layers.items():
        placement = torch.zeros(layer.out_features, len(layer.index))
        placement[layer.index.cpu(), torch.arange(len(layer.index))] = 1.0
        parts = {n: p.detach().float().cpu() for n, p in layer.trained_parameters()}
        if layer.rank is None:
            a, b = parts["rows"] - layer.original_rows.float(), placement
        else:
            a, b = parts["delta_b"], placement @ parts["delta_a"]
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
        ranks[name] = len(a)
    rank = max(ranks.values())
    uneven = {name: r for name, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": _base_name(structure),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": uneven,
        "alpha_pattern": uneven,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    adapter_file.write_adapter(path, tensors, config)
    return path


def _base_name(structure: Structure) -> str | None:
    return getattr(structure.causal_lm, "name_or_path", None) or None


def _patched_layers(model: nn.Module) -> tuple[Structure, dict[str, LokiLinear]]:
    structure = find_structure(model)
    modules: dict[str, nn.Module] = {d.name: d.module for _, d in structure.trainable()}
    layers = {n: layer for n, layer in modules.items() if isinstance(layer, LokiLinear)}
    if not layers:
        raise ValueError("the model is not patched; call loki_kernels.patch(model) first.")
    return structure, layers
