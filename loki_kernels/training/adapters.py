"""Adapters: the trained update alone, in PEFT's file format; and as a LoRA adapter."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..default_device import made_on_cpu
from ..discovery import find_structure
from ..errors import import_extra
from ..files import check_folder
from ..sharding import full_shape, full_values, is_first, reshard
from ..structure import Structure
from . import adapter_file
from .adapter_file import Layers
from .handle import Patch
from .loading import check_known
from .patching import patch_saved
from .rows import LokiRows
from .targets import parameters_of, projection_names, trained_whole

logger = logging.getLogger(__name__)

# The largest rank of a LoRA adapter that vLLM 0.11 serves (``--max-lora-rank``).
_LARGEST_SERVED = 512


@made_on_cpu
def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the trained update of a patched model, and nothing else of it.

    The folder gets ``adapter_model.safetensors`` (the update and its rows' numbers, in float32, and
    modules that were trained whole), ``adapter_config.json``, and of a protected update
    ``loki_rows.protection``, which PEFT trains on with and nothing else needs. `load_adapter` reads
    it, and so does PEFT once ``loki_kernels.peft`` is imported. It fits any copy of the base, in
    another dtype or quantized. In distributed training call it in every process; the first one
    writes.

    Args:
        model: a patched model.
        folder: to write to.

    Raises:
        ValueError: if the model is not patched, or the folder is a checkpoint's.
        RuntimeError: if weights were loaded whose update is another one. Nothing is written.
        OSError: if the folder cannot be created or written.
    """
    structure, layers = _patched_layers(model)
    path = check_folder(folder)
    adapter_file.refuse_checkpoint(path)
    others = trained_whole(structure.causal_lm)
    keep = is_first()
    tensors = adapter_file.adapter_tensors(layers, adapter_file.parts_of(layers), keep=keep)
    tensors |= adapter_file.other_tensors(others, keep=keep)
    if not keep:
        return path
    fingerprint = adapter_file.protected_with(layers)
    if fingerprint is not None:
        tensors |= adapter_file.protection_tensors(layers, fingerprint)
    config = {
        "peft_type": "LOKI",
        "base_model_name_or_path": _base_name(structure),
        "rows": [
            next((layers[n].index.tolist() for n in names if n in layers), [])
            for names in projection_names(structure)
        ],
        "rank": next(iter(layers.values())).rank,
        "modules_to_save": _modules_to_save(
            structure, others, "loki_kernels.load_adapter reads it from this adapter"
        ),
        "protection": fingerprint,
        **adapter_file.base_rows_content(adapter_file.base_of(layers)),
    }
    adapter_file.write_adapter(path, tensors, config, task_type(structure.causal_lm))
    adapter_file.write_protection_of(layers, path)
    return path


def _modules_to_save(structure: Structure, others: Iterable[str], reader: str) -> list[str] | None:
    """For PEFT, which knows modules alone; else what reads the other parameters is said."""
    whole, alone = adapter_file.whole_modules(structure.causal_lm, others)
    if alone:
        logger.warning(
            "PEFT reads nothing of %s, since it knows whole modules alone; %s.",
            ", ".join(alone), reader,
        )  # fmt: skip
    return whole or None


@made_on_cpu
def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Patch:
    """Patch a base model with a saved update: an adapter of `save_adapter` or PEFT, or what lies
    beside a checkpoint of ``save_pretrained``.

    ``merge()`` of the handle that is returned makes a plain model of it, ``unpatch()`` undoes it.
    The base may be in another dtype than the one that was trained on, or whole where that was
    quantized. To train a protected one on, `patch` with the folder.

    Args:
        model: the base.
        folder: of either, or the name of the adapter's repository on the hub.

    Raises:
        FileNotFoundError: if the folder has neither, or there is none.
        ValueError: if it is damaged, was made for another base, or has embeddings of single tokens
            (PEFT's ``trainable_token_indices``). The model is unchanged.
        UnsupportedModelError: if the model cannot be patched.
    """
    return patch_saved(model, adapter_file.read_saved(folder))


@made_on_cpu
def export_lora(
    model: nn.Module, folder: str | os.PathLike[str], *, max_rank: int | None = None
) -> Path:
    """Write the update of a patched model's rows as a LoRA adapter, for PEFT and for servers.

    An update of k rows is the matrix that puts row i in place S_i times the k differences:
    ``lora_B`` ``[out_features, k]`` of zeros and ones and ``lora_A`` ``[k, in_features]``, of rank
    k and scale 1; of rank in_features where that is less, as of all rows of many experts. With
    LoKI* it has the rank of LoKI*. All layers have one rank, the largest of them, since servers
    divide one ``lora_alpha`` by it; the others are filled up with zeros. In float32; the base must
    be the one that was trained. Every process calls it, and the first one writes.

    Of a mixture of experts every expert has its factors, and all down-projections are PEFT's
    ``target_parameters``, each of its own rank (``rank_pattern``). Such an adapter is several times
    as large as `save_adapter`'s; its size is logged first. PEFT 0.18, 0.19 and 0.20 differ in how
    experts' factors lie, so it is written for the PEFT that is installed, which its config names.

    Args:
        model: a patched model.
        folder: to write to.
        max_rank: of the adapter; a larger update is written as its best approximation of this rank
            in the Frobenius norm, and its relative error is logged. None writes it exactly.

    Raises:
        ValueError: if the model is not patched, max_rank is below 1, or the folder is a
            checkpoint's.
        RuntimeError: if weights were loaded whose update is another one. Nothing is written.
        ImportError: for a mixture of experts without PEFT.
        OSError: if the folder cannot be created or written.
    """
    structure, layers = _patched_layers(model)
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank must be positive; it is {max_rank}.")
    path = check_folder(folder)
    adapter_file.refuse_checkpoint(path)
    exact = {
        name: layer.rank or min(len(layer.index), layer.base_rows.shape[-1])
        for name, layer in layers.items()
    }
    ranks = {name: min(rank, max_rank or rank) for name, rank in exact.items()}
    rank = max(ranks.values())
    whole = {id(p) for p in trained_whole(structure.causal_lm).values()}
    # a tied one under all its names: PEFT trains a copy of each
    others = {n: p for n, p in parameters_of(structure.causal_lm).items() if id(p) in whole}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": _base_name(structure),
        "r": rank,
        "lora_alpha": rank,
        "modules_to_save": _modules_to_save(
            structure, others, "loki_kernels.save_adapter and save_pretrained keep it"
        ),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    if any(layer.frozen.ndim > 2 for layer in layers.values()):
        config |= _mixture_config(layers, ranks)
    else:
        ranks = dict.fromkeys(layers, rank)
        config["target_modules"] = sorted(layers)
        _warn_of_servers(rank)
    keep = is_first()
    tensors, error = _lora_tensors(layers, ranks, exact, keep=keep)
    if error:
        logger.warning(
            "the adapter of rank %d holds an update of rank %d but for a relative error of %.2g.",
            rank, max(exact.values()), error,
        )  # fmt: skip
    gathered = adapter_file.other_tensors(others, keep=keep)
    tensors |= {name: tensor.clone() for name, tensor in gathered.items()}
    if keep:
        adapter_file.write_adapter(path, tensors, config, task_type(structure.causal_lm))
    return path


def _warn_of_servers(rank: int) -> None:
    if rank > _LARGEST_SERVED:
        logger.warning(
            "the adapter has rank %d, and vLLM serves ranks up to %d; export_lora(..., "
            "max_rank=%d) writes the best approximation of that rank.",
            rank, _LARGEST_SERVED, _LARGEST_SERVED,
        )  # fmt: skip


def _lora_tensors(
    layers: Layers, ranks: Mapping[str, int], exact: Mapping[str, int], *, keep: bool
) -> tuple[dict[str, Tensor], float]:
    """The factors of each layer's rank, named for PEFT, and what they lose of ``exact`` ranks.

    That is the relative error in the Frobenius norm. Every process has to ask; without ``keep`` it
    takes part in gathering the update and factors nothing.
    """
    tensors: dict[str, Tensor] = {}
    lost = total = 0.0
    truncated = any(exact[name] > rank for name, rank in ranks.items())
    for name, layer in layers.items():
        update = {part: full_values(p) for part, p in layer.trained_parameters()}
        if not keep:
            continue
        a, b = _lora_factors(layer, layer.formed(update))
        if truncated:
            total += float((b.mT @ b @ a * a).sum())
        if exact[name] > ranks[name]:
            a, b, error = _truncated(a, b, ranks[name])
            lost += error
        missing = ranks[name] - a.shape[-2]
        a, b = nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
        a, b = _as_peft_lays(layer, a, b)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    return tensors, (lost / total) ** 0.5 if lost else 0.0


def _lora_factors(layer: LokiRows, formed: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(A ``[..., r, in_features]``, B ``[..., out_features, r]``) whose product is the update.

    ``formed`` is the update as it acts, whole.
    """
    placement = torch.zeros(full_shape(layer.frozen)[layer.axis], len(layer.index))
    placement[layer.index.cpu(), torch.arange(len(layer.index))] = 1.0
    parts = {name: tensor.float().cpu() for name, tensor in formed.items()}
    if layer.rank is None:
        update = parts["update"]
        k, width = update.shape[-2:]
        if width < k:
            return torch.eye(width).expand(*update.shape[:-2], -1, -1), placement @ update
        return update, placement.expand(*update.shape[:-2], -1, -1)
    return parts["delta_b"], placement @ parts["delta_a"]


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of this rank, and the square of what they lose in the Frobenius norm."""
    # After this what is decomposed has as many rows as A, and not as the weight.
    q, r = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r @ a, full_matrices=False)
    return (
        s[..., :rank, None] * vh[..., :rank, :],
        q @ u[..., :rank],
        float(s[..., rank:].square().sum()),
    )


def _mixture_config(layers: Mapping[str, LokiRows], ranks: Mapping[str, int]) -> dict[str, Any]:
    """What a LoRA adapter's config says of a mixture of experts; logs what the adapter takes.

    Linear layers are named by their weights too, which gives them the same factors: of
    ``target_modules`` that end in ``down_proj`` PEFT (0.19 to 0.21) makes the experts alone.
    """
    peft = import_extra("peft", "peft", "how a LoRA of experts is laid out depends on PEFT")
    update = written = 0
    for name, layer in layers.items():
        *experts, height, width = full_shape(layer.frozen)
        written += 4 * math.prod(experts) * ranks[name] * (height + width)
        update += sum(p.numel() * p.element_size() for _, p in layer.trained_parameters())
    logger.warning(
        "the LoRA adapter takes %.3g GB, since lora_B names the rows of every expert by a matrix; "
        "save_adapter's takes %.3g GB.", written / 1e9, update / 1e9,
    )  # fmt: skip
    parameters = {f"{name}.{layer.parameter}": ranks[name] for name, layer in layers.items()}
    other = {name: rank for name, rank in parameters.items() if rank != max(ranks.values())}
    return {
        "target_modules": [],
        "target_parameters": sorted(parameters),
        "rank_pattern": other,
        "alpha_pattern": other,
        "peft_version": peft.__version__,
    }


def _as_peft_lays(layer: LokiRows, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``lora_A`` and ``lora_B`` of PEFT as it is installed, of factors of the update."""
    if a.ndim == 2:
        return a, b
    if _axis_of_lora_a(bool(getattr(layer, "is_transposed", False))) == layer.axis:
        a, b = b.mT, a.mT
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


@functools.cache
def _axis_of_lora_a(transposed: bool) -> int:
    """Which dimension of a stack PEFT's ``lora_A`` is over; in 0.18, 0.19 and 0.20 it is another.

    ``transposed`` is the experts' own mark, ``is_transposed``.
    """
    from peft import LoraConfig, inject_adapter_in_model

    experts = nn.Module()
    experts.register_parameter("stack", nn.Parameter(torch.zeros(2, 3, 5)))
    experts.__dict__["is_transposed"] = transposed
    config = LoraConfig(r=1, target_modules=[], target_parameters=["experts.stack"])
    wrapped = inject_adapter_in_model(config, nn.ModuleDict({"experts": experts}))
    return (2, 3, 5).index(wrapped.get_submodule("experts.lora_A.default").in_features)


def _base_name(structure: Structure) -> str | None:
    """What loads an adapter's base; None of a model that has another update merged into it."""
    model = structure.causal_lm
    name = getattr(model, "name_or_path", None) or None
    if name is not None and vars(model).get(adapter_file.MERGED) == name:
        logger.warning(
            "the base of what is saved is %s with an update merged into it, so no base is named: "
            "save that model and set model.name_or_path to its folder.",
            name,
        )
        return None
    return name


def task_type(model: nn.Module) -> str:
    """PEFT's word for what the model is for; it chooses the class around an adapter's base."""
    kinds = {
        "ForCausalLM": "CAUSAL_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    name = type(model).__name__
    return next((kind for end, kind in kinds.items() if name.endswith(end)), "CAUSAL_LM")


def _patched_layers(model: nn.Module | Patch) -> tuple[Structure, dict[str, LokiRows]]:
    structure = find_structure(model.model if isinstance(model, Patch) else model)
    reshard(structure.causal_lm)
    modules: dict[str, nn.Module] = {d.name: d.module for d in structure.projections()}
    layers = {n: layer for n, layer in modules.items() if isinstance(layer, LokiRows)}
    if not layers:
        raise ValueError("the model is not patched; call loki_kernels.patch(model) first.")
    check_known(layers.values())
    return structure, layers
