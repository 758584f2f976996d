"""A callback for HF Trainer that measures the drift while a model is trained."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable
from typing import Any

from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..options import DEFAULT_LENGTH, DEFAULT_TOKENS
from .measure import Base, compare, record
from .meter import check_positive
from .models import without_update
from .result import summarize
from .texts import read_texts, tokenize


class DriftCallback(TrainerCallback):
    """Log how far a Trainer's model has moved from its base, as `drift` measures it.

    That is a patched or PEFT's model without its update, and else what it was at step 0.

    ``trainer.add_callback(DriftCallback(trainer, "texts.jsonl", every=100))`` logs ``drift/kl``
    (nats a token) and ``drift/perplexity`` at step 0, at every evaluation or ``every`` steps, and
    after the last step, unless ``load_best_model_at_end`` has put another in its place after an
    early stop; with several domains of texts that are given also ``drift/kl/<domain>``.
    Any method is measured: rows, PEFT's, all weights. Of the base its last hidden states on the
    texts are kept on the host, and a copy of its output head if that may be trained. In distributed
    training every process measures the same texts.

    A resumed run of a model that holds no base raises ValueError.
    """

    def __init__(
        self,
        trainer: Trainer,
        texts: Any = None,
        *,
        every: int | None = None,
        tokenizer: Any = None,
        length: int = DEFAULT_LENGTH,
        tokens: int | None = DEFAULT_TOKENS,
    ) -> None:
        """Read the texts.

        Args:
            trainer: whose model is measured, and which logs.
            texts: as for `drift`.
            every: steps between two measurements; None measures at evaluations.
            tokenizer: by default the Trainer's ``processing_class``.
            length: as for `drift`.
            tokens: as for `drift`. Each measurement is a forward pass over so many.

        Raises:
            ValueError: for texts that are empty or damaged, or options out of range.
            TypeError: for text without a tokenizer, or what is no text.
            FileNotFoundError: if there is no such file.
        """
        check_positive(every=every, length=length, tokens=tokens)
        tokenizer = trainer.processing_class if tokenizer is None else tokenizer
        self._corpus = tokenize(read_texts(texts), tokenizer, length, tokens)
        self._domains = texts is not None and len(set(self._corpus.domains)) > 1
        self._trainer = trainer
        self._every = every
        self._base: Base | None = None
        self._of: Callable[[], Any] = lambda: None  # the model that it is of
        self._measured = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._measured = -1
        if self._of() is not self._trainer.model:
            self._base = None  # else auto_find_batch_size starts anew, from weights that have moved

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Run the base before the first step, when other callbacks have loaded what they resume."""
        if self._base is None:
            self._record(state)
        if not state.global_step:
            self._measure(state, control)

    def _record(self, state: TrainerState) -> None:
        model: Any = self._trainer.model
        kept = None
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(without_update(model))
            except ValueError as error:
                if state.global_step:
                    raise ValueError(
                        "a resumed run does not start from the base, so that DriftCallback cannot "
                        f"measure it: {error} Measure its checkpoints by loki-kernels drift."
                    ) from error
                kept = True  # the head may be unfrozen on the way
            self._base = record(model, self._corpus, kept=kept, progress=False)
        self._of = weakref.ref(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        due = self._every is not None and state.global_step % self._every == 0
        if due or state.global_step >= state.max_steps:
            self._measure(state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._every is None:
            self._measure(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not args.load_best_model_at_end:
            self._measure(state, control)  # of a run that stopped before ``max_steps``
        self._base = None  # tokens x hidden_size, and perhaps a head

    def _measure(self, state: TrainerState, control: TrainerControl) -> None:
        if self._base is None or self._measured == state.global_step:
            return
        model: Any = self._trainer.model
        moves = compare(self._base, model, progress=False)
        self._measured = state.global_step
        found = summarize(self._corpus, moves, ("", ""), None)
        logs = {
            "drift/kl": found.overall.kl,
            "drift/perplexity": found.overall.perplexity_after,
        }
        if self._domains:
            logs |= {f"drift/kl/{domain.name}": domain.kl for domain in found.domains}
        should_log = control.should_log
        # not a subclass's log: TRL's adds, and empties, what it gathered for the next line
        Trainer.log(self._trainer, {k: v for k, v in logs.items() if math.isfinite(v)})
        control.should_log = should_log  # that of a step, which logging has answered
