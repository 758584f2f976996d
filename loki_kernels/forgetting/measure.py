"""Next-token distributions of two models, compared a chunk of logits at a time.

Of the base the last hidden states are kept, ``[tokens, D]`` on the host in their own dtype, and the
output head. The logits that these give are the base's own, so the rest of the base may be gone when
the other model runs: nothing is approximated, and no more than `LOGITS` logits of each exist.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..head import (
    check_logits,
    logit_scale_and_softcap,
    possible_scales,
    scaled_and_capped,
)
from ..progress import progress_bar
from ..sharding import (
    fsdp_device,
    home,
    is_sharded,
    linear_of,
    reshard,
    shards_its_weights,
    weight_and_bias,
)
from ..structure import (
    embedding_weight,
    evaluating,
    in_own_precision,
    is_plain_linear,
    text_config,
    unwrap,
    without_engines,
)
from ..training.writer import rows_held
from .texts import UNKNOWN, Batch, Corpus, check_ids

# Logits of a model at once: 64 MiB in float32, of which a comparison needs about six.
LOGITS = 2**24
# Tokens of a forward pass, padding included.
FORWARD = 2048


@dataclass
class Readout:
    """A model's output head, with what its config says is done with the products."""

    head: nn.Module
    scale: float
    softcap: float | None
    copied: bool = False  # then it lies on the host between measurements

    @classmethod
    def of(cls, model: nn.Module, *, kept: bool = False) -> Readout:
        """A model's; ``kept`` copies the head, since it may be changed or taken apart.

        Raises:
            UnsupportedModelError: if there is no head.
            UnreadableHeadError: if it cannot be copied.
        """
        causal_lm = unwrap(model)
        head = causal_lm.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise UnsupportedModelError(f"{type(causal_lm).__name__} has no output head.")
        if kept:
            head = _copy(head)
        return cls(head, *logit_scale_and_softcap(text_config(causal_lm)), copied=kept)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[tokens, V]`` of hidden ``[tokens, D]``."""
        return scaled_and_capped(self.head.forward(hidden).float(), self.scale, self.softcap)

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """A copied head on the device of the model that is compared with it."""
        if not self.copied:
            yield
            return
        try:
            self.head.to(device)
            yield
        finally:
            self.head.to("cpu")


def _copy(head: Any) -> nn.Module:
    """A head on the host; of a sharded one, which all processes have to ask for, a whole one.

    Raises:
        UnreadableHeadError: if that one is more than a linear layer.
    """
    placed = hasattr(head, "_hf_hook")  # by accelerate, whose hook a copy would have too
    plain = is_plain_linear(head)  # whose copy takes no room on the device
    if not placed and not plain and not any(map(is_sharded, head.parameters())):
        with torch.no_grad():
            alone: nn.Module = copy.deepcopy(head).to("cpu").requires_grad_(False)
            return alone
    others = dict(head.named_parameters(recurse=False)).keys() - {"weight", "bias"}
    if others:  # Dory's factor of each token
        raise UnreadableHeadError(
            f"the output head ({type(head).__name__}) is placed by accelerate or sharded, and has "
            f"parameters besides weight and bias: {', '.join(sorted(others))}."
        )
    weight, bias = weight_and_bias(head)
    kept = None if bias is None else bias.to("cpu", copy=True)
    return linear_of(weight.to("cpu", copy=True), kept)


@dataclass(frozen=True)
class Moves:
    """What was measured at every token, float32 ``[N]`` on the host.

    Attributes:
        kl: nats, of the next token's distribution in the base from that in the other model.
        before: log-probability of the text's next token in the base; NaN after its last one.
        after: the same in the other model.
        likeliest_before: int64, the token that the base finds likeliest.
        likeliest_after: the same in the other model.
    """

    kl: Tensor
    before: Tensor
    after: Tensor
    likeliest_before: Tensor
    likeliest_after: Tensor

    @classmethod
    def empty(cls, tokens: int) -> Moves:
        numbers = (torch.zeros(tokens, dtype=torch.int64) for _ in range(2))
        return cls(*(torch.zeros(tokens) for _ in range(3)), *numbers)

    def put(self, places: Tensor, base: Tensor, tuned: Tensor, targets: Tensor) -> None:
        """Compare float32 logits ``[tokens, V]`` and keep the result at ``places``."""
        if base.shape != tuned.shape:
            raise ValueError(
                f"the base gives {base.shape[-1]} logits a token and the other model "
                f"{tuned.shape[-1]}; they must have one vocabulary."
            )
        before, after = base.log_softmax(-1), tuned.log_softmax(-1)
        p = before.exp()
        terms = (before - after).mul_(p).masked_fill_(p == 0, 0)  # -inf - -inf is NaN
        kl = terms.sum(-1).clamp_min(0)  # below it only by rounding
        if torch.isnan(kl).any():
            raise ValueError("the logits of one of the models are NaN.")
        self.kl[places] = kl.cpu()
        tokens = targets.clamp_min(0).to(base.device)[:, None]
        for values, log_p in ((self.before, before), (self.after, after)):
            own = log_p.gather(1, tokens)[:, 0].cpu()
            values[places] = own.masked_fill(targets == UNKNOWN, math.nan)
        self.likeliest_before[places] = before.argmax(-1).cpu()
        self.likeliest_after[places] = after.argmax(-1).cpu()


@dataclass(frozen=True)
class Base:
    """What is kept of the base: the head, and hidden ``[tokens, D]`` of each batch."""

    readout: Readout
    batches: Sequence[Batch]
    hidden: list[Tensor]


class UnreadableHeadError(UnsupportedModelError):
    """The logits are not what the head and the config give."""


def record(
    model: nn.Module,
    corpus: Corpus,
    *,
    kept: bool | None = None,
    progress: bool | None = None,
) -> Base:
    """Run the base. Its head goes on being used; with ``kept`` a copy of it is.

    None keeps a copy where training, or an engine, may change the head.

    Raises:
        UnreadableHeadError: if its logits need more than the head; then `compare_whole` serves.
        ValueError: for a token that the model does not have, or if the logits are NaN.
    """
    check_ids(model, corpus)
    batches = corpus.batches(FORWARD)
    if kept is None:
        kept = not _keeps_head(model)
    readout = Readout.of(model, kept=kept)
    own = Readout.of(model)
    hidden: list[Tensor] = []
    with _evaluated(model), progress_bar(len(batches), "base", progress) as bar:
        readout.scale = own.scale = _own_scale(model, own)
        for batch in batches:
            _run(model, own, batch, lambda states: hidden.append(states.cpu()))
            bar.update()
    if kept and hidden and any(map(is_sharded, own.head.parameters())):
        readout.head.to(hidden[0].dtype)  # FSDP may compute in another dtype than it keeps
    return Base(readout, batches, hidden)


def _keeps_head(model: nn.Module) -> bool:
    """Whether a model's head is a plain layer that nothing trains, and no engine takes apart."""
    head = unwrap(model).get_output_embeddings()
    trained = any(p.requires_grad for p in head.parameters())
    return is_plain_linear(head) and not trained and not shards_its_weights(model)


def compare(base: Base, model: nn.Module, *, progress: bool | None = None) -> Moves:
    """Run the other model and compare. In distributed training every process has to.

    Raises:
        UnreadableHeadError: as `record`.
        ValueError: for another vocabulary, or NaN.
    """
    moves = Moves.empty(sum(len(batch.places) for batch in base.batches))
    own = Readout.of(model)
    with (
        _evaluated(model),
        base.readout.on(_device(model)),
        progress_bar(len(base.batches), "compare", progress) as bar,
    ):
        own.scale = _own_scale(model, own)
        for batch, before in zip(base.batches, base.hidden, strict=True):

            def visit(states: Tensor, batch: Batch = batch, before: Tensor = before) -> None:
                head = base.readout.head
                weight = next(head.parameters())
                device = home(head, weight)
                step = max(1, LOGITS // weight.shape[0])
                for start in range(0, len(states), step):
                    part = slice(start, start + step)
                    tuned = own.logits(states[part])
                    logits = base.readout.logits(before[part].to(device)).to(tuned.device)
                    moves.put(batch.places[part], logits, tuned, batch.targets[part])

            _run(model, own, batch, visit)
            bar.update()
    return moves


def compare_whole(
    base: nn.Module, tuned: nn.Module, corpus: Corpus, *, progress: bool | None = None
) -> Moves:
    """Compare two models side by side, with all logits of a batch at once.

    Raises:
        ValueError: for another vocabulary, or NaN.
    """
    batches = corpus.batches(1)
    moves = Moves.empty(sum(len(batch.places) for batch in batches))
    with (
        _evaluated(base),
        _evaluated(tuned),
        progress_bar(len(batches), "compare", progress) as bar,
    ):
        for batch in batches:
            before, after = (_forward(model, batch) for model in (base, tuned))
            step = max(1, LOGITS // before.shape[-1])
            for start in range(0, len(before), step):
                part = slice(start, start + step)
                logits = before[part].to(after.device).float(), after[part].float()
                moves.put(batch.places[part], *logits, batch.targets[part])
            bar.update()
    return moves


def _own_scale(model: nn.Module, own: Readout) -> float:
    """Of the scales that the config may mean the one by which the model makes its logits.

    Where there are several, a forward pass of two tokens tells.
    """
    scales = possible_scales(text_config(unwrap(model)))
    products: list[Tensor] = []
    if len(scales) == 1:
        return own.scale
    handle = own.head.register_forward_hook(lambda _module, _args, got: products.append(got))
    try:
        ids = torch.arange(2, device=_device(model))[None]
        logits = without_engines(model)(input_ids=ids, use_cache=False).logits.float()
    finally:
        handle.remove()

    def error(scale: float) -> float:
        found = scaled_and_capped(products[0].float(), scale, own.softcap)
        return float((found - logits.to(found.device)).norm())

    known = len(products) == 1 and products[0].shape == logits.shape
    return min(scales, key=error) if known else own.scale


def _run(model: nn.Module, own: Readout, batch: Batch, visit: Callable[[Tensor], None]) -> None:
    """One forward pass, whose head sees one token a text: ``visit`` gets what would have entered.

    It is called inside the head's forward pass, where an engine has gathered the head's weight and
    mixed precision is in force, with hidden ``[tokens, D]``.
    """
    length = batch.ids.shape[1]
    wanted: list[Tensor] = []
    name = type(unwrap(model)).__name__

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        hidden: Tensor = args[0][:, -length:]  # PEFT's prompt tuning puts tokens before the text's
        wanted.append(own.logits(hidden[:, :1]))
        check_logits(unwrap(model), wanted[0])
        visit(hidden[batch.measured.to(hidden.device)])
        return (hidden[:, :1],)

    handle = own.head.register_forward_pre_hook(hook)
    try:
        got = _logits(model, batch)
    finally:
        handle.remove()
    if len(wanted) != 1 or wanted[0].shape != got.shape or not _alike(got.float(), wanted[0]):
        raise UnreadableHeadError(
            f"the logits of {name} are not what its output head and its config give."
        )


def _alike(got: Tensor, want: Tensor) -> bool:
    """Equal but for the rounding of 16-bit logits, which a soft-cap or scale goes far beyond."""
    finite = got.isfinite() & want.isfinite().to(got.device)
    difference = (got - want.to(got.device))[finite].abs().max()
    return bool(difference <= 0.02 * got[finite].abs().max())


def _forward(model: nn.Module, batch: Batch) -> Tensor:
    logits = _logits(model, batch)[:, -batch.ids.shape[1] :]
    return logits[batch.measured.to(logits.device)]


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    device = _device(model)
    mask = None if batch.mask.all() else batch.mask.to(device, torch.int64)
    output: Any = without_engines(model)(
        input_ids=batch.ids.to(device), attention_mask=mask, use_cache=False
    )
    logits: Tensor = output.logits
    return logits


def _device(model: nn.Module) -> torch.device:
    """Where its token ids go; not the host, on which FSDP2 may keep what it gathers elsewhere."""
    causal_lm = unwrap(model)
    return fsdp_device(model) or home(causal_lm.get_input_embeddings(), embedding_weight(causal_lm))


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients, and then in its own mode again.

    In its own precision too: of float32 weights bfloat16 would make a KL below .01 rounding. Not
    where an attention that takes 16 bits alone can only run in what they were trained with.
    """
    causal_lm: Any = unwrap(model)
    flash = "flash" in str(getattr(causal_lm.config, "_attn_implementation", None))
    coarse = flash and getattr(causal_lm, "dtype", None) == torch.float32
    own = contextlib.nullcontext() if coarse else in_own_precision(model)
    try:
        with evaluating(model), own, torch.no_grad(), rows_held(model):
            yield
    finally:
        reshard(model)
