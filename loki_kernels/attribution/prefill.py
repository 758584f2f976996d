"""One ordinary forward pass over the prompts, and what an attribution keeps of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from ..errors import UnsupportedModelError
from ..structure import Structure
from .definitions import PathIntegral
from .steering import hook_layer_input, hook_site, hooking, refusing

# layer_idx -> keys and values
Prefix = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Batch:
    """Prompts, right-padded to the longest: causal attention keeps the padding out of the rest.

    Attributes:
        input_ids: int64 ``[B, T]``.
        lengths: int64 ``[B]``.
        answers: int64 ``[n]`` of each prompt, the tokens to attribute; None for the one that the
            model predicts.
        media: images or sounds of each prompt, by the model's own names.
        contrast: like ``answers``; their attribution is subtracted.
    """

    input_ids: Tensor
    lengths: Tensor
    answers: Sequence[Tensor] | None = None
    media: Sequence[Mapping[str, Tensor]] = ()
    contrast: Sequence[Tensor] | None = None

    @property
    def target(self) -> Tensor | None:
        """int64 ``[B]``, the first token of each answer."""
        return None if self.answers is None else torch.stack([x[0] for x in self.answers])

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device)[None]

    @functools.cached_property  # asked for at every layer
    def last(self) -> Tensor:
        """``[B]``, the position of each sample's last token."""
        return self.lengths - 1

    @functools.cached_property
    def _samples(self) -> Tensor:
        return torch.arange(len(self.lengths), device=self.lengths.device)

    def at_last(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` at each sample's last token."""
        return x[self._samples.to(x.device), self.last.to(x.device)]


@dataclass(frozen=True)
class Prefill:
    """What the path's points need from one ordinary forward pass, the model's own.

    Attributes:
        logits: ``[B, V]``, at the last token.
        target: int64 ``[B]``, the tokens to attribute.
        layer_inputs: L of ``[B, hidden_size]``, at the last token.
        prefix: layer_idx -> keys and values ``[B, Hkv, T, d]``.
        start: layer -> ``[B, T, D]``, where the path starts at every position; None for zero.
    """

    logits: Tensor
    target: Tensor
    layer_inputs: list[Tensor]
    prefix: Prefix
    start: dict[int, Tensor] | None


def run_prefill(structure: Structure, batch: Batch, integral: PathIntegral) -> Prefill:
    """The ordinary forward pass, and the baseline's where the definition has one.

    The attention is the model's own, its keys and values come from its cache: what the points are
    compared with is the model itself, but for what `find_fusion` has compared. Whether the logits
    are numbers is left to what compares: to ask here would be to wait until the device has done all
    of the pass.

    Raises:
        UnsupportedModelError: if the layers run more than once, or there are no keys and values to
            keep.
    """
    samples, tokens = shape = batch.input_ids.shape
    start = integral.given_starts(structure.present(), shape, batch.input_ids.device)
    definition = integral.definition
    if definition.baseline == "token_zero":
        start = {}
        blank = torch.zeros_like(batch.input_ids)
        native_forward(structure, blank, batch, keep_site(structure, definition.site, start))
        start = {layer: x.reshape(samples, tokens, -1) for layer, x in start.items()}
    layer_inputs: list[Tensor] = []

    def keep_last(hidden: Tensor) -> Tensor:
        layer_inputs.append(batch.at_last(hidden))
        return hidden

    def hooks() -> Iterator[RemovableHandle]:
        for layer in structure.layers:
            yield hook_layer_input(layer, keep_last)

    logits, prefix = native_forward(structure, batch.input_ids, batch, hooks())
    name = type(structure.causal_lm).__name__
    if len(layer_inputs) != len(structure.layers):
        raise UnsupportedModelError(
            f"{name} runs its {len(structure.layers)} decoder layers {len(layer_inputs)} times in "
            "one forward pass, so a node has no single value."
        )
    target = logits.argmax(-1) if batch.target is None else batch.target.to(logits.device)
    return Prefill(logits, target, layer_inputs, prefix, start)


def native_forward(
    structure: Structure, input_ids: Tensor, batch: Batch, handles: Iterable[RemovableHandle]
) -> tuple[Tensor, Prefix]:
    """Logits ``[B, V]`` at each sample's last token, and every layer's keys and values.

    ``handles`` registers hooks, which are gone afterwards.

    Raises:
        UnsupportedModelError: if the model does not run on tokens alone, or keeps something else.
    """
    model = structure.causal_lm
    head = model.get_output_embeddings()

    def hooks() -> Iterator[RemovableHandle]:
        yield from handles
        yield head.register_forward_pre_hook(lambda _m, args: (batch.at_last(args[0])[:, None],))

    cache = DynamicCache()  # without a config: every layer keeps all tokens
    arguments = inspect.signature(type(model).forward).parameters
    named = {"cache" if "cache" in arguments else "past_key_values": cache}
    with hooking(hooks()), refusing(structure, "its forward pass over the prompt"):
        output = structure.run(
            input_ids=input_ids, position_ids=batch.positions, use_cache=True, **named
        )
        logits: Tensor = output.logits[:, 0]
        return logits, _keys_and_values(structure, cache, input_ids.shape[1])


def _keys_and_values(structure: Structure, cache: DynamicCache, tokens: int) -> Prefix:
    name = type(structure.causal_lm).__name__
    prefix: Prefix = {}
    for i, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4 or keys.shape[2] != tokens:
            raise UnsupportedModelError(
                f"layer {i} of {name} keeps no keys and values of every token; the staircase "
                "needs attention in every layer."
            )
        prefix[i] = keys, values
    if not prefix:
        raise UnsupportedModelError(
            f"{name} puts no keys and values into its cache, so they cannot be captured."
        )
    return prefix


def keep_site(
    structure: Structure, site: str, kept: dict[int, Tensor]
) -> Iterator[RemovableHandle]:
    """Register hooks that leave every layer's attributed activation in ``kept``.

    Copies, since some layers (Falcon's, Llama 4's) add to it in place.
    """

    def keep(layer: int) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            kept[layer] = x.clone()
            return x

        return change

    for layer, ffn in structure.present().items():
        yield from hook_site(ffn, site, keep(layer))
