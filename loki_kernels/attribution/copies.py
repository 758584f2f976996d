"""Path points as copies of the prompt in a batch, through the model's own forward pass.

The engines for models that the staircase cannot run. *decode*: all but the last token go through an
ordinary cached prefill, and the copies are that cache, repeated, with the last token processed in
one step; what the model keeps (keys and values, a recurrent state, a convolution's window) is the
model's own affair. *reforward*: the copies are whole prompts, for models without such a cache. In
both a hook on each FFN puts the points of its layer in place, copy 0 stays as it is and has to give
the logits of the ordinary prompt, and one backward pass reaches all points.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from ..discovery import is_mixer
from ..errors import UnsupportedModelError
from ..head import check_logits
from ..options import EngineName
from ..placement import computed_if_it_fits, free_bytes
from ..structure import FFN, Structure, embedding_weight
from .definitions import PathIntegral
from .integration import guard_tolerance, integrate, relative_error, to_differentiate
from .path import path_points
from .prefill import Batch, keep_site
from .scores import Scores
from .steering import OUT_OF_PLACE, forget_lengths, hook_site, hooking, like, refusing, rerunning

# What the copies of a chunk may keep beside the model, their caches or their hidden states: where
# nothing tells what is free (a CPU), and of what is.
_BYTES_UNTOLD = 2**30
_SHARE_OF_FREE = 0.25
# Hidden states that a layer keeps of a token for its backward pass, roughly.
_STATES = 30


@dataclass(frozen=True)
class _Prompt:
    """One prompt where the model takes it, and all tokens of its answer but the last.

    Attributes:
        ids: int64 ``[1, T]``.
        media: images or sounds, by the model's own names.
        answer: int64 ``[n]``, the tokens to attribute; None for the one that the model predicts.
    """

    ids: Tensor
    media: Mapping[str, Tensor]
    answer: Tensor | None = None

    @classmethod
    def of(cls, structure: Structure, batch: Batch, sample: int) -> _Prompt:
        ids = batch.input_ids[sample : sample + 1, : int(batch.lengths[sample])]
        answer = None if batch.answers is None else batch.answers[sample].to(ids.device)
        more = 0 if answer is None else len(answer) - 1
        dtype = embedding_weight(structure.causal_lm).dtype
        media = {}
        for name, x in batch.media[sample].items():
            if x.shape == ids.shape:  # a number for each token: the answer is text
                x = functional.pad(x, (0, more))
            media[name] = x.to(ids.device, dtype if x.is_floating_point() else x.dtype)
        if answer is not None:
            ids = torch.cat([ids, answer[None, :-1]], dim=1)
        return cls(ids, media, answer)

    @property
    def tail(self) -> int:
        """The last token of the prompt and what follows it."""
        return 1 if self.answer is None else len(self.answer)

    @property
    def tail_positions(self) -> Tensor:
        """int64 ``[tail]``."""
        return torch.arange(self.length, device=self.ids.device)[-self.tail :]

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def earlier(self) -> _Prompt:
        """The tokens before the tail; of what has a number for each token likewise."""
        end = self.length - self.tail
        kept = {n: x[:, :end] if x.shape == self.ids.shape else x for n, x in self.media.items()}
        return _Prompt(self.ids[:, :end], kept)


@dataclass
class Copies:
    """Attributes one prompt after another, some layers at a time.

    Attributes:
        structure: the model.
        integral: what is integrated.
        cached: whether all but the last token come from a cache (*decode*).
        numbered: of which prompts the model is told the last token's position. Some count
            themselves: all prompts, or those with images, which Qwen-VL gives fewer positions than
            tokens (and without images it goes on as after the last one).
    """

    structure: Structure
    integral: PathIntegral
    cached: bool
    numbered: Literal["all", "text", "none"] = "text"
    _room: float = field(default=math.inf, init=False)  # bytes, half of what did not fit

    @property
    def name(self) -> EngineName:
        return "decode" if self.cached else "reforward"

    def attribute(self, batch: Batch) -> Scores:
        """Scores of every prompt and layer.

        Raises:
            UnsupportedModelError: if copy 0 does not reproduce the prompt's logits, or the model's
                code does not take the copies.
            ValueError: if the logits are NaN.
        """
        samples = []
        for i in range(len(batch.lengths)):
            samples.append(self._attribute_prompt(_Prompt.of(self.structure, batch, i)))
        return Scores.of_samples(samples)

    def _attribute_prompt(self, prompt: _Prompt) -> Scores:
        structure, nodes = self.structure, self.structure.present()
        calls = dict.fromkeys(nodes, 0)
        forget_lengths(structure)
        with refusing(structure, "its forward pass over the prompt"):
            starts = self._baseline(prompt)
            with hooking(_counting(nodes, calls)):
                (logits,) = self._run(prompt)
            for layer, count in calls.items():
                if count != 1:
                    raise UnsupportedModelError(
                        f"the FFN of layer {layer} of {type(structure.causal_lm).__name__} runs "
                        f"{count} times in one forward pass, so a node has no single value."
                    )
            cached = self.cached and prompt.length > prompt.tail
            cache = self._prefill(prompt) if cached else None
        check_logits(structure.causal_lm, logits)
        answer = logits.argmax(-1) if prompt.answer is None else prompt.answer.to(logits.device)
        left, parts = list(nodes), []
        each = self._bytes_of_a_copy(prompt.length, cache)
        count = self._layers_at_once(each)
        while left:
            layers = left[:count]
            compute = partial(self._attribute_layers, layers, prompt, cache, starts, logits, answer)
            # processes that share a model's weights stay in step
            halves = len(layers) > 1 and not structure.sharded
            what = f"{len(layers)} layers of a prompt of {prompt.length} tokens"
            scores = computed_if_it_fits(compute, what, halves=halves)
            if scores is None:
                count = len(layers) // 2
                self._room = each * (1 + count * len(self.integral.alphas))
            else:
                parts.append(scores)
                left = left[count:]
        return Scores.of_layers(parts)

    def _baseline(self, prompt: _Prompt) -> dict[int, Tensor] | None:
        """Layer -> ``[T, D]``, where the path starts; None for zero."""
        definition = self.integral.definition
        given = self.integral.given_starts(
            self.structure.present(), (prompt.length,), prompt.ids.device
        )
        if given is not None:
            return given
        if definition.baseline != "token_zero":
            return None
        kept: dict[int, Tensor] = {}
        with hooking(keep_site(self.structure, definition.site, kept)):
            self._run(_Prompt(torch.zeros_like(prompt.ids), {}))
        return {layer: x.reshape(prompt.length, -1) for layer, x in kept.items()}

    def _attribute_layers(
        self,
        layers: Sequence[int],
        prompt: _Prompt,
        cache: Any,
        starts: dict[int, Tensor] | None,
        logits: Tensor,
        answer: Tensor,
    ) -> Scores:
        """Of these layers, given the prompt's own ``logits`` ``[n, V]``."""
        structure, integral, m = self.structure, self.integral, len(self.integral.alphas)
        rows = 1 + len(layers) * m
        after = prompt.tail - 1  # tokens of the answer that follow the node
        tokens = prompt.tail if self.cached else prompt.length
        leaves: dict[int, Tensor] = {}
        ends: dict[int, Tensor] = {}

        def set_points(layer: int, first: int) -> Callable[[Tensor], Tensor]:
            def change(x: Tensor) -> Tensor:
                copies = x.reshape(rows, -1, x.shape[-1])  # [copies, tokens, D]
                if copies.shape[1] != tokens:  # ProphetNet's streams, CPM-Ant's prompt
                    raise UnsupportedModelError(
                        f"the FFN of layer {layer} of {type(structure.causal_lm).__name__} gives "
                        f"{copies.shape[1]} vectors for {tokens} tokens."
                    )
                end = copies.shape[1] - after
                begin = 0 if integral.definition.path == "sequence" else end - 1
                z = copies[0, begin:end].detach()  # [scaled, D]
                start = None if starts is None else starts[layer][-after - len(z) :][: len(z)]
                if layer not in leaves:  # not in a layer that is run again
                    points = path_points(z, integral.alphas, start).transpose(0, 1).contiguous()
                    ends[layer], leaves[layer] = z[-1:], points.requires_grad_()
                points = leaves[layer]
                ours = copies[first : first + m]
                ours = torch.cat([ours[:, :begin], points, ours[:, end:]], dim=1)
                return like(torch.cat([copies[:first], ours, copies[first + m :]]), x)

            return change

        nodes = structure.present()

        def hooks() -> Iterator[RemovableHandle]:
            for i, layer in enumerate(layers):
                yield from hook_site(
                    nodes[layer], integral.definition.site, set_points(layer, 1 + i * m)
                )
            yield from _check_mixers(structure)

        what = f"{rows} copies in its own forward pass"
        with refusing(structure, what), torch.enable_grad(), hooking(hooks()), _mutable(cache):
            got = self._step(prompt, cache, rows) if self.cached else self._run(prompt, rows)
            wide = torch.float64 if got.dtype == torch.float64 else torch.float32
            objectives = _objectives(got.to(wide), answer)
            objective = integral.definition.objective
            divided, left = to_differentiate(objectives, objective)
            gradients = torch.autograd.grad(divided[1:].sum(), [leaves[layer] for layer in layers])
        error = relative_error(got[0].detach(), logits)
        tolerance = guard_tolerance(logits.dtype, embedding_weight(structure.causal_lm).dtype)
        if error > tolerance:
            hint = "; engine='reforward' needs no cache" if self.cached else ""
            raise UnsupportedModelError(
                f"{type(structure.causal_lm).__name__}: a copy of the prompt "
                f"{'over its cache ' if self.cached else ''}gives other logits than the prompt "
                f"alone (relative error {error:.2g}, allowed {tolerance:.0e}){hint}."
            )
        return integrate(
            integral,
            objectives[objective].detach()[None],
            left[None],
            [gradient[None, :, -1] for gradient in gradients],
            [ends[layer] for layer in layers],
            None if starts is None else [starts[layer][-prompt.tail][None] for layer in layers],
            answer[:1],
        )

    def _run(self, prompt: _Prompt, rows: int = 1) -> Tensor:
        """Logits at the tail of copies of a prompt, without a cache: ``[rows, n, V]``."""
        media = {name: torch.cat([x] * rows) for name, x in prompt.media.items()}
        options: dict[str, Any] = {"use_cache": False, **media, **self._keeping(prompt)}
        ids = prompt.ids.expand(rows, -1)
        with rerunning(self.structure):
            output: Any = self.structure.run(input_ids=ids, **options)
        logits: Tensor = output.logits[:, -prompt.tail :]
        return logits

    def _keeping(self, prompt: _Prompt) -> dict[str, Tensor]:
        """What asks for the tail's logits alone, if the model can: of 32k tokens they take
        gigabytes. As places: with a number Gemma-4 computes its later layers at the tail alone."""
        if "logits_to_keep" not in self._arguments:
            return {}
        return {"logits_to_keep": prompt.tail_positions}

    def _prefill(self, prompt: _Prompt) -> Any:
        """The model's own cache of the tokens before the tail.

        Raises:
            UnsupportedModelError: if it returns none.
        """
        earlier = prompt.earlier()
        options: dict[str, Any] = {"use_cache": True, **earlier.media, **self._keeping(earlier)}
        output: Any = self.structure.run(input_ids=earlier.ids, **options)
        caches = (getattr(output, name, None) for name in _CACHES)
        cache = next((cache for cache in caches if cache is not None), None)
        if not hasattr(cache, "reorder_cache"):
            raise UnsupportedModelError(
                f"{type(self.structure.causal_lm).__name__} returns no cache that could "
                "be repeated."
            )
        return cache

    def _step(self, prompt: _Prompt, cache: Any, rows: int) -> Tensor:
        """Logits ``[rows, n, V]`` of the tail over ``rows`` copies of the cache."""
        options: dict[str, Any] = {"use_cache": True}
        if cache is not None:
            repeated = copy.deepcopy(cache)
            repeated.reorder_cache(torch.zeros(rows, dtype=torch.long, device=prompt.ids.device))
            options[next(name for name in _CACHES if name in self._arguments)] = repeated
        numbered = self.numbered == "all" or (self.numbered == "text" and not prompt.media)
        if numbered and "position_ids" in self._arguments:
            options["position_ids"] = prompt.tail_positions.expand(rows, -1)
        tail = prompt.ids[:, -prompt.tail :].expand(rows, -1)
        with rerunning(self.structure):
            output: Any = self.structure.run(input_ids=tail, **options)
        logits: Tensor = output.logits
        return logits

    @property
    def _arguments(self) -> Any:
        return inspect.signature(type(self.structure.causal_lm).forward).parameters

    def _bytes_of_a_copy(self, tokens: int, cache: Any) -> int:
        """What a copy of a prompt keeps beside the model."""
        weight = embedding_weight(self.structure.causal_lm)
        states = _STATES * len(self.structure.layers) * self.structure.hidden_size
        return weight.element_size() * states * (1 if self.cached else tokens) + _size(cache)

    def _layers_at_once(self, each: int) -> int:
        """As many as there is room for the copies of."""
        device = self.structure.device
        # of a sharded model the same in all processes
        free = None if self.structure.sharded else free_bytes(device)
        room = _BYTES_UNTOLD if free is None else _SHARE_OF_FREE * free
        copies = int(min(room, self._room)) // each
        return max(1, (copies - 1) // len(self.integral.alphas))


# What transformers calls a cache, in arguments and outputs.
_CACHES = ("cache", "past_key_values", "cache_params")


@contextlib.contextmanager
def _mutable(cache: Any) -> Iterator[None]:
    """Where a recurrent state may be written in place, also in the step that is differentiated."""
    layers = [] if cache is None else getattr(cache, "layers", [None])
    if all(type(layer) in OUT_OF_PLACE for layer in layers):
        yield
        return
    with torch.autograd.graph.allow_mutation_on_saved_tensors() as saved:
        saved.original = _Kept()
        yield


class _Kept(weakref.WeakKeyDictionary[Any, Tensor]):
    """What torch's context keeps of saved tensors, none of which it frees before its end.

    It tells saved tensors apart by Python's id, address and version (torch 2.11 to 2.13), and frees
    what it has cloned before a write: a later tensor in that place is taken for it, and its
    gradient is of other values, or fails for their shape. Of a product that is saved and then
    written, 30 times over, 9 of 20 gradients were wrong (`tests/attribution/test_engines.py`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.freed: list[Tensor] = []

    def __delitem__(self, key: Any) -> None:
        self.freed.append(self[key])
        super().__delitem__(key)


def _size(cache: Any) -> int:
    """Bytes of the tensors that a copy of a prompt's cache takes."""
    total = 0
    for layer in getattr(cache, "layers", []):
        # Of a state that is written in place the backward pass keeps some three more.
        times = 1 if type(layer) in OUT_OF_PLACE else 4
        for value in vars(layer).values():
            if isinstance(value, dict):  # a layer's several states, by number
                value = list(value.values())
            held = value if isinstance(value, (list, tuple)) else [value]
            total += times * sum(x.nbytes for x in held if isinstance(x, Tensor))
    return total


def _objectives(logits: Tensor, answer: Tensor) -> dict[str, Tensor]:
    """Each objective of the answer ``[n]``, ``[copies]``, of logits ``[copies, n, V]``."""
    index = answer.expand(len(logits), -1)[..., None]
    own = logits.gather(-1, index)
    # by log-odds: a logit less the normaliser keeps no digits of 1 - p = 1e-6
    others = logits.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
    log_probability = -functional.softplus(others - own).sum((1, 2))
    return {
        "logit": own.sum((1, 2)),
        "log_probability": log_probability,
        "probability": log_probability.exp(),
    }


def _counting(nodes: dict[int, FFN], calls: dict[int, int]) -> Iterator[RemovableHandle]:
    """Register hooks that count how often each layer's FFN runs."""

    def count(layer: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[layer] += 1

        return hook

    for layer, ffn in nodes.items():
        yield ffn.nodes[0].register_forward_hook(count(layer))


def _check_mixers(structure: Structure) -> Iterator[RemovableHandle]:
    """Register hooks that raise where a module that mixes tokens drops the gradient.

    Fused kernels for one token, where they are installed, may have no backward pass, and some say
    nothing.
    """

    def check(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given = [*args, *kwargs.values()]
        result = list(output) if isinstance(output, (tuple, list)) else [output]
        tensors = [x for x in result if isinstance(x, Tensor) and x.is_floating_point()]
        wanted = any(isinstance(x, Tensor) and x.requires_grad for x in given)
        if wanted and tensors and not any(x.requires_grad for x in tensors):
            raise UnsupportedModelError(
                f"{type(module).__name__} gives no gradient of what it is given; a fused kernel "
                "without a backward pass (mamba_ssm, causal_conv1d, fla) may be installed."
            )

    for layer in structure.layers:
        for module in _outermost_mixers(layer):
            yield module.register_forward_hook(check, with_kwargs=True)


def _outermost_mixers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if is_mixer(child):
            yield child
        else:
            yield from _outermost_mixers(child)
