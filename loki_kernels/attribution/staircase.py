"""All layers and path points of a batch in one growing forward and one backward pass.

Scaling a node at the last token changes nothing at earlier positions, and nothing below its layer.
So after one ordinary prefill every (layer, path point) is a single token row over a frozen
key/value prefix that differs from the unperturbed last token only from its layer on: rows join the
batch at their layer, and one backward pass from the head reaches them all.

The model's own modules do the work, steered by hooks: a pre-hook on each decoder layer appends that
layer's rows, a hook on its down-projection puts path points in their place, and an attention
implementation registered with transformers attends to the prefix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..ops import (
    count_lowest_integrated,
    expand_path,
    integrate_path,
    shared_prefix_attention,
    target_probability,
)
from ..structure import Head, Structure
from .definitions import Definition
from .prefill import Batch, Prefill
from .scores import Counter, Scores
from .steering import Attend, hook_layer, hook_site, running

# Largest relative difference allowed between the unperturbed row's logits and the prefill's: the
# same numbers through products of another shape. Measured on SmolLM2-135M: 2e-6 (float32),
# 1e-2 (bfloat16).
_GUARD_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 8e-2,
}


class _Rows(NamedTuple):
    """What the hooks leave while the rows run."""

    points: dict[int, Tensor]  # layer -> [B, m, D], the leaves
    ends: dict[int, Tensor]  # layer -> z [B, D]
    layer_inputs: list[Tensor]  # L of [B, hidden_size], the unperturbed row's


class RowPass:
    """Attributes one batch, some layers at a time.

    Args:
        prefix: like `Prefill.prefix`; with ``per_row`` one prefix a row instead of a sample,
            ``[B * R, Hkv, T, d]``, sample-major.
        baseline: L of ``[B, D]``, the path's start at the last token, or None for zero.
        counter: counts the scores instead of keeping them.
    """

    def __init__(
        self,
        structure: Structure,
        batch: Batch,
        prefill: Prefill,
        target: Tensor,
        definition: Definition,
        alphas: Tensor,
        weights: Tensor,
        baseline: list[Tensor] | None,
        counter: Counter | None,
    ) -> None:
        self.structure = structure
        self.batch = batch
        self.prefill = prefill
        self.target = target
        self.definition = definition
        self.alphas = alphas
        self.weights = weights
        self.baseline = baseline
        self.counter = counter
        self.head: Head = structure.head()

    def run(
        self,
        layers: range,
        prefix: dict[int, tuple[Tensor, Tensor]],
        *,
        per_row: bool = False,
    ) -> Scores:
        """Scores of ``layers`` (the others stay unperturbed)."""
        longest = self.batch.input_ids.shape[1] - 1
        prefix = {i: (k[:, :, :longest], v[:, :, :longest]) for i, (k, v) in prefix.items()}
        rows = _Rows({}, {}, [])
        attend, handles = self._steer(layers, prefix, per_row, rows)
        with torch.enable_grad(), running(self.structure, attend, handles):
            hidden, values, gradients = self._differentiate(layers, rows)
        self._guard(hidden, rows.layer_inputs)
        return self._integrate(layers, rows.ends, values, gradients)

    def _steer(
        self,
        layers: range,
        prefix: dict[int, tuple[Tensor, Tensor]],
        per_row: bool,
        rows: _Rows,
    ) -> tuple[Attend, list[Any]]:
        """The attention and the hooks that make the decoder run ``rows``."""
        structure, batch, m = self.structure, self.batch, len(self.alphas)

        def join(layer: int) -> Callable[[Tensor], Tensor]:
            def change(hidden: Tensor) -> Tensor:
                rows.layer_inputs.append(hidden[:, 0].detach())
                if layer not in layers:
                    return hidden
                return torch.cat([hidden, hidden[:, :1].detach().expand(-1, m, -1)], dim=1)

            return change

        def place(layer: int) -> Callable[[Tensor], Tensor]:
            def change(x: Tensor) -> Tensor:
                rows.ends[layer] = z = x[:, 0].detach()
                start = None if self.baseline is None else self.baseline[layer]
                rows.points[layer] = expand_path(z, self.alphas, start).requires_grad_()
                return torch.cat([x[:, :-m], rows.points[layer]], dim=1)

            return change

        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None,
            **options: Any,
        ) -> Tensor:
            prefix_k, prefix_v = prefix[module.layer_idx]
            lengths = batch.last.to(query.device)
            if not per_row:
                return shared_prefix_attention(
                    query, key, value, prefix_k, prefix_v, lengths, **options
                )
            samples, heads, count, dim = query.shape
            one = [
                x.transpose(1, 2).reshape(samples * count, x.shape[1], 1, dim)
                for x in (query, key, value)
            ]
            output = shared_prefix_attention(
                *one, prefix_k, prefix_v, lengths.repeat_interleave(count), **options
            )
            return output.view(samples, count, heads, dim).transpose(1, 2)

        handles = [hook_layer(layer, join(i)) for i, layer in enumerate(structure.layers)]
        handles += [
            hook_site(structure.down_projs[i].module, self.definition.site, place(i))
            for i in layers
        ]
        return attend, handles

    def _differentiate(
        self, layers: range, rows: _Rows
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """All rows forward, and back to the path points; ``torch.compile`` takes it whole.

        Returns:
            The unperturbed row's last hidden state ``[B, hidden_size]``, the objective of each row
            ``[B, 1 + len(layers) * m]``, and the gradients at each layer's points ``[B, m, D]``.
        """
        batch, head = self.batch, self.head
        hidden = self.structure.decoder(
            input_ids=batch.at_last(batch.input_ids)[:, None],
            position_ids=batch.last[:, None],
            use_cache=False,
        ).last_hidden_state  # [B, 1 + len(layers) * m, hidden_size]
        samples, count, width = hidden.shape
        outputs = target_probability(
            hidden.reshape(samples * count, width).to(head.weight.device),
            head.weight,
            self.target.repeat_interleave(count).to(head.weight.device),
            head.bias,
            softcap=head.softcap,
            logit_scale=head.scale,
        )
        objectives = {n: x.view(samples, count) for n, x in outputs._asdict().items()}
        # The gradient of p is p times that of log p, which does not underflow in float16.
        of_logit = self.definition.objective == "logit"
        differentiated = objectives["logit" if of_logit else "log_probability"]
        gradients = torch.autograd.grad(
            differentiated[:, 1:].sum(), [rows.points.pop(layer) for layer in layers]
        )
        return hidden[:, 0].detach(), objectives[self.definition.objective].detach(), gradients

    def _integrate(
        self,
        layers: range,
        ends: dict[int, Tensor],
        values: Tensor,
        gradients: tuple[Tensor, ...],
    ) -> Scores:
        samples, m = values.shape[0], len(self.alphas)
        factor = values if self.definition.objective == "probability" else torch.ones_like(values)
        by_layer = values[:, 1:].view(samples, len(layers), m)
        factor = factor[:, 1:].view(samples, len(layers), m) * self.weights.to(
            factor, non_blocking=True
        )
        scores: list[Tensor] = []
        sums: list[Tensor] = []
        for i, (layer, gradient) in enumerate(zip(layers, gradients, strict=True)):
            z, start = (
                (ends[layer], None if self.baseline is None else self.baseline[layer])
                if self.definition.multiply
                else (None, None)
            )
            if self.counter is None:
                scores.append(integrate_path(gradient, factor[:, i], z, start))
                continue
            counter = self.counter
            counter.layers[layer], total = count_lowest_integrated(
                gradient,
                factor[:, i],
                z,
                start,
                counter.k,
                counter.layers.get(layer),
                criterion=counter.criterion,
            )
            sums.append(total)
        # Copied now that everything is queued: a copy waits for the device.
        scores = [of_layer.cpu() for of_layer in scores]
        sums = [total.cpu() for total in sums] or [s.sum(-1, dtype=torch.float64) for s in scores]
        start_row = (self.alphas == 0).nonzero().flatten()
        change = (
            values[:, :1] - by_layer[:, :, int(start_row[0])]
            if len(start_row)
            else torch.full_like(by_layer[:, :, 0], float("nan"))
        )
        return Scores(
            torch.stack(scores, dim=1) if scores else None,
            torch.stack(sums, dim=1),
            change.cpu(),
            values[:, 0].cpu(),
        )

    def _guard(self, hidden: Tensor, layer_inputs: list[Tensor]) -> None:
        """The unperturbed row must reproduce the prefill, or the model is refused."""
        expected = self.prefill.logits
        logits = self.head.logits(hidden)
        tolerance = _GUARD_TOLERANCE[hidden.dtype]

        def far(got: Tensor, want: Tensor) -> float:
            got, want = got.to(want.device).double(), want.double()
            error = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)
            return float(error.nan_to_num(nan=float("inf")).max())

        if far(logits, expected) <= tolerance:
            return
        name = type(self.structure.causal_lm).__name__
        pairs = itertools.pairwise(
            far(got, want)
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
            f"other logits than the whole prompt (relative error {far(logits, expected):.2g}, "
            f"allowed {tolerance:.0e}), from the last layer or the output head on."
        )
