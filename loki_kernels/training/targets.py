"""What a user names to be trained, and whether that can be trained in this model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard, cast, get_args

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING
from transformers.pytorch_utils import Conv1D

from ..attribution.analysis import AnalysisOptions, cached_attribution, check_analysis_options
from ..errors import UnsupportedModelError, check_choice, explained
from ..options import DEFAULT_QUOTA, Criterion
from ..protection import Protection
from ..protection.estimate import cached_protection
from ..ranking import rows_per_layer
from ..selection import RowSelection, select
from ..sharding import DTensor, full_shape, is_distributed, is_partitioned, of_the_first
from ..structure import (
    TOLERANCE,
    DownProjection,
    Structure,
    alike,
    foreign_forward,
    plain_name,
    refuse_tensor_parallelism,
)
from .arithmetic import check_rank
from .rows import TRAINED, LokiRows

# What names rows: a selection, one list a layer, or the path of a row file.
Rows = RowSelection | Sequence[Sequence[int] | Tensor] | str | os.PathLike[str]
# A protection, the path of its file, or whether to estimate one.
Protect = Protection | str | os.PathLike[str] | bool
WHOLE = "_loki_whole"  # on a patched model: the names of what it was asked to train whole


def as_selection(rows: Rows) -> RowSelection:
    """What a user named rows by.

    Raises:
        FileNotFoundError: if there is no such row file.
        ValueError: for unsound rows, or if they are no rows but FFN neurons.
    """
    if isinstance(rows, (str, os.PathLike)):
        rows = RowSelection.load(rows)
    selection = rows if isinstance(rows, RowSelection) else RowSelection(rows)
    if selection.info.get("site", "down_proj") != "down_proj":
        raise ValueError(
            "the selection names FFN neurons (site='ffn_neurons'), which are columns of "
            "down_proj.weight; only rows (site='down_proj') can be trained so far."
        )
    return selection


def check_arguments(
    rows: Rows | None,
    quota: float | None,
    criterion: Criterion | None,
    analysis: AnalysisOptions | None,
    rank: int | None,
    modules_to_save: Sequence[str],
) -> None:
    """What can be told before minutes of estimating or analysing."""
    check_rank(rank)
    if quota is not None:
        rows_per_layer(quota, 1)
    if isinstance(modules_to_save, str):
        raise ValueError(f"modules_to_save must be a list of names; it is {modules_to_save!r}.")
    if criterion is not None:
        check_choice("criterion", criterion, get_args(Criterion))
    choices = {"quota": quota, "criterion": criterion, "analysis": analysis or None}
    both = [name for name, value in choices.items() if value is not None]
    if rows is not None and both:
        raise ValueError(f"{both[0]}= chooses rows, and rows= names them; give one of the two.")
    check_analysis_options(analysis or {})


def what_to_train(
    rows: Rows | None,
    quota: float | None,
    criterion: Criterion | None,
    analysis: AnalysisOptions | None,
    protect: Protect | None,
) -> tuple[float, Protect | None]:
    """``quota`` and ``protect`` where they are None.

    Where nothing says what to train it is all rows, protected, which forgot least on both models
    of the study (docs/forgetting.md); else the paper's quota, unprotected.
    """
    if rows is None and quota is None and criterion is None and not analysis:
        return 100.0, True if protect is None else protect
    return DEFAULT_QUOTA if quota is None else quota, protect


def selection_to_train(
    structure: Structure,
    tokenizer: Any,
    quota: float,
    criterion: Criterion | None = None,
    analysis: AnalysisOptions | None = None,
) -> RowSelection:
    """The rows to train where none are named: all with a quota of 100, or an analysis's choice.

    Of an analysis, for which every process has to ask, those of the first process.
    """
    if rows_per_layer(quota, structure.hidden_size) == structure.hidden_size:
        width = structure.hidden_size
        every = [list(range(width)) if ffn is not None else [] for ffn in structure.ffns]
        return RowSelection(every, {"width": width, "quota": quota})
    scores = cached_attribution(structure, tokenizer, analysis)
    selection = select(scores, quota, criterion=criterion)
    return _of_the_first(selection) if is_distributed() else selection


def protection_to_keep(
    structure: Structure, protect: Protect | None, tokenizer: Any
) -> Protection | None:
    """What ``protect`` means, of this model's layers.

    Raises:
        ValueError: if it is of another model.
    """
    if protect is None or protect is False:
        return None
    if protect is True:
        return cached_protection(structure, tokenizer)
    kept = protect if isinstance(protect, Protection) else Protection.load(protect)
    return kept.of(structure)


def refuse_patched(model: nn.Module) -> None:
    """Raise ValueError if rows of the model are being trained."""
    if any(isinstance(module, LokiRows) for module in model.modules()):
        raise explained(
            ValueError(
                "the model is already patched; call unpatch() or merge() on its Patch handle first."
            )
        )


def check_trainable(structure: Structure) -> None:
    """`check_patchable`, and that DDP is not around the model already.

    It adds up the gradients of the parameters that it found when it was made, and every process
    would train an update of its own.
    """
    parts = structure.given.modules()
    if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in parts):
        raise UnsupportedModelError(
            "DistributedDataParallel is around the model, and would add up no gradients of what "
            "patching trains; patch the model first, then wrap it."
        )
    check_patchable(structure)


def check_patchable(structure: Structure) -> None:
    refuse_patched(structure.causal_lm)
    adapter = _peft_layer(structure.causal_lm)
    if adapter is not None:
        raise ValueError(
            f"the model has a PEFT adapter ({adapter}), which patching would freeze; call "
            "merge_and_unload() or unload() on it first."
        )
    refuse_tensor_parallelism(structure)
    refuse_efficient_loading()
    for down_proj in structure.projections():
        _check_projection(down_proj)
    _refuse_shared_weights(structure)


def _check_projection(down_proj: DownProjection) -> None:
    name, module = down_proj.name, down_proj.module
    weight = getattr(module, down_proj.parameter, None)
    known = down_proj.of_experts or isinstance(module, (nn.Linear, Conv1D))
    if not known or not is_plain_weight(weight):
        advice = (
            "load the model unquantized"
            if down_proj.of_experts
            else "patch the model before PEFT wraps it, and train rows over a quantized base with "
            "loki_kernels.peft.LokiConfig"
        )
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__} with a {type(weight).__name__} of "
            f"{getattr(weight, 'dtype', 'no dtype')}, not a plain linear layer nor plain experts; "
            f"{advice}."
        )
    split = getattr(module, "_is_expert_parallel", False) or is_partitioned(weight)
    if down_proj.of_experts and split:
        raise UnsupportedModelError(
            f"the experts of {name} are split between processes (expert parallelism, ZeRO-3), "
            "which rows of experts cannot be trained over; load the model without ep_size, use "
            "ZeRO-2, or shard the patched model with FSDP2 (fully_shard)."
        )
    if isinstance(weight, DTensor):
        raise UnsupportedModelError(
            f"the weight of {name} is sharded; patch the model before fully_shard."
        )
    if weight.is_meta:
        raise UnsupportedModelError(
            f"the weight of {name} is not in memory (offloaded, or on the meta device); load the "
            "model without offloading."
        )
    if down_proj.of_experts:
        around = foreign_forward(down_proj.parent)
        if around is not None:
            raise UnsupportedModelError(
                f"something has put {around} around the experts of {name}, which may read their "
                "weights without calling them, and so without an update; load the model without "
                "use_kernels=True."
            )
    elif not is_partitioned(weight) and not computes_linear(module, down_proj.axis):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__}, which computes something else than a linear "
            "layer; its rows cannot be trained."
        )


def _refuse_shared_weights(structure: Structure) -> None:
    """Raise UnsupportedModelError if another module has a down-projection's weight too.

    Its products would see the rows that are written, and give their update no gradient.
    """
    names: dict[int, list[str]] = {}
    for name, module in structure.causal_lm.named_modules():  # each once, under whatever names
        for part, parameter in module.named_parameters(recurse=False):
            names.setdefault(id(parameter), []).append(f"{name}.{part}")
    for down_proj in structure.projections():
        own = names.get(id(down_proj.weight), ())
        if len(own) > 1:
            raise UnsupportedModelError(
                f"{own[0]} and {own[1]} are one weight, and its rows would be trained in one of "
                "the two places alone."
            )


def is_plain_weight(weight: object) -> TypeGuard[nn.Parameter]:
    return (
        isinstance(weight, Tensor)
        and type(weight.data) in (Tensor, DTensor)
        and weight.dtype in TOLERANCE
    )


def computes_linear(module: nn.Module, axis: int) -> bool:
    """Whether a subclass of ``nn.Linear`` gives what that would."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[1 - axis], generator=generator, device="cpu")
    with torch.no_grad():
        x = x.to(weight)
        want = nn.functional.linear(x, weight.t() if axis else weight, bias)
        return alike(type(module).forward(module, x), want, weight.dtype)


def refuse_efficient_loading() -> None:
    """Raise UnsupportedModelError where accelerate gives the weights to one process alone.

    Its ``cpu_ram_efficient_loading`` then hands every parameter to the others, but no buffer of a
    state dict, as the rows' numbers are.
    """
    asked = (os.environ.get(name, "") for name in _EFFICIENT_LOADING)
    if is_distributed() and all(value.lower() in ("1", "true") for value in asked):
        raise UnsupportedModelError(
            "accelerate's cpu_ram_efficient_loading gives the weights to the first process alone; "
            'load them in every process: fsdp_config={"cpu_ram_efficient_loading": False}, or '
            "fsdp_cpu_ram_efficient_loading: false for accelerate."
        )


# What accelerate tells transformers by.
_EFFICIENT_LOADING = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")


def assign_rows(
    structure: Structure, selection: RowSelection
) -> list[tuple[DownProjection, Tensor]]:
    """(down-projection, its rows, perhaps none) of every layer that has an FFN.

    Raises:
        ValueError: if the selection was made for another model.
    """
    if len(selection) != len(structure.layers):
        raise ValueError(
            f"the selection has {len(selection)} layers, the model {len(structure.layers)}."
        )
    if selection.info.get("width", structure.hidden_size) != structure.hidden_size:
        raise ValueError(
            f"the selection was made for hidden_size {selection.info['width']}; the model has "
            f"{structure.hidden_size}."
        )
    assigned: list[tuple[DownProjection, Tensor]] = []
    for layer, (rows, ffn) in enumerate(zip(selection, structure.ffns, strict=True)):
        if len(rows) and int(rows[-1]) >= structure.hidden_size:
            raise ValueError(
                f"row {int(rows[-1])} of layer {layer} is out of range: the model's hidden_size "
                f"is {structure.hidden_size}."
            )
        if ffn is not None:
            assigned += [(down_proj, rows) for down_proj in ffn.projections]
        elif len(rows):
            raise ValueError(f"the selection has rows of layer {layer}, which has no FFN.")
    return assigned


def projection_names(structure: Structure) -> list[list[str]]:
    """The names of each layer's down-projections."""
    return [[d.name for d in ffn.projections] if ffn else [] for ffn in structure.ffns]


def _peft_layer(model: nn.Module) -> str | None:
    """The name of the first layer that PEFT has put into a model."""
    if "peft" not in sys.modules:  # no layer of it can be there
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    return next((n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)), None)


def find_modules(structure: Structure, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that ``names`` mean, by their full name or its end, as PEFT reads them.

    Raises:
        ValueError: if a name means none, or one that holds an FFN's trained rows.
    """
    found: dict[str, nn.Module] = {}
    for name in names:
        matches = {
            full: module
            for full, module in structure.causal_lm.named_modules()
            if full == name or full.endswith(f".{name}")
        }
        if not matches:
            raise ValueError(f"modules_to_save names {name!r}, which the model lacks.")
        found |= matches
    for name, module in found.items():
        modules = set(module.modules())
        inside = [d.name for d in structure.projections() if d.module in modules]
        if inside:
            raise ValueError(
                f"modules_to_save names {name}, which holds {inside[0]}; its rows are trained."
            )
    return found


def new_heads(structure: Structure) -> list[str]:
    """Names of the modules beside the base model of a class that has no language-model head.

    ``AutoModelForSequenceClassification`` and its like put a new one there, which learns nothing
    unless it is trained. A base model by itself has none: beside a decoder lie its towers.
    """
    model = structure.causal_lm
    known = MODEL_MAPPING.get(type(model.config), ())
    is_base = type(model) in (known if isinstance(known, tuple) else (known,))
    if model.get_output_embeddings() is not None or structure.decoder is model or is_base:
        return []
    return [
        name
        for name, module in model.named_children()
        if not any(part is structure.decoder for part in module.modules())
        and any(True for _ in module.parameters())
    ]


def trained_whole(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a patched model that were to be trained, or are, and no update of rows."""
    own = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, LokiRows)
        for part in TRAINED
    }
    asked = model.__dict__.get(WHOLE, ())  # also where a user has frozen all after training
    others = ((plain_name(n), p) for n, p in model.named_parameters() if n not in own)
    return {name: p for name, p in others if p.requires_grad or name in asked}


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by their names in state dicts, tied ones by each."""
    return {plain_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}


def why_other_modules(model: nn.Module, saved: Mapping[str, Tensor]) -> str | None:
    """Why parameters that were saved are not those that a patched model trains whole.

    A tied one may have any of its names, or several.
    """
    trained = {id(p): name for name, p in trained_whole(model).items()}
    names = parameters_of(model)
    found = {id(names[name]) for name in saved if name in names}
    if found != trained.keys() or saved.keys() - names.keys():
        return (
            f"beside the rows it has {', '.join(sorted(saved)) or 'nothing'}, and this model "
            f"trains {', '.join(sorted(trained.values())) or 'nothing'} (modules_to_save=)"
        )
    if any(tensor.shape != full_shape(names[name]) for name, tensor in saved.items()):
        return "a module beside the rows has another shape there"
    return None


def _of_the_first(selection: RowSelection) -> RowSelection:
    """The first process's: a near-tie is enough for two devices to differ."""
    info, rows = of_the_first((selection.info, [rows.tolist() for rows in selection]))
    return RowSelection(rows, info)
