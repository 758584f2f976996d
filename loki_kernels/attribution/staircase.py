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

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..errors import UnsupportedModelError
from ..ops import (
    count_lowest_integrated,
    expand_path,
    integrate_path,
    shared_prefix_attention,
    target_probability,
)
from ..ops.count_lowest import Criterion
from ..structure import Head, Structure, first_non_finite
from .definitions import Definition

ATTENTION_NAME = "loki_kernels"

# Largest relative difference allowed between the unperturbed row's logits and the prefill's: the
# same numbers through products of another shape. Measured on SmolLM2-135M: 2e-6 (float32),
# 1e-2 (bfloat16).
_GUARD_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 8e-2,
}

Attend = Callable[..., Tensor]
# Where the attention in force is kept: on the model's own config, which every attention module
# holds. A ContextVar would do, but torch.compile cannot trace one.
_ATTEND = "_loki_kernels_attend"


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    output = getattr(module.config, _ATTEND)(
        module,
        query,
        key,
        value,
        attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        window=kwargs.get("sliding_window"),
        sinks=kwargs.get("s_aux"),
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def _attention_configs(structure: Structure) -> list[Any]:
    configs = {
        id(module.config): module.config
        for module in structure.decoder.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal")
    }
    return list(configs.values())


@contextlib.contextmanager
def prepared(structure: Structure) -> Iterator[None]:
    """The model in evaluation mode, frozen, with our attention; restored whatever happens."""
    model = structure.causal_lm
    training = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    implementations = [
        (config, config._attn_implementation_internal) for config in _attention_configs(structure)
    ]
    device = next(model.parameters()).device.type
    try:
        model.eval()
        for parameter, _ in required:
            parameter.requires_grad_(False)
        for config, _ in implementations:
            config._attn_implementation_internal = ATTENTION_NAME
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device, enabled=False),
        ):
            yield
    finally:
        for config, implementation in implementations:
            config._attn_implementation_internal = implementation
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        for module, flag in training:
            module.training = flag


@contextlib.contextmanager
def running(structure: Structure, attend: Attend, handles: Sequence[Any]) -> Iterator[None]:
    """``attend`` as the decoder's attention; it and the hooks are gone afterwards."""
    configs = _attention_configs(structure)
    for config in configs:
        setattr(config, _ATTEND, attend)
    try:
        yield
    finally:
        for config in configs:
            delattr(config, _ATTEND)
        for handle in handles:
            handle.remove()


def _prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Ordinary causal attention, with the two features SDPA lacks written out."""
    groups = query.shape[1] // key.shape[1]
    length = query.shape[2]
    if softcap is None and sinks is None:
        # Padding is on the right, so a batch has one mask for all its samples.
        mask = None if mask is None else mask[:1]
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            scale=scale,
            enable_gqa=groups > 1,
        )
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    else:
        mask = mask[:1]
    scores = scores.masked_fill(~mask, float("-inf"))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if sinks is not None:
        sink = sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, length, 1)
        weights = torch.softmax(torch.cat([scores, sink], -1), -1, dtype=wide)[..., :-1]
    else:
        weights = torch.softmax(scores, -1, dtype=wide)
    return weights.to(value.dtype) @ value


def capturing_attention(prefix: dict[int, tuple[Tensor, Tensor]]) -> Attend:
    """Ordinary attention that leaves each layer's keys and values in ``prefix``."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        window: int | None,  # the mask has it
        **options: Any,
    ) -> Tensor:
        prefix[module.layer_idx] = (key, value)
        return _prefill_attention(query, key, value, mask, **options)

    return attend


@dataclass
class Batch:
    """Prompts, right-padded to the longest: causal attention keeps the padding out of the rest."""

    input_ids: Tensor  # [B, T]
    lengths: Tensor  # [B]

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device)[None]

    @property
    def last(self) -> Tensor:
        return self.lengths - 1

    def at_last(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` at each sample's last token."""
        return x[torch.arange(x.shape[0], device=x.device), self.last.to(x.device)]


@dataclass
class Prefill:
    """What the rows need from one ordinary forward pass over the prompts."""

    logits: Tensor  # [B, V], at the last token
    layer_inputs: list[Tensor]  # L of [B, hidden_size], at the last token
    prefix: dict[int, tuple[Tensor, Tensor]]  # layer_idx -> K, V [B, Hkv, T, d]
    site: list[Tensor]  # L of [B, T, D]; filled only when asked for


def hook_layer(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    """Call ``change`` on the hidden states entering a decoder layer."""

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def hook_site(module: nn.Module, site: str, change: Callable[[Tensor], Tensor]) -> Any:
    """Call ``change`` on the attributed activation: the module's output, or its input."""
    if site == "down_proj":
        return module.register_forward_hook(lambda _module, _args, output: change(output))

    return module.register_forward_pre_hook(lambda _module, args: (change(args[0]), *args[1:]))


def run_prefill(
    structure: Structure, batch: Batch, site: str, *, keep_site: bool = False
) -> Prefill:
    """One ordinary forward pass; logits only at each sample's last token."""
    prefill = Prefill(torch.empty(0), [], {}, [])

    def keep_last(hidden: Tensor) -> Tensor:
        prefill.layer_inputs.append(batch.at_last(hidden))
        return hidden

    def keep(x: Tensor) -> Tensor:
        prefill.site.append(x)
        return x

    head = structure.causal_lm.get_output_embeddings()
    handles = [hook_layer(layer, keep_last) for layer in structure.layers]
    handles.append(
        head.register_forward_pre_hook(lambda _m, args: (batch.at_last(args[0])[:, None],))
    )
    if keep_site:
        handles += [hook_site(down.module, site, keep) for down in structure.down_projs]
    with running(structure, capturing_attention(prefill.prefix), handles):
        output = structure.causal_lm(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            use_cache=False,
        )
    prefill.logits = output.logits[:, 0]
    if len(prefill.layer_inputs) != len(structure.layers) or not prefill.prefix:
        raise UnsupportedModelError(
            f"{type(structure.causal_lm).__name__} does not run its attention through "
            "transformers' AttentionInterface, so its keys and values cannot be captured."
        )
    if torch.isnan(prefill.logits).any():
        name = first_non_finite(structure.causal_lm)
        raise ValueError(
            "the model's logits are NaN"
            + (f"; its parameter {name} is not finite." if name else " for these prompts.")
        )
    return prefill


@dataclass
class Scores:
    """One batch's results, on the CPU."""

    scores: Tensor | None  # [B, L, D]; None where they were only counted
    sums: Tensor  # float64 [B, L], of the scores
    change: Tensor  # [B, L], F(z) - F(baseline); NaN where the path has no such point
    value: Tensor  # [B], F(z)

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """The results of one batch from those of its layers."""
        scores = [part.scores for part in parts if part.scores is not None]
        return cls(
            torch.cat(scores, dim=1) if scores else None,
            torch.cat([part.sums for part in parts], dim=1),
            torch.cat([part.change for part in parts], dim=1),
            parts[0].value,
        )


@dataclass
class Counter:
    """How often each node is among the k lowest of its layer, over the batches so far."""

    quota: float  # the percentage that k is
    k: int
    criterion: Criterion
    layers: dict[int, Tensor] = field(default_factory=dict)  # layer -> int64 [D], where it runs

    def counts(self) -> Tensor:
        """``[L, D]`` on the CPU."""
        return torch.stack([self.layers[layer].cpu() for layer in sorted(self.layers)])


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
