"""Finds the parts of a decoder language model by structure, not by model name.

One place decides what a model is: `examine` looks at every decoder layer and says what its FFN is,
`find_structure` returns the parts or raises the first reason against them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .ending import endings, is_down, is_gated
from .errors import UnsupportedModelError
from .sharding import full_shape
from .structure import (
    FFN,
    WRAPPED,
    DownProjection,
    Structure,
    embedding_weight,
    linear_shape,
    text_config,
    unwrap,
)

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
        ffn: what is trained and attributed; None without one, or where it is refused.
        reason: why it is refused; None where it is not.
    """

    name: str
    ffn: FFN | None
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
            reason = layer.reason
            if getattr(causal_lm, "is_quantized", False):  # packed into tensors of other shapes
                reason = (
                    f"{reason.removesuffix('.')}; the model is quantized, so load it unquantized "
                    "(Mxfp4Config has dequantize=True for that)."
                )
            raise UnsupportedModelError(reason)
    ffns = [layer.ffn for layer in layers if layer.ffn is not None]
    if not ffns:
        raise UnsupportedModelError(
            f"no decoder layer of {type(causal_lm).__name__} has an FFN; LoKI trains rows of its "
            "down-projection."
        )
    found = [(d.module, d.parameter) for ffn in ffns for d in ffn.projections]
    for shared in ([m for m, _ in found], [getattr(m, name, m) for m, name in found]):
        if len(set(map(id, shared))) < len(found):
            raise UnsupportedModelError(
                f"decoder layers of {type(causal_lm).__name__} share one FFN's weight, so a row "
                "has no layer of its own."
            )
    config = getattr(getattr(model, "module", model), "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has a prompt-learning adapter, whose virtual tokens the model "
            "inside knows nothing of; pass model.get_base_model() to leave it out."
        )
    return Structure(
        given=model,
        causal_lm=causal_lm,
        decoder=decoder,
        layers=tuple(stack),
        ffns=tuple(layer.ffn for layer in layers),
        hidden_size=text_config(causal_lm).hidden_size,
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
    return _mixes(type(module).forward)


@functools.lru_cache(maxsize=1024)  # 40 us, of every module, where there are a few functions
def _mixes(forward: Callable[..., Any]) -> bool:
    try:
        arguments = inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return False
    return not _MIXER_ARGUMENTS.isdisjoint(arguments)


def _find_layers(causal_lm: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The text model, and the name and list of its decoder layers.

    It is the innermost module around the token embedding that holds a list of modules with mixers
    inside: a vision or audio tower has no token embedding.
    """
    weight, embedding = embedding_weight(causal_lm), causal_lm.get_input_embeddings()
    # PEFT's wrapper of trained tokens gives another weight at every access
    name = next(
        (
            n
            for n, m in causal_lm.named_modules()
            if m is embedding or getattr(m, "weight", None) is weight
        ),
        "",
    )
    while name:
        name = name.rpartition(".")[0]
        tower = causal_lm.get_submodule(name)
        prefix = f"{name}." if name else ""
        stacks = list(_stacks(tower, prefix))
        if len(stacks) > 1:  # a vision or audio tower is a model of its own
            stacks = list(_stacks(tower, prefix, models=False))
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


def _stacks(
    module: nn.Module, prefix: str, *, models: bool = True
) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of modules that hold mixers; not those in ``models`` inside this one."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and any(
            is_mixer(part) for layer in child for part in layer.modules() if part is not layer
        ):
            yield prefix + name, child
        elif models or not isinstance(child, PreTrainedModel):
            yield from _stacks(child, f"{prefix}{name}.", models=models)


@dataclass(frozen=True)
class _Stack:
    """A parameter of three dimensions: the matrices of several experts."""

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module
    parameter: str
    shape: tuple[int, int, int]

    def feeders(self, hidden_size: int, axis: int, others: list[_Stack]) -> int:
        """How many stacks feed it, if its rows are along ``axis``; 0 where they cannot be.

        A stack of up-projections has the same layout, and as many experts or more (those that
        compute nothing have none).
        """
        inner = self.shape[3 - axis]
        if self.shape[axis] != hidden_size:
            return 0
        return sum(
            other is not self
            and other.shape[0] >= self.shape[0]
            and other.shape[3 - axis] == hidden_size
            and other.shape[axis] in (inner, 2 * inner)
            for other in others
        )


@dataclass
class _Branch:
    """What a decoder layer holds under one name outside its mixers.

    Attributes:
        name: dotted name in the model; the decoder layer's for what it holds directly.
        module: that; None for the latter.
        kind: its class.
        linears: every linear layer in it, as if it were a down-projection.
        stacks: matrices of experts in it.
        others: (dotted name, shape) of matrices in it that are neither's.
    """

    name: str
    module: nn.Module | None
    kind: str
    linears: list[DownProjection]
    stacks: list[_Stack]
    others: list[tuple[str, tuple[int, ...]]]

    def collect(
        self, module: nn.Module, prefix: str, owner: tuple[nn.Module, str] | None, *, deep: bool
    ) -> None:
        """Add what ``module``, which ``owner`` holds under a name, holds; mixers not entered."""
        # of rows, in a patched model
        trained: list[tuple[str, nn.Parameter]] = getattr(module, "trained_parameters", list)()
        for name, parameter in module.named_parameters(recurse=False):
            shape = full_shape(parameter)
            if sum(size > 1 for size in shape) < 2 or any(parameter is p for _, p in trained):
                continue
            if len(shape) == 3 and owner is not None:
                path = prefix.removesuffix(".")
                self.stacks.append(_Stack(path, *owner, module, name, shape))
            else:
                self.others.append((prefix + name, shape))
        for name, held in module.named_children():
            child = _without_wrappers(held)
            shape_of_linear = linear_shape(child)
            if shape_of_linear is not None:
                axis = shape_of_linear[2]
                self.linears.append(DownProjection(prefix + name, module, name, child, axis=axis))
            elif deep and not is_mixer(child):
                self.collect(child, f"{prefix}{name}.", (module, name), deep=True)

    def experts(self, hidden_size: int) -> list[DownProjection]:
        """The stacks that are experts' down-projections.

        Raises:
            UnsupportedModelError: if which dimension holds the rows is unknown.
        """
        found: dict[int, list[tuple[int, _Stack]]] = {1: [], 2: []}
        for axis, stacks in found.items():
            for stack in self.stacks:
                transposed = getattr(stack.module, "is_transposed", None)
                beside = [other for other in self.stacks if other.module is stack.module]
                others = beside if len(beside) > 1 else self.stacks  # or in a module each
                feeders = stack.feeders(hidden_size, axis, others)
                if feeders and transposed in (None, axis == 2):
                    stacks.append((feeders, stack))
        # Up-projections that are not gated, read as transposed, look as if the down-projection fed
        # them; where they are, two feed one.
        most = [max((feeders for feeders, _ in stacks), default=0) for stacks in found.values()]
        if most[0] and most[0] == most[1]:
            first = found[1][0][1]
            raise UnsupportedModelError(
                f"{first.name} ({type(first.module).__name__}) holds {first.parameter} "
                f"{list(first.shape)}, which may be the experts' up- or down-projection."
            )
        axis = 1 if most[0] > most[1] else 2
        return [
            DownProjection(x.name, x.parent, x.attribute, x.module, x.parameter, axis)
            for _, x in found[axis]
        ]


def _without_wrappers(module: nn.Module) -> nn.Module:
    """The experts inside PEFT's LoRA of their parameters, which has the features of a linear."""
    if not hasattr(module, "parameter_name") or not hasattr(module, "get_base_layer"):
        return module
    inner: nn.Module = module.get_base_layer()  # type: ignore[operator]
    return inner if linear_shape(inner) is None else module


def _branches(layer: nn.Module, layer_name: str) -> list[_Branch]:
    own = _Branch(layer_name, None, type(layer).__name__, [], [], [])
    own.collect(layer, f"{layer_name}.", None, deep=False)
    found = [own]
    for name, held in layer.named_children():
        child = _without_wrappers(held)
        if linear_shape(child) is None and not is_mixer(child):
            branch = _Branch(f"{layer_name}.{name}", child, type(child).__name__, [], [], [])
            branch.collect(child, f"{branch.name}.", (layer, name), deep=True)
            found.append(branch)
    return [branch for branch in found if branch.linears or branch.stacks or branch.others]


def _examine_layer(layer: nn.Module, layer_name: str, hidden_size: int) -> Layer:
    try:
        return Layer(layer_name, _find_ffn(layer, layer_name, hidden_size), None)
    except UnsupportedModelError as error:
        return Layer(layer_name, None, str(error))


def _find_ffn(layer: nn.Module, layer_name: str, hidden_size: int) -> FFN | None:
    """None of a mixer alone; UnsupportedModelError if something in the layer is not known."""
    while hasattr(layer, WRAPPED):  # accelerate puts an offloading one around a recomputing one
        layer = getattr(layer, WRAPPED)
    if hasattr(layer, "backward_pass"):
        raise UnsupportedModelError(
            f"{layer_name} ({type(layer).__name__}) is reversible and runs a backward pass of its "
            "own, which reaches no row while the rest is frozen."
        )
    branches = _branches(layer, layer_name)
    experts = {branch.name: branch.experts(hidden_size) for branch in branches}
    chosen = _choose(branches, experts, hidden_size)
    candidates = {name: endings(linears, hidden_size) for name, linears in chosen.items()}
    for branch in branches:
        own, stacks = candidates[branch.name], experts[branch.name]
        _refuse_unknown(branch, own, stacks, hidden_size, branches)
    ends = [b for b in branches if candidates[b.name] or experts[b.name]]
    if not ends and any(branch.linears for branch in branches):
        raise UnsupportedModelError(
            f"{layer_name} ({type(layer).__name__}) has no FFN down-projection: no linear outside "
            f"its mixers with out_features = hidden_size = {hidden_size} that another linear "
            f"feeds, in {', '.join(branch.name for branch in branches)}."
        )
    if not ends:
        return None
    projections = [d for b in ends for d in experts[b.name]]
    projections += [down for b in ends for down in candidates[b.name]]
    ffn = FFN(tuple(b.module for b in ends if b.module is not None), tuple(projections))
    if ffn.lone is not None or not ffn.nodes:
        ffn = replace(ffn, nodes=tuple(x.module for b in ends for x in candidates[b.name]))
    return ffn


def _choose(
    branches: list[_Branch], experts: dict[str, list[DownProjection]], hidden_size: int
) -> dict[str, list[DownProjection]]:
    """The linears of each branch that end an FFN.

    Beside a gated FFN, or experts, one that is not gated is none, such as Gemma-3n's low-rank
    residual and Gemma-4's per-layer input; nor is a narrower one beside a plain FFN. Where experts
    have another width than the model (Nemotron-H's latent ones), what leads out of them is one
    beside their shared expert's, however narrow.
    """
    linears = [linear for branch in branches for linear in branch.linears]
    found = {
        branch.name: [x for x in branch.linears if is_down(x, hidden_size, linears)]
        for branch in branches
    }
    latent = {b.name: found[b.name] for b in branches if b.stacks and not experts[b.name]}
    gated = {name: [x for x in own if is_gated(x, linears)] for name, own in found.items()}
    if any(experts.values()):
        return {n: gated[n] or (own if experts[n] else []) for n, own in found.items()} | latent
    if any(gated.values()):
        widest = max(x.in_features for own in gated.values() for x in own)
        return {
            n: own if any(x.in_features == widest for x in own) else [] for n, own in gated.items()
        } | latent
    widest = max((x.in_features for own in found.values() for x in own), default=0)
    return {n: [x for x in own if x.in_features == widest] for n, own in found.items()} | latent


def _refuse_unknown(
    branch: _Branch,
    own: list[DownProjection],
    stacks: list[DownProjection],
    hidden_size: int,
    branches: list[_Branch],
) -> None:
    """Raise UnsupportedModelError if a part of a branch that may be the FFN's is not known."""
    if len({id(x.parent) for x in own}) < len(own):
        raise UnsupportedModelError(
            f"{branch.name} ({branch.kind}) has {len(own)} linears that could be the FFN's "
            f"down-projection ({', '.join(linear.name for linear in own)}), and the output of "
            "none is known to be that of the module which holds them."
        )
    experts = {stack.shape[0] for stack in branch.stacks}
    experts.add(sum({id(stack.module): stack.shape[0] for stack in branch.stacks}.values()))
    for name, shape in branch.others:
        # a router has a row for each expert, a bias of the experts likewise
        routes = shape[0] in experts
        if hidden_size in shape and not routes and _has_mate(name, shape, hidden_size, branches):
            raise UnsupportedModelError(
                f"{branch.name} ({branch.kind}) holds {name} {list(shape)}, which is neither a "
                "linear layer's nor experts' that are known here."
            )
    # experts of the width that a linear leads out of
    latent = any(
        stack.feeders(x.in_features, axis, branch.stacks)
        for x in own
        for stack in branch.stacks
        for axis in (1, 2)
    )
    if branch.stacks and not stacks and not latent:
        first = branch.stacks[0]
        raise UnsupportedModelError(
            f"{branch.name} ({branch.kind}) holds {first.name}.{first.parameter} "
            f"{list(first.shape)}, but no experts' down-projection of {hidden_size} rows."
        )


def _has_mate(name: str, shape: tuple[int, ...], hidden_size: int, branches: list[_Branch]) -> bool:
    """Whether another matrix of the layer may feed one or be fed by it, by its inner width.

    Of Inkling-2's queries over earlier layers, ``[3, hidden_size]``, there is none.
    """
    own = {size for size in shape if size != hidden_size} or {hidden_size}
    widths = {size for b in branches for n, other in b.others if n != name for size in other}
    for branch in branches:
        widths.update(*(stack.shape[1:] for stack in branch.stacks))
        widths.update(*((x.in_features, x.out_features) for x in branch.linears))
    return any(a in (b, 2 * b) or b == 2 * a for a in own for b in widths)
