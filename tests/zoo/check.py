"""Holds one class of transformers to the promise: exact and nothing else trained, or refused."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor, nn

import loki_kernels as loki

from .build import FIRST_SPECIAL_TOKEN, build
from .reference import NoReference, Site, find_layers, layers_that_run, reference_scores

POINTS = 3
TOLERANCE = 1e-4
TIME_LIMIT = 60.0
FAILURES = ("WRONG", "CRASH")
# What is tried of a class, and the verdict that is wanted.
TRIALS = {"attribution": "exact", "training": "trained", "protection": "protected"}


@dataclass(frozen=True)
class Verdict:
    """How one of the three went.

    Attributes:
        kind: ``exact``, ``trained``, ``protected``, ``refused``, ``not tried``, ``WRONG`` or
            ``CRASH``.
        text: the error's size, the reason or the exception.
    """

    kind: str
    text: str

    @property
    def failed(self) -> bool:
        return self.kind in FAILURES


@dataclass(frozen=True)
class Outcome:
    """What became of one class; a verdict is None where the class was not built."""

    name: str
    attribution: Verdict | None = None
    training: Verdict | None = None
    protection: Verdict | None = None
    not_built: str | None = None

    @property
    def verdicts(self) -> list[tuple[str, Verdict]]:
        """(what was tried, how it went)."""
        found = ((what, getattr(self, what)) for what in TRIALS)
        return [(what, verdict) for what, verdict in found if verdict is not None]

    @property
    def failures(self) -> list[tuple[str, Verdict]]:
        """(what was tried, verdict) of what is WRONG or a CRASH."""
        return [(what, verdict) for what, verdict in self.verdicts if verdict.failed]

    def __str__(self) -> str:
        if self.not_built is not None:
            return f"{self.name}: not built: {self.not_built}"
        return f"{self.name}: " + "; ".join(
            f"{what} {verdict.kind} ({verdict.text})" for what, verdict in self.verdicts
        )


def check(name: str) -> Outcome:
    """Build the class and try all three; exceptions become verdicts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(name)
        except Exception as error:
            return Outcome(name, not_built=_line(error))
        attribution = _guarded(check_attribution, model)
        training = _guarded(check_training, build(name))
        protection = (
            _guarded(check_protection, build(name))
            if training.kind == "trained"
            else Verdict("not tried", training.text)
        )
        return Outcome(name, attribution, training, protection)


def check_attribution(model: nn.Module) -> Verdict:
    """Compare the scores of the longer of two prompts with naive re-forwards."""
    generator = torch.Generator().manual_seed(1)
    long, short = (_tokens((length,), generator) for length in (8, 5))
    try:
        expected = reference_scores(model, long, POINTS)
        unknown = None
    except NoReference as reason:
        expected, unknown = {}, str(reason)
    before = _logits(model, long)
    prompts = [{"input_ids": short}, {"input_ids": long}]
    try:
        found = loki.attribute(model, prompts, steps=POINTS, progress=False)
    except loki.UnsupportedModelError as error:
        after = _logits(model, long)
        if before is not None and not (after is not None and torch.equal(after, before)):
            return Verdict("WRONG", f"refused, but the model is another now: {_line(error)}")
        if "reforward" not in str(error):
            return Verdict("refused", _line(error))
        try:  # which has to be asked for
            found = loki.attribute(model, prompts, steps=POINTS, engine="reforward", progress=False)
        except loki.UnsupportedModelError:
            return Verdict("refused", _line(error))
    if unknown is not None:
        return Verdict("WRONG", f"gave scores, but {unknown}")
    scores = found.scores[1]
    layers = len(find_layers(model))
    if len(scores) != layers:
        return Verdict("WRONG", f"gave scores of {len(scores)} layers; the model has {layers}")
    errors = {}
    for layer, score in expected.items():
        if score.shape != scores[layer].shape:
            shapes = f"{tuple(scores[layer].shape)}, not {tuple(score.shape)}"
            return Verdict("WRONG", f"the scores of layer {layer} are {shapes}")
        errors[layer] = float((scores[layer] - score).norm() / score.norm())
    worst = max(errors, key=lambda layer: errors[layer] if errors[layer] == errors[layer] else 1e9)
    text = f"error {errors[worst]:.1e} in layer {worst}, {found.run['engine']}"
    return Verdict("exact" if errors[worst] <= TOLERANCE else "WRONG", text)


def check_training(model: nn.Module) -> Verdict:
    """Train two rows a layer for three steps, and look at every tensor of the state dict."""
    generator = torch.Generator().manual_seed(2)
    batch = _tokens((4, 8), generator)
    layers = find_layers(model)
    rows = _rows_to_train(model, layers, batch[0])
    if not any(rows):  # nothing here to train: ask for something, which has to be refused
        rows = [[1, 2] for _ in layers] or [[1, 2]]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    types = {key: type(module) for key, module in model.named_modules()}
    required = {key: p.requires_grad for key, p in model.named_parameters()}
    before = _logits(model, batch)
    used = _used(model, batch)

    def difference() -> str | None:
        """What makes the model another than it was, if anything."""
        if {key: type(module) for key, module in model.named_modules()} != types:
            return "its modules are not those it had"
        if {key: p.requires_grad for key, p in model.named_parameters()} != required:
            return "requires_grad is not what it was"
        changed = _changed(state, model.state_dict())
        return f"{changed[0]} changed" if changed else None

    try:
        handle = loki.patch(model, rows)
    except loki.UnsupportedModelError as error:
        left = difference()
        if left is not None:
            return Verdict("WRONG", f"refused, but {left}: {_line(error)}")
        return Verdict("refused", _line(error))
    if before is None or before.shape[:2] != batch.shape:
        handle.unpatch()
        left = difference()
        if left is not None:
            return Verdict("WRONG", f"after unpatch {left}")
        return Verdict("not tried", "no logits of tokens alone; patched and unpatched")
    patched = _logits(model, batch)
    if patched is None or not torch.allclose(patched, before, rtol=1e-5, atol=1e-5):
        return Verdict("WRONG", "patched, the logits are others before any step")
    _train(model, batch, generator)
    trained = model.state_dict()  # and the update, which the plain model has not
    wrong = _judge_rows(layers, rows, state, {key: trained[key] for key in state}, used)
    handle.unpatch()
    left = difference()
    if wrong is None and left is not None:
        wrong = f"after unpatch {left}"
    if wrong is not None:
        return Verdict("WRONG", wrong)
    return Verdict("trained", f"two rows of {sum(map(bool, rows))} of {len(layers)} layers")


def check_protection(model: nn.Module) -> Verdict:
    """Train two rows a layer that is protected, and look at what has moved along its directions."""
    generator = torch.Generator().manual_seed(3)
    texts, batch = _tokens((6, 12), generator), _tokens((4, 8), generator)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        protection = loki.estimate_protection(model, texts.tolist(), share=0.7, progress=False)
    except loki.UnsupportedModelError as error:
        changed = _changed(state, model.state_dict())
        if changed:
            return Verdict("WRONG", f"refused, but {changed[0]} changed: {_line(error)}")
        return Verdict("refused", _line(error))
    layers = find_layers(model)
    rows = _rows_to_train(model, layers, batch[0])
    loki.patch(model, rows, protect=protection)
    _train(model, batch, generator)
    trained = model.state_dict()
    count = 0
    for layer, chosen in zip(layers, rows, strict=True):
        for weight, axis in layer.weights if chosen else ():
            moved = (trained[weight] - state[weight]).movedim(axis, -2)
            along = moved @ protection.directions[weight.rpartition(".")[0]]
            if float(along.norm()) > 1e-4 * float(moved.norm()):
                return Verdict("WRONG", f"{weight} moved along its protected directions")
            count += bool(moved.any())
    return Verdict("protected" if count else "WRONG", f"{count} weights moved outside of them")


def check_all(
    names: Sequence[str], workers: int = 2, time_limit: float = TIME_LIMIT
) -> Iterator[Outcome]:
    """The outcomes as they come, each class in a process of its own."""
    # A fork has transformers imported already, takes what a class does to the process with it, and
    # may die. PyTorch's threads do not survive one: none has been started before.
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(names))
    running: dict[Connection, tuple[str, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(name, sender))
            process.start()
            sender.close()
            running[receiver] = (name, process, time.monotonic() + time_limit)
        left = min(end for _, _, end in running.values()) - time.monotonic()
        ready = wait(list(running), timeout=max(left, 0.0))
        late = [key for key, (_, _, end) in running.items() if end <= time.monotonic()]
        for receiver in {*ready, *late}:
            name, process, _ = running.pop(receiver)
            yield _receive(name, receiver, process, receiver in ready, time_limit)


def _work(name: str, sender: Connection) -> None:
    torch.set_num_threads(1)
    sender.send(check(name))
    sender.close()


def _receive(
    name: str, receiver: Connection, process: Any, is_ready: bool, time_limit: float
) -> Outcome:
    text = f"took longer than {time_limit:.0f} s"
    if is_ready:
        with contextlib.suppress(EOFError):
            outcome: Outcome = receiver.recv()
            process.join()
            return outcome
        process.join()
        text = f"the process died with exit code {process.exitcode}"
    process.kill()
    process.join()
    return Outcome(name, *(Verdict("CRASH", text) for _ in TRIALS))


def _guarded(judge: Callable[[nn.Module], Verdict], model: nn.Module) -> Verdict:
    try:
        return judge(model)
    except Exception as error:
        return Verdict("CRASH", f"{type(error).__name__}: {_line(error)}")


def _line(error: BaseException) -> str:
    """The first 300 characters of a message, on one line."""
    return re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__


def _tokens(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(3, FIRST_SPECIAL_TOKEN, shape, generator=generator)


def _logits(model: nn.Module, ids: Tensor) -> Tensor | None:
    """``[B, T, V]`` for ids ``[T]`` or ``[B, T]``; None if the model takes no tokens alone."""
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)  # a few draw in their forward
            return model(input_ids=torch.atleast_2d(ids), use_cache=False).logits
    except Exception:
        return None


def _used(model: nn.Module, ids: Tensor) -> set[str]:
    """The parameters that a prompt's logits depend on; all if that cannot be tried."""
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model(input_ids=ids, use_cache=False).logits.sum().backward()
    except Exception:
        return {name for name, _ in model.named_parameters()}
    used = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return used


def _rows_to_train(model: nn.Module, layers: Sequence[Site], ids: Tensor) -> list[list[int]]:
    """Two rows of every layer that runs."""
    try:
        run = layers_that_run(model, ids)
    except NoReference:
        run = [True] * len(layers)
    return [_two_rows(layer, i) if run[i] else [] for i, layer in enumerate(layers)]


def _two_rows(layer: Site, index: int) -> list[int]:
    if not layer.weights:
        return []
    return sorted({(3 * index + 1) % layer.width, (5 * index + 8) % layer.width})


def _train(model: nn.Module, batch: Tensor, generator: torch.Generator) -> None:
    # Molmo2 takes no tokens alone in training mode, and is trained in the other.
    model.train(_logits(model.train(), batch) is not None)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        logits = model(input_ids=batch, use_cache=False).logits
        targets = batch.flatten() % logits.shape[-1]
        nn.functional.cross_entropy(logits.flatten(0, -2), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        batch = _tokens(tuple(batch.shape), generator)
    model.eval()


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    if before.keys() != after.keys():
        return sorted(before.keys() ^ after.keys())
    return [key for key, value in after.items() if not torch.equal(value, before[key])]


def _judge_rows(
    layers: Sequence[Site],
    rows: Sequence[Sequence[int]],
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    used: set[str],
) -> str | None:
    """What is wrong with what training moved, if anything.

    Text uses no vision experts (Ernie 4.5 VL), so their rows stay.
    """
    changed = set(_changed(before, after))
    for index, (layer, chosen) in enumerate(zip(layers, rows, strict=True)):
        for weight, axis in layer.weights:
            if not chosen or weight not in used:
                continue
            if weight not in changed and ".vision_" in weight:  # no image, no token there
                continue
            if weight not in changed:
                return f"{weight} of layer {index} has not moved"
            changed.remove(weight)
            moved = (after[weight] != before[weight]).movedim(axis, 0).flatten(1).any(1)
            found = moved.nonzero().flatten().tolist()
            if found != list(chosen):
                return f"of {weight} rows {found[:8]} moved, not {list(chosen)}"
    return f"{sorted(changed)[0]} moved" if changed else None
