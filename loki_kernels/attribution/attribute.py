"""`attribute`: prompts in, scores out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn

from ..errors import check_choice
from ..files import check_writable
from ..ops.count_lowest import Criterion
from ..progress import progress_bar
from ..ranking import DEFAULT_CRITERION, DEFAULT_QUOTA, rows_per_layer
from ..structure import Structure, find_structure
from .definitions import Definition, path_rule, resolve_definition
from .prefill import Batch, Prefill, run_prefill
from .prompts import Tokens, tokenize_prompts
from .result import Attribution, AttributionCounts, ScoreFile, describe_run
from .scores import Counter, Scores
from .sequence import scaled_prefixes
from .staircase import RowPass
from .steering import prepared

logger = logging.getLogger(__name__)

# Above this ratio of mean |completeness error| to mean |F(z) - F(baseline)| the path integral is
# not resolved at all; SmolLM2-135M has 0.1 to 0.6 at m = 7, post-norm models (Gemma-2) 10 and more.
_UNRESOLVED = 1.0


Keep = Literal["scores", "counts"]


@overload
def attribute(
    model: nn.Module, prompts: Iterable[Any], *, keep: Literal["scores"] = ..., **options: Any
) -> Attribution: ...
@overload
def attribute(
    model: nn.Module, prompts: Iterable[Any], *, keep: Literal["counts"], **options: Any
) -> AttributionCounts: ...
def attribute(
    model: nn.Module,
    prompts: Iterable[Any],
    *,
    tokenizer: Any = None,
    definition: str = "published",
    steps: int = 7,
    batch_size: int | None = None,
    target: Sequence[int] | Tensor | None = None,
    keep: Keep = "scores",
    quota: float | None = None,
    criterion: Criterion | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **overrides: Any,
) -> Attribution | AttributionCounts:
    """Attribute the model's next token to every FFN node, for every prompt and layer.

    z_l is layer l's node vector at the last prompt token; F is the objective, a function of the
    target token's logit; the score is a quadrature of ``∂F/∂z`` along a path from the baseline to
    z (arXiv 2505.22120, Eq. 3-5; three definitions are in use, see `DEFINITIONS`). The model's
    weights, dtype, flags and hooks are as before when this returns or raises.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        prompts: strings or chat-message lists (with ``tokenizer``), or mappings with ``input_ids``
            and ``attention_mask``, such as a DataLoader yields. Padding may be on either side.
        tokenizer: a transformers tokenizer.
        definition: ``"published"``, ``"paper"`` or ``"captum"``.
        steps: path points m.
        batch_size: prompts at a time; by default as many as fit 1,024 prompt tokens and 512 path
            rows on a CPU, 16,384 of both on a GPU.
        target: ``[N]`` token ids to attribute; by default the token the model predicts.
        keep: ``"counts"`` keeps only what `select` needs for one quota and criterion, how often
            each node is among the lowest of its layer: L * D numbers however many prompts there
            are, and on a GPU no score leaves the kernel that makes it.
        quota: with ``keep="counts"``, the percentage of rows (10 by default) ...
        criterion: ... and ``"magnitude"`` (the default) or ``"signed"``, as in `select`.
        out: a ``.safetensors`` file that receives the scores as they come, memory-mapped, so
            that memory does not grow with N.
        progress: True or False for the bar; by default it shows on a terminal.
        **overrides: fields of `Definition` (``path``, ``objective``, ``rule``, ``baseline``,
            ``multiply``, ``site``) to change.

    Returns:
        An `Attribution` with scores ``[N, L, D]``, D = hidden_size, or intermediate_size for
        ``site="ffn_neurons"``; `AttributionCounts` for ``keep="counts"``.

    Raises:
        ValueError: for an unknown definition or option, empty prompts, token ids out of range, a
            mask with holes, a target that does not fit, NaN weights, or counts of NaN scores.
        TypeError: for prompts of another kind, or text without a tokenizer.
        UnsupportedModelError: if the model's layers cannot be treated exactly.
    """
    resolved = resolve_definition(definition, overrides)
    alphas, weights = path_rule(resolved.rule, steps)
    structure = find_structure(model)
    structure.head()  # raises where there is none
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a positive integer; it is {batch_size!r}.")
    n_layers = len(structure.layers)
    width = structure.hidden_size if resolved.site == "down_proj" else structure.intermediate_size
    counter = _make_counter(keep, quota, criterion, width, out)
    sequences = tokenize_prompts(prompts, tokenizer, structure.vocab_size)
    targets = _check_target(target, len(sequences), structure.vocab_size)
    if out is not None and check_writable(out).suffix != ".safetensors":
        raise ValueError(f"out={os.fspath(out)!r} must end in .safetensors.")

    if resolved.completes and not (alphas == 0).any():
        # Completeness needs F(baseline), a point this rule does not visit: add it, unweighted.
        alphas = torch.cat([torch.zeros(1, dtype=alphas.dtype), alphas])
        weights = torch.cat([torch.zeros(1, dtype=weights.dtype), weights])

    shape = (len(sequences), n_layers, width)
    run = describe_run(model, definition, resolved, steps)
    store = ScoreFile(out, shape, run, complete=resolved.completes, scores=counter is None)
    batches = _plan(sequences, batch_size, n_layers * len(alphas), structure)
    with (
        store,
        prepared(structure),
        progress_bar(len(sequences), "attribute", progress, unit="prompt") as bar,
    ):
        for members in batches:
            batch = _pad([sequences[i] for i in members], structure)
            chosen, scores = _attribute_batch(
                structure,
                batch,
                None if targets is None else targets[members],
                resolved,
                alphas,
                weights,
                counter,
            )
            if counter is not None:
                _check_counted(scores, members)
            store.write(members, chosen, scores)
            bar.update(len(members))
    tensors = store.tensors()
    result: Attribution | AttributionCounts
    if counter is None:
        result = Attribution(run=run, **tensors)
    else:
        result = AttributionCounts(
            counter.counts(), counter.quota, counter.criterion, run=run, **tensors
        )
    _warn_if_unresolved(result)
    return result


def _make_counter(
    keep: Keep,
    quota: float | None,
    criterion: Criterion | None,
    width: int,
    out: str | os.PathLike[str] | None,
) -> Counter | None:
    check_choice("keep", keep, get_args(Keep))
    if keep == "scores":
        if quota is not None or criterion is not None:
            raise ValueError("quota and criterion belong to keep='counts'; `select` takes them.")
        return None
    if out is not None:
        raise ValueError("out= receives scores, and keep='counts' keeps none; save the result.")
    criterion = DEFAULT_CRITERION if criterion is None else criterion
    check_choice("criterion", criterion, get_args(Criterion))
    quota = DEFAULT_QUOTA if quota is None else float(quota)
    return Counter(quota, rows_per_layer(quota, width), criterion)


def _check_counted(scores: Scores, members: list[int]) -> None:
    undefined = scores.sums.isnan().nonzero()
    if len(undefined):
        sample, layer = undefined[0].tolist()
        raise ValueError(
            f"the scores of prompt {members[sample]} in layer {layer} hold NaN (or infinities of "
            "both signs); a rank among them means nothing."
        )


def _check_target(
    target: Sequence[int] | Tensor | None, count: int, vocab_size: int
) -> Tensor | None:
    if target is None:
        return None
    targets = torch.as_tensor(target).cpu()
    if targets.shape != (count,) or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(
            f"target must hold one token id for each of the {count} prompts; it is "
            f"{targets.dtype} {tuple(targets.shape)}."
        )
    if targets.min() < 0 or targets.max() >= vocab_size:
        raise ValueError(f"target holds a token id outside the vocabulary of {vocab_size}.")
    return targets.to(torch.int64)


def _plan(
    sequences: list[Tokens], batch_size: int | None, rows: int, structure: Structure
) -> list[list[int]]:
    """Batches of prompt numbers, the longest prompts first, so that what does not fit fails now."""
    device = next(structure.causal_lm.parameters()).device
    # Measured on 2 cores (benchmarks/NOTES.md): more rows leave the cache, fewer idle the cores.
    tokens, most_rows = (1024, 512) if device.type == "cpu" else (16384, 16384)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        longest = len(sequences[order[start]])
        size = batch_size or max(1, min(tokens // longest, most_rows // rows))
        batches.append(order[start : start + size])
        start += size
    return batches


def _pad(sequences: list[Tokens], structure: Structure) -> Batch:
    device = structure.causal_lm.get_input_embeddings().weight.device  # type: ignore[operator]
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    input_ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    for row, tokens in zip(input_ids, sequences, strict=True):
        row[: len(tokens)] = torch.from_numpy(tokens)
    return Batch(input_ids.to(device), lengths.to(device))


def _attribute_batch(
    structure: Structure,
    batch: Batch,
    target: Tensor | None,
    definition: Definition,
    alphas: Tensor,
    weights: Tensor,
    counter: Counter | None,
) -> tuple[Tensor, Scores]:
    start: Prefill | None = None
    if definition.baseline == "token_zero":
        blank = Batch(torch.zeros_like(batch.input_ids), batch.lengths)
        start = run_prefill(structure, blank, definition.site, keep_site=True)
    prefill = run_prefill(structure, batch, definition.site)
    chosen = prefill.logits.argmax(-1) if target is None else target.to(prefill.logits.device)
    rows = RowPass(
        structure,
        batch,
        prefill,
        chosen,
        definition,
        alphas,
        weights,
        None if start is None else [batch.at_last(site) for site in start.site],
        counter,
    )
    all_layers = range(len(structure.layers))
    if definition.path == "last_token":
        return chosen.cpu(), rows.run(all_layers, prefill.prefix)

    parts = []
    # One layer at a time: a copy of the whole prompt's keys and values a path point is what the
    # memory holds.
    for layer in all_layers:
        layers = range(layer, layer + 1)
        prefix = scaled_prefixes(structure, batch, layers, definition.site, alphas, start)
        parts.append(rows.run(layers, prefix, per_row=True))
    return chosen.cpu(), Scores.join(parts)


def _warn_if_unresolved(result: Attribution | AttributionCounts) -> None:
    if result.completeness is None or result.change is None:
        return
    error = float(result.completeness.abs().mean())
    change = float(result.change.abs().mean())
    if error > _UNRESOLVED * change:
        logger.warning(
            "The scores do not add up to the change they attribute: mean |sum of scores - "
            "(F(z) - F(baseline))| is %.3g where mean |F(z) - F(baseline)| is %.3g. Try more "
            "steps; models that normalise the FFN's output (Gemma-2, OLMo-2) make this path "
            "singular at zero, and only another baseline helps.",
            error,
            change,
        )
