"""Scores by naive re-forwards, knowing the families by the names that transformers gives things.

Nothing here comes from the library: the decoder layers, the FFN and its down-projections are found
by attribute names, and each layer's gradients take a forward of the whole model of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

# Lists of decoder layers, and words in the name of a list that is not the text decoder's.
_STACKS = ("layers", "h", "blocks", "block", "layer", "decoder_layers", "ffns")
_OTHER_TOWERS = (
    "vis", "audio", "image", "codec", "vq", "speech", "qformer", "acoustic", "semantic",
    "patcher", "aligner", "adapter", "projector", "connector", "resampler", "talker", "code2wav",
    "token2wav", "mtp", "protein",
)  # fmt: skip

# What a layer calls its FFN. Several of these in one layer are summed.
_BRANCHES = (
    "mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp", "mlps", "experts", "ff",
    "mlp_block", "shared_transf.feed_forward", "shared_transformer.feed_forward",
)  # fmt: skip
# Where the FFN's last matrix lies in the layer itself, or in a module that adds the residual.
_LOOSE = (
    "fc2", "lin2", "output.dense", "feed_forward.output.dense", "layer.2.DenseReluDense.wo",
)  # fmt: skip
# What transformers calls the matrix that an FFN or an expert ends with.
_DOWN = (
    "down_proj", "w2", "fc2", "c_proj", "fc_out", "dense_4h_to_h", "wo", "Wo", "output_linear",
    "w_out", "layer_2", "lin2", "linear2", "proj_out", "value", "output", "proj_down", "2",
    "post_expert_proj",
)  # fmt: skip

_PLAIN = (nn.Linear, FalconLinear, Conv1D)


class NoReference(Exception):
    """This model has no node that a layer's scores could belong to; the library has to refuse."""


@dataclass(frozen=True)
class Site:
    """One decoder layer and its FFN.

    Attributes:
        layer: its name in the model.
        nodes: the names of the modules whose outputs, added up, are attributed: the lone
            down-projection, or the whole branch where it has several (experts); several branches
            where the layer adds them up. Empty without an FFN.
        weights: the down-projections in the state dict, with the axis that the rows are along.
        width: how many rows they have.
        branches: the names of the modules that are the FFN.
    """

    layer: str
    nodes: tuple[str, ...]
    weights: tuple[tuple[str, int], ...]
    width: int
    branches: tuple[str, ...]


def find_layers(model: nn.Module) -> list[Site]:
    """Every layer of the text decoder."""
    stacks = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if not isinstance(module, nn.ModuleList) or parts[-1] not in _STACKS or not len(module):
            continue
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if not inside and not any(word in name for word in _OTHER_TOWERS):
            stacks[name] = module
    if len(stacks) > 1:  # an encoder beside a decoder
        decoders = [name for name in stacks if "encoder" not in name]
        decoders = decoders or [name for name in stacks if "decoder" in name] or list(stacks)
        stacks = {name: stacks[name] for name in decoders}
    if not stacks:
        raise LookupError("no list of decoder layers has a name that is known here")
    width = _hidden_size(model)
    return [
        _site(f"{name}.{i}", layer, width)
        for name, stack in stacks.items()
        for i, layer in enumerate(stack)
    ]


def _hidden_size(model: nn.Module) -> int:
    config = model.config.get_text_config(decoder=True)
    for name in ("hidden_size", "d_model", "n_embd", "emb_dim", "embed_dim"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return int(model.get_input_embeddings().weight.shape[1])


def _site(name: str, layer: nn.Module, width: int) -> Site:
    for loose in _LOOSE:
        if _has(layer, loose):
            return Site(name, (f"{name}.{loose}",), ((f"{name}.{loose}.weight", 0),), width, ())
    branches = [branch for branch in _BRANCHES if _has(layer, branch)]
    mixer = getattr(layer, "mixer", None)
    if type(mixer).__name__.endswith(("MLP", "MoE")):  # a layer of NemotronH is one or the other
        branches.append("mixer")
    nodes: list[str] = []
    weights: list[tuple[str, int]] = []
    for branch in branches:
        found = list(_down_weights(layer.get_submodule(branch), width, f"{name}.{branch}"))
        nodes += [node for node, _, _ in found]
        weights += [(weight, axis) for _, weight, axis in found]
    names = tuple(f"{name}.{branch}" for branch in branches)
    lone = len(branches) == len(nodes) == 1
    if lone and type(layer.get_submodule(nodes[0][len(name) + 1 :])) in _PLAIN:
        return Site(name, (nodes[0],), tuple(weights), width, names)
    return Site(name, names, tuple(weights), width, names)


def _has(layer: nn.Module, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True


def _down_weights(branch: nn.Module, width: int, prefix: str) -> Iterator[tuple[str, str, int]]:
    """(module, parameter, axis of the rows) of everything named like a down-projection."""
    for name, parameter in branch.named_parameters():
        path = name.removesuffix(".weight").split(".")
        if parameter.ndim < 2 or path[-1] not in _DOWN or "gate" in path:  # Zaya's router
            continue
        if name.endswith(".weight"):
            module = branch.get_submodule(name.removesuffix(".weight"))
            axis = 0 if isinstance(module, nn.Linear) else parameter.shape.index(width)
            yield f"{prefix}.{name.removesuffix('.weight')}", f"{prefix}.{name}", axis
        elif width in parameter.shape:  # experts in one tensor; MuseSpark's are narrower
            yield prefix, f"{prefix}.{name}", parameter.shape.index(width)


def reference_scores(model: nn.Module, ids: Tensor, points: int) -> dict[int, Tensor]:
    """The ``published`` scores ``[D]`` of one prompt ``[T]``, by the layers that have an FFN.

    Raises:
        NoReference: if the model does not run on tokens alone, or a layer's FFN has no single node.
    """
    sites = {i: site for i, site in enumerate(find_layers(model)) if site.nodes}
    if not sites:
        raise NoReference("no layer has an FFN")
    logits, calls = _record(model, ids, [node for site in sites.values() for node in site.nodes])
    token = int(logits.argmax())
    scores = {}
    for layer, site in sites.items():
        z = torch.zeros(())
        for node in site.nodes:
            if len(calls.get(node, ())) != 1:
                raise NoReference(f"{node} is called {len(calls.get(node, ()))} times")
            output = calls[node][0]
            if output.numel() != len(ids) * output.shape[-1]:
                raise NoReference(f"{node} gives {tuple(output.shape)} for {len(ids)} tokens")
            z = z + _by_token(output, 1, len(ids))[0, -1]
        modules = [model.get_submodule(node) for node in site.nodes]
        if len(modules) > 1:
            got = _replaced(model, modules, ids, z[None])
            if not torch.allclose(got[0], logits, rtol=1e-4, atol=1e-4):
                raise NoReference(f"{site.layer} does more than add up {' and '.join(site.nodes)}")
        scores[layer] = _scores(model, modules, ids, z, token, points)
    return scores


def layers_that_run(model: nn.Module, ids: Tensor) -> list[bool]:
    """For every layer, whether a prompt of tokens passes its FFN; Mllama leaves some out.

    Raises:
        NoReference: if the model does not run on tokens alone.
    """
    sites = find_layers(model)
    first = [site.nodes[0] if site.weights else None for site in sites]
    _, calls = _record(model, ids, [name for name in first if name])
    return [name in calls for name in first]


def _record(
    model: nn.Module, ids: Tensor, names: Sequence[str]
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The last token's logits ``[V]``, and by name what a module gave at each of its calls."""
    calls: dict[str, list[Tensor]] = {}

    def keep(name: str, output: Any) -> None:
        # a copy, since some layers (Falcon, Llama 4) add to it in place
        calls.setdefault(name, []).append(_first(output).clone())

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, output, name=name: keep(name, output)
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            return model(input_ids=ids[None], use_cache=False).logits[0, -1], calls
    except Exception as error:
        raise NoReference(f"it does not run on tokens alone: {error}") from error
    finally:
        for handle in handles:
            handle.remove()


def _scores(
    model: nn.Module, nodes: list[nn.Module], ids: Tensor, z: Tensor, token: int, points: int
) -> Tensor:
    steps = torch.arange(points) / points
    path = (steps[:, None] * z).requires_grad_()  # [m, D], the left rule from zero
    with torch.enable_grad():
        value = _replaced(model, nodes, ids, path).float().softmax(-1)[:, token]
        (gradient,) = torch.autograd.grad(value.sum(), path, allow_unused=True)
    if gradient is None or not gradient.any():
        raise NoReference("no gradient reaches the FFN")
    return (gradient.mean(0) * z).detach()


def _replaced(model: nn.Module, nodes: list[nn.Module], ids: Tensor, last: Tensor) -> Tensor:
    """The last token's logits ``[m, V]`` where the nodes add up to ``last`` ``[m, D]`` there."""
    points = len(last)
    called: list[nn.Module] = []

    def replace(module: nn.Module, _inputs: Any, output: Any) -> Any:
        x = _first(output)
        called.append(module)
        new = last if len(called) == len(nodes) else torch.zeros_like(last)
        tokens = _by_token(x, points, len(ids))
        tokens = torch.cat([tokens[:, :-1], new[:, None]], dim=1)
        if x.shape[:2] == (len(ids), points):
            tokens = tokens.transpose(0, 1)
        x = tokens.reshape(x.shape)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handles = [node.register_forward_hook(replace) for node in nodes]
    try:
        logits: Tensor = model(input_ids=ids.expand(points, -1), use_cache=False).logits
        return logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _by_token(x: Tensor, batch: int, length: int) -> Tensor:
    """``[B, T, D]`` of what a node gives: that, ``[B * T, D]``, or ``[T, B, D]`` (XLNet)."""
    if x.shape[:2] == (length, batch):
        return x.transpose(0, 1)
    return x.reshape(batch, length, -1)
