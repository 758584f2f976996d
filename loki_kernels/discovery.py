"""Finds the parts of a decoder language model by structure, not by model name.

One place decides what a model is: `examine` looks at every decoder layer and says what its FFN is,
`find_structure` returns the parts or raises the first reason against them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import nn

from .errors import UnsupportedModelError
from .sharding import full_shape
from .structure import (
    DownProjection,
    Structure,
    embedding_weight,
    is_linear_like,
    text_config,
    unwrap,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the forward pass of a module takes that mixes tokens (attention, recurrence, convolution):
# one of these names. Measured on the 177 ``*ForCausalLM`` classes of transformers 5.24; attributes
# such as ``layer_idx`` or ``num_heads`` are no safe mark, some MLPs bear them.
_MIXER_ARGUMENTS = frozenset(
    {
        "attention_mask",
        "attn_mask",
        "cache",
        "cache_params",
        "layer_past",
        "mask",
        "past_key_value",
        "past_key_values",
        "position_bias",
        "position_embeddings",
        "state",
    }
)


@dataclass(frozen=True)
class Layer:
    """What one decoder layer's FFN is.

    Attributes:
        name: of the decoder layer.
        down_proj: what is trained and attributed; None without an FFN, or where it is refused.
        reason: why it is refused; None where it is not.
    """

    name: str
    down_proj: DownProjection | None
    reason: str | None


def find_structure(model: nn.Module) -> Structure:
    """Find the text decoder's layers and their down-projections.

    Raises:
        UnsupportedModelError: if there is no single stack of decoder layers, or the FFN of a layer
            is not one block that ends in one linear layer; it names the module and the reason.
    """
    causal_lm = unwrap(model)
    decoder, stack, layers = examine(causal_lm)
    for layer in layers:
        if layer.reason is not None:
            raise UnsupportedModelError(layer.reason)
    found = [layer.down_proj for layer in layers if layer.down_proj is not None]
    if not found:
        raise UnsupportedModelError(
            f"no decoder layer of {type(causal_lm).__name__} has an FFN; LoKI trains rows of its "
            "down-projection."
        )
    for shared in ([d.module for d in found], [getattr(d.module, "weight", d) for d in found]):
        if len(set(map(id, shared))) < len(found):
            raise UnsupportedModelError(
                f"decoder layers of {type(causal_lm).__name__} share one FFN's weight, so a row "
                "has no layer of its own."
            )
    return Structure(
        causal_lm=causal_lm,
        decoder=decoder,
        layers=tuple(stack),
        down_projs=tuple(layer.down_proj for layer in layers),
        hidden_size=text_config(causal_lm).hidden_size,
        intermediate_size=max(down_proj.module.in_features for down_proj in found),
        vocab_size=full_shape(embedding_weight(causal_lm))[0],
    )


def examine(causal_lm: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList, list[Layer]]:
    """(text decoder, its layers, what each layer's FFN is), of any transformers model.

    Raises:
        UnsupportedModelError: if there is no single stack of decoder layers.
    """
    config = text_config(causal_lm)
    if getattr(causal_lm.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(causal_lm).__name__} is an encoder-decoder model; only decoder language models "
            "are supported."
        )
    hidden_size = getattr(config, "hidden_size", None)
    if not isinstance(hidden_size, int):
        raise UnsupportedModelError(
            f"{type(config).__name__} has no hidden_size; the width of a node is unknown."
        )
    decoder, name, stack = _find_layers(causal_lm)
    layers = [_examine_layer(layer, f"{name}.{i}", hidden_size) for i, layer in enumerate(stack)]
    return decoder, stack, layers


def is_mixer(module: nn.Module) -> bool:
    """Whether a module mixes tokens, by what its ``forward`` takes."""
    try:
        arguments = inspect.signature(type(module).forward).parameters
    except (TypeError, ValueError):
        return False
    return not _MIXER_ARGUMENTS.isdisjoint(arguments)


def _find_layers(causal_lm: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The text model, and the name and list of its decoder layers.

    It is the innermost module around the token embedding that holds a list of modules with mixers
    inside: a vision or audio tower has no token embedding.
    """
    weight = embedding_weight(causal_lm)
    name = next(n for n, m in causal_lm.named_modules() if getattr(m, "weight", None) is weight)
    while name:
        name = name.rpartition(".")[0]
        tower = causal_lm.get_submodule(name)
        prefix = f"{name}." if name else ""
        stacks = [(prefix + n, stack) for n, stack in _stacks(tower)]
        if len(stacks) == 1:
            return tower, *stacks[0]
        if stacks:
            names = ", ".join(n for n, _ in stacks)
            raise UnsupportedModelError(
                f"{type(causal_lm).__name__} has {len(stacks)} lists of layers beside its token "
                f"embedding ({names}); which are the decoder's is unknown."
            )
    raise UnsupportedModelError(
        f"{type(causal_lm).__name__} has no list of decoder layers around attention or another "
        "module that mixes tokens."
    )


def _stacks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of modules that hold mixers."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and any(
            is_mixer(part) for layer in child for part in layer.modules() if part is not layer
        ):
            yield prefix + name, child
        else:
            yield from _stacks(child, f"{prefix}{name}.")


@dataclass(frozen=True)
class _Linear:
    """A linear layer outside the mixers, and the matrices beside it that are none."""

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Linear


@dataclass
class _Branch:
    """What a decoder layer holds under one name outside its mixers.

    Attributes:
        name: dotted name in the model; the decoder layer's for what it holds directly.
        kind: class of the module.
        linears: every linear layer in it.
        others: (dotted name, shape) of matrices in it that are no linear layer's.
    """

    name: str
    kind: str
    linears: list[_Linear]
    others: list[tuple[str, tuple[int, ...]]]

    def collect(self, module: nn.Module, prefix: str, *, deep: bool) -> None:
        """Add what ``module`` holds, mixers not entered."""
        for name, parameter in module.named_parameters(recurse=False):
            if len(full_shape(parameter)) >= 2:
                self.others.append((prefix + name, full_shape(parameter)))
        for name, child in module.named_children():
            if is_linear_like(child):
                linear = cast(nn.Linear, child)
                self.linears.append(_Linear(prefix + name, module, name, linear))
            elif deep and not is_mixer(child):
                self.collect(child, f"{prefix}{name}.", deep=True)


def _branches(layer: nn.Module, layer_name: str) -> list[_Branch]:
    own = _Branch(layer_name, type(layer).__name__, [], [])
    own.collect(layer, f"{layer_name}.", deep=False)
    found = [own]
    for name, child in layer.named_children():
        if not is_linear_like(child) and not is_mixer(child):
            branch = _Branch(f"{layer_name}.{name}", type(child).__name__, [], [])
            branch.collect(child, f"{branch.name}.", deep=True)
            found.append(branch)
    return [branch for branch in found if branch.linears or branch.others]


def _examine_layer(layer: nn.Module, layer_name: str, hidden_size: int) -> Layer:
    if hasattr(layer, "backward_pass"):
        return _refused(
            layer_name,
            f"{layer_name} ({type(layer).__name__}) is reversible and runs a backward pass of its "
            "own, which reaches no row while the rest is frozen.",
        )
    branches = _branches(layer, layer_name)
    linears = [linear for branch in branches for linear in branch.linears]
    candidates: list[_Linear] = []
    for branch in branches:
        own = [linear for linear in branch.linears if _is_down(linear, hidden_size, linears)]
        if branch.others:
            name, shape = branch.others[0]
            return _refused(
                layer_name,
                f"{branch.name} ({branch.kind}) holds {name} {list(shape)}, which is no linear "
                "layer's: mixtures of experts and Conv1D are not supported yet.",
            )
        if len(own) > 1:
            return _refused(
                layer_name,
                f"{branch.name} ({branch.kind}) has {len(own)} linears that could be the FFN's "
                f"down-projection ({', '.join(linear.name for linear in own)}): mixtures of "
                "experts and intermediate_size = hidden_size are not supported yet.",
            )
        candidates += own
    if not candidates and not branches:
        return Layer(layer_name, None, None)  # a mixer alone
    if not candidates:
        return _refused(
            layer_name,
            f"{layer_name} ({type(layer).__name__}) has no FFN down-projection: no linear outside "
            f"its mixers with out_features = hidden_size = {hidden_size} that another linear "
            f"feeds, in {', '.join(branch.name for branch in branches)}.",
        )
    # A second branch beside a gated FFN that is not gated, such as Gemma-3n's low-rank residual and
    # Gemma-4's per-layer input, is none; nor is a narrower one beside a plain FFN.
    gated = [linear for linear in candidates if _is_gated(linear, linears)]
    candidates = gated or candidates
    widest = max(linear.module.in_features for linear in candidates)
    best = [linear for linear in candidates if linear.module.in_features == widest]
    if len(best) > 1:
        return _refused(
            layer_name,
            f"{layer_name} sums {len(best)} branches that end in linears of one width "
            f"({', '.join(linear.name for linear in best)}); a sum is not supported yet.",
        )
    down = best[0]
    path = down.name.rpartition(".")[0] + "."
    feeders = [x for x in linears if x.name.startswith(path) and x is not down]
    block = down.parent if feeders and down.parent is not layer else down.module
    return Layer(
        layer_name,
        DownProjection(down.name, down.parent, down.attribute, down.module, block),
        None,
    )


def _is_down(linear: _Linear, hidden_size: int, linears: list[_Linear]) -> bool:
    """Whether a plain or gated up-projection feeds it, or one that fuses gate and up."""
    inner = linear.module.in_features
    return linear.module.out_features == hidden_size and any(
        other.module.out_features in (inner, 2 * inner) for other in linears if other is not linear
    )


def _is_gated(down: _Linear, linears: list[_Linear]) -> bool:
    """Whether two linears beside it feed it, or one that fuses gate and up."""
    inner, path = down.module.in_features, down.name.rpartition(".")[0] + "."
    widths = [x.module.out_features for x in linears if x is not down and x.name.startswith(path)]
    return widths.count(inner) >= 2 or 2 * inner in widths


def _refused(layer_name: str, reason: str) -> Layer:
    return Layer(layer_name, None, reason)
