"""`Report`: what is done to a model that is patched, and what its user should know of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import AutoConfig

from ..gating import Gating
from ..memory import TrainingMemory, training_memory
from ..protection import Protection
from ..sharding import full_shape
from ..structure import DownProjection, Structure, embedding_weight
from .experts import LokiExperts
from .rows import LokiRows

# What is trained whole beside the rows, by name: modules, and parameters of modules that are not.
Whole = Mapping[str, nn.Module | nn.Parameter]


@dataclass(frozen=True)
class Report:
    """What `patch` did.

    Attributes:
        patched: layer name -> number of trained rows.
        skipped: layer name -> why it was left alone.
        fused: MLP name -> activation of those that recompute their activation product.
        not_fused: MLP name -> why not, of the others, if ``fuse_mlp`` was asked for.
        whole: name -> dtype of the modules and parameters trained whole beside the rows.
        notes: what else a user should know.
        protected: how many directions of its inputs a layer's update leaves alone, at most.
        memory: what training the rows takes beside the model and its activations, with AdamW.
        trainable: trained parameters.
        total: parameters of the model, the trained rows counted once.
    """

    patched: dict[str, int]
    skipped: dict[str, str]
    fused: dict[str, str]
    not_fused: dict[str, str]
    whole: dict[str, str]
    notes: list[str]
    protected: int
    memory: TrainingMemory
    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        lines = [
            f"{len(self.patched)} down-projections patched, {self.trainable:,} of {self.total:,} "
            f"parameters trained ({share:.2f} %)"
        ]
        if self.protected:
            lines.append(f"updates leave alone up to {self.protected} directions of the inputs")
        beside = "beside the model and its activations, with AdamW"
        lines.append(f"the rows take {self.memory} {beside}")
        lines += [f"{name} is trained whole, in {dtype}" for name, dtype in self.whole.items()]
        lines += self.notes
        lines += [f"skipped {name}: {why}" for name, why in self.skipped.items()]
        if self.fused:
            lines.append(
                f"{len(self.fused)} MLPs fused ({', '.join(sorted(set(self.fused.values())))})"
            )
        lines += [f"not fused {name}: {why}" for name, why in self.not_fused.items()]
        return "\n".join(lines)


def plan(
    structure: Structure,
    by_layer: list[tuple[DownProjection, Tensor]],
    rank: int | None,
    gatings: dict[str, Gating | str],
    whole: Whole,
    protection: Protection | None,
) -> Report:
    """What will be done, of a model that is not yet changed; ``trainable`` is counted later."""
    mlps = {
        d.name if d.of_experts else d.name.rpartition(".")[0]: gatings[d.name]
        for d, _ in by_layer
        if d.name in gatings
    }
    own = [d.name for d, index in by_layer if len(index) and "forward" in d.module.__dict__]
    notes = []
    if own:  # accelerate's hooks, for one
        notes = [
            f"{len(own)} of the down-projections ({own[0]}, ...) had a forward of their own, which "
            "is not called while the model is patched"
        ]
    tokens = embedding_weight(structure.causal_lm)
    if not any(p is tokens for part in whole.values() for p in held_in(part)):
        notes += _new_tokens(structure)
    return Report(
        patched={d.name: len(index) for d, index in by_layer if len(index)},
        skipped={d.name: "no row of this layer is selected" for d, i in by_layer if not len(i)},
        fused={name: g.activation for name, g in mlps.items() if isinstance(g, Gating)},
        not_fused={name: g for name, g in mlps.items() if isinstance(g, str)},
        whole=_dtypes(whole),
        notes=notes,
        protected=0
        if protection is None
        else max((x.shape[-1] for x in protection.directions.values()), default=0),
        memory=training_memory(
            ((d, len(index)) for d, index in by_layer),
            protected=False if protection is None else protection.directions,
            rank=rank,
        ),
        trainable=0,
        total=sum(math.prod(full_shape(p)) for p in structure.causal_lm.parameters()),
    )


def whole_weights(layers: dict[str, LokiRows]) -> list[str]:
    """A note on experts whose whole weights get a gradient for a moment."""
    whole = {
        name: layer.why_whole
        for name, layer in layers.items()
        if isinstance(layer, LokiExperts) and layer.why_whole is not None
    }
    if not whole:
        return []
    name, reason = next(iter(whole.items()))
    return [
        f"{len(whole)} modules of experts ({name}, ...) run their own forward pass, so that "
        "backward forms the gradient of a layer's whole down-projection and keeps its rows (under "
        "FSDP2 each keeps a merged copy of it from forward to backward, unless activations are "
        f"checkpointed: 1.3 GB for 16 experts of 8192 x 5120 in bfloat16): {reason}"
    ]


def held_in(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    """The parameters of a module, or the one that is given."""
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def _dtypes(whole: Whole) -> dict[str, str]:
    return {
        name: ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in held_in(part)}))
        for name, part in whole.items()
    }


def _new_tokens(structure: Structure) -> list[str]:
    """A note on tokens that the model has and its checkpoint has not."""
    name = getattr(structure.causal_lm, "name_or_path", None)
    if not name:
        return []
    try:
        # False, since by default a terminal is asked for 15 s whether a model's own code may run
        config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return []
    known = getattr(config.get_text_config(), "vocab_size", structure.vocab_size)
    if structure.vocab_size <= known:
        return []
    return [
        f"the embeddings of tokens {known} to {structure.vocab_size - 1} are new and frozen; "
        "modules_to_save names what to train"
    ]
