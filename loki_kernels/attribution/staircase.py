"""All layers and path points of a batch in one growing forward and one backward pass.

Scaling a node at the last token changes nothing at earlier positions, and nothing below its layer.
So after one ordinary prefill every (layer, path point) is a single token over a frozen key/value
prefix that differs from the unperturbed last token only from its layer on: points join the batch at
their layer, and one backward pass from the head reaches them all.

The model's own modules do the work, steered by hooks: a pre-hook on each decoder layer appends that
layer's points, a hook on its down-projection puts their values in place, and an attention
implementation registered with transformers attends to the prefix.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedModelError
from ..head import Head, check_logits
from ..ops import shared_prefix_attention, target_probability
from ..structure import Structure
from .definitions import PathIntegral
from .integration import guard_tolerance, integrate, relative_error, to_differentiate
from .path import path_points, steps_for
from .prefill import Batch, Prefill, Prefix
from .scores import Scores
from .steering import (
    Attend,
    for_all,
    hook_layer_input,
    hook_site,
    like,
    refusing,
    rerunning,
    steered,
)


@dataclass(frozen=True)
class _Trace:
    """What the hooks leave while the points run.

    Attributes:
        leaves: layer -> ``[B, m, D]``, its points' values.
        starts: layer -> the baseline ``[B, D]``; empty where paths start at zero.
        ends: layer -> z ``[B, D]``.
        layer_inputs: L of ``[B, hidden_size]``, the unperturbed point's.
    """

    leaves: dict[int, Tensor] = field(default_factory=dict)
    starts: dict[int, Tensor] = field(default_factory=dict)
    ends: dict[int, Tensor] = field(default_factory=dict)
    layer_inputs: list[Tensor] = field(default_factory=list)


@dataclass
class Staircase:
    """Attributes one batch, some layers at a time.

    Point 0 is the last token unperturbed; every layer that is attributed adds m points.
    """

    structure: Structure
    batch: Batch
    prefill: Prefill
    integral: PathIntegral
    head: Head = field(init=False)

    def __post_init__(self) -> None:
        self.head = self.structure.head()

    def run(self, layers: Sequence[int], prefix: Prefix) -> Scores:
        """Scores of ``layers`` (the others stay unperturbed).

        Args:
            layers: those to attribute.
            prefix: like `Prefill.prefix`; on the sequence path one a point instead of a sample,
                ``[B * N, Hkv, T, d]``, sample-major.

        Raises:
            UnsupportedModelError: if the unperturbed point does not reproduce the prefill, or the
                model's code does not take the points.
            ValueError: if the prefill's logits are NaN.
        """
        longest = self.batch.input_ids.shape[1] - 1
        prefix = {
            i: (k.narrow(2, 0, longest), v.narrow(2, 0, longest)) for i, (k, v) in prefix.items()
        }
        trace = _Trace()
        try:
            with (
                refusing(self.structure, "the last token alone over the prompt's keys and values"),
                torch.enable_grad(),
                rerunning(self.structure),
                steered(self.structure, self._attend(prefix), self._hook(layers, trace)),
            ):
                hidden, values, left, gradients = self._differentiate(layers, trace)
        except UnsupportedModelError:
            check_logits(self.structure.causal_lm, self.prefill.logits)  # NaN can be why
            raise
        self.structure.gather()  # the backward pass has put the head away
        ends = [trace.ends[layer] for layer in layers]
        starts = [trace.starts[layer] for layer in layers] if trace.starts else None
        target = self.prefill.target
        scores = integrate(self.integral, values, left, gradients, ends, starts, target)
        self._guard(hidden, trace.layer_inputs)  # waits for the device, which now has all its work
        return scores

    def _hook(self, layers: Sequence[int], trace: _Trace) -> Iterator[RemovableHandle]:
        """Register the hooks that make the decoder run the points of ``layers``."""
        structure, m = self.structure, len(self.integral.alphas)
        samples = self.batch.input_ids.shape[0]
        # One copy to a device: one a layer was 32, each a call of the driver that moves 56 bytes.
        steps: dict[tuple[torch.device, torch.dtype], Tensor] = {}

        def append_points(layer: int) -> Callable[[Tensor], Tensor]:
            def change(hidden: Tensor) -> Tensor:
                trace.layer_inputs.append(hidden[:, 0].detach())
                if layer not in layers:
                    return hidden
                return torch.cat([hidden, hidden[:, :1].detach().expand(-1, m, -1)], dim=1)

            return change

        def set_points(layer: int) -> Callable[[Tensor], Tensor]:
            def change(x: Tensor) -> Tensor:
                points = x.view(samples, -1, x.shape[-1])
                if layer not in trace.leaves:  # not in a layer that is run again
                    trace.ends[layer] = z = points[:, 0].detach()
                    kind = z.device, z.dtype
                    if kind not in steps:
                        steps[kind] = steps_for(z, self.integral.alphas)
                    if self.prefill.start is not None:
                        trace.starts[layer] = self.batch.at_last(self.prefill.start[layer])
                    path = path_points(z, steps[kind], trace.starts.get(layer))
                    trace.leaves[layer] = path.requires_grad_()
                return like(torch.cat([points[:, :-m], trace.leaves[layer]], dim=1), x)

            return change

        site, nodes = self.integral.definition.site, structure.present()
        for i, layer in enumerate(structure.layers):
            yield hook_layer_input(layer, append_points(i))
        for i in layers:
            yield from hook_site(nodes[i], site, set_points(i))

    def _attend(self, prefix: Prefix) -> Attend:
        """All points of a sample over one prefix; on the sequence path each over its own."""
        each = self.integral.definition.path == "sequence"
        shared = len(prefix) < len(self.structure.layers)  # layers attend to an earlier one's
        given: dict[int, weakref.ref[Tensor]] = {}  # each layer's own keys

        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None,
            **options: Any,
        ) -> Tensor:
            layer: int = module.layer_idx  # type: ignore[assignment]
            if layer not in prefix:
                layer = next((donor for donor, keys in given.items() if keys() is key), layer)
            elif shared:
                given[layer] = weakref.ref(key)
            prefix_k, prefix_v = prefix[layer]
            lengths = self.batch.last.to(query.device)
            width, points = value.shape[-1], query.shape[2]
            query, key, value, prefix_k, prefix_v = _of_one_width(
                query, for_all(key, points, 2), for_all(value, points, 2), prefix_k, prefix_v
            )
            if not each:
                output = shared_prefix_attention(
                    query, key, value, prefix_k, prefix_v, lengths, **options
                )
                return output[..., :width]
            samples, heads, _, dim = query.shape
            q, k, v = (
                x.transpose(1, 2).reshape(samples * points, x.shape[1], 1, dim)
                for x in (query, key, value)
            )
            lengths = lengths.repeat_interleave(points)
            output = shared_prefix_attention(q, k, v, prefix_k, prefix_v, lengths, **options)
            return output.view(samples, points, heads, dim).transpose(1, 2)[..., :width]

        return attend

    def _differentiate(
        self, layers: Sequence[int], trace: _Trace
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """All points forward, and back to the leaves; ``torch.compile`` takes it whole.

        Returns:
            The unperturbed point's last hidden state ``[B, hidden_size]``, the objective of each
            point and what `to_differentiate` divides it by ``[B, 1 + len(layers) * m]``, and the
            gradients at each layer's leaves ``[B, m, D]``, divided by the latter.
        """
        batch, head = self.batch, self.head
        hidden = self.structure.run_decoder(
            input_ids=batch.at_last(batch.input_ids)[:, None],
            position_ids=batch.last[:, None],
        )  # [B, 1 + len(layers) * m, hidden_size]
        samples, points, width = hidden.shape
        rows = hidden.reshape(samples * points, width).to(head.weight.device)
        target = self.prefill.target.repeat_interleave(points).to(head.weight.device)
        objective = self.integral.definition.objective
        if objective == "logit":
            objectives = {"logit": head.logit(rows, target)}
        else:
            objectives = target_probability(
                rows,
                head.weight,
                target,
                head.bias,
                softcap=head.softcap,
                logit_scale=head.scale,
            )._asdict()
        divided, left = to_differentiate(objectives, objective)
        gradients = torch.autograd.grad(
            divided.view(samples, points)[:, 1:].sum(),
            [trace.leaves[layer] for layer in layers],
        )
        trace.leaves.clear()
        values, left = (x.detach().view(samples, points) for x in (objectives[objective], left))
        return hidden[:, 0].detach(), values, left, gradients

    def _guard(self, hidden: Tensor, layer_inputs: list[Tensor]) -> None:
        """The unperturbed point must reproduce the prefill, or the model is refused.

        Raises:
            UnsupportedModelError: if it does not.
            ValueError: if the prefill's logits are NaN.
        """
        tolerance = guard_tolerance(hidden.dtype)
        error = relative_error(self.head.logits(hidden), self.prefill.logits)
        if error <= tolerance:
            return
        check_logits(self.structure.causal_lm, self.prefill.logits)
        name = type(self.structure.causal_lm).__name__
        pairs = itertools.pairwise(
            relative_error(got, want)
            for got, want in zip(layer_inputs, self.prefill.layer_inputs, strict=True)
        )
        for layer, (before, after) in enumerate(pairs):
            if after > tolerance >= before:
                raise UnsupportedModelError(
                    f"{name}: the last token processed alone over the prompt's keys and values "
                    f"differs from the whole prompt after layer {layer} (relative error "
                    f"{after:.2g}, allowed {tolerance:.0e}). The layer mixes tokens outside "
                    "attention, or attends in a way this library does not know."
                )
        raise UnsupportedModelError(
            f"{name}: the last token processed alone over the prompt's keys and values gives "
            f"other logits than the whole prompt (relative error {error:.2g}, "
            f"allowed {tolerance:.0e}), from the last layer or the output head on."
        )


def _of_one_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values ``[..., d]`` filled up with zeros to the widest.

    In multi-head latent attention values are narrower than keys. Zeros add nothing to a product,
    and the columns that they add to the output are cut off.
    """
    widest = max(x.shape[-1] for x in tensors)
    return tuple(
        x if x.shape[-1] == widest else functional.pad(x, (0, widest - x.shape[-1]))
        for x in tensors
    )
