"""What a model says by itself: general text of its own distribution, which needs no data."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from ..head import check_logits
from ..options import DEFAULT_SAMPLES
from ..placement import computed_if_it_fits
from ..progress import progress_bar
from ..tokenizing import (
    as_its_template_reads,
    before_every_text,
    chat_template_of,
    tokenizer_in,
    writes_chats,
)

logger = logging.getLogger(__name__)

LENGTH = 256  # tokens
# Samples at a time, halved where a device has no room: a GPU waits for the host at every token of a
# batch (638 of them took an H200 86 s), and memory for 96 is 3 GB at 8B. A CPU's products take
# three quarters of the time, and what does not fit there ends the process.
_BATCH_GPU, _BATCH_CPU = 96, 48
# What separates documents in GPT-2's vocabulary and those made after it, where a chat model's own
# first token opens a turn.
_SEPARATOR = "<|endoftext|>"
# What the turns of a chat say, user and assistant by turns, to find what a template writes around.
_SAID = ("0123456789", "9876543210", "5678901234")


@torch.no_grad()
def draw_samples(
    model: Any,
    tokenizer: Any,
    count: int = DEFAULT_SAMPLES,
    length: int = LENGTH,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> list[list[int]]:
    """``count`` samples at temperature 1 of up to ``length`` tokens.

    As many from nothing as from each other opening: of a user's turn where there is a chat
    template, without a system prompt, so that questions and answers are there too.

    Raises:
        ValueError: if the model cannot generate, or says NaN, or the tokenizer has no token to
            start from.
    """
    if not hasattr(model, "generate") or not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} generates no text to estimate a protection from. Name a file "
            "(protect=FILE, by `loki-kernels protection BASE FILE` of the language model it is "
            "built on), give estimate_protection texts, or train without (protect=False)."
        )
    openings, stops = openings_of(tokenizer), stops_of(model, tokenizer)
    begins = before_every_text(tokenizer_in(tokenizer))[:1]
    if len(openings) == 1 and writes_chats(tokenizer):
        logger.warning(
            "the tokenizer shows no user's turn by itself, so no sample is a chat; give "
            "estimate_protection texts if chats must not be forgotten."
        )
    samples: list[list[int]] = []
    size = _BATCH_GPU if model.device.type == "cuda" else _BATCH_CPU
    with _seeded(model, seed), progress_bar(count, "draw the model's samples", progress) as bar:
        for number, (opening, end) in enumerate(openings):
            left = count // len(openings) + (number < count % len(openings))
            ends = [*([] if end is None else [end]), *stops]
            while left:
                together = min(left, size)
                generate = partial(_generate, model, opening, together, length, ends)
                drawn = computed_if_it_fits(generate, f"{together} samples", halves=together > 1)
                if drawn is None:
                    size = together // 2
                    continue
                samples += [text[:-1] if text[-1:] == begins else text for text in drawn]
                left -= len(drawn)
                bar.update(len(drawn))
    return samples


def _separator(tokenizer: Any) -> int | None:
    token = tokenizer.convert_tokens_to_ids(_SEPARATOR)
    known = token is not None and tokenizer.convert_ids_to_tokens(token) == _SEPARATOR
    return token if known else None


@contextlib.contextmanager
def _seeded(model: Any, seed: int) -> Iterator[None]:
    """Generators where the model lies, seeded; all go on afterwards as they would have."""
    devices = {p.device for p in model.parameters()}
    on_cuda = sorted(device.index for device in devices if device.type == "cuda")
    others = {device.type for device in devices} - {"cpu", "cuda", "meta"}  # mps, xpu
    states = {kind: torch.get_device_module(kind).get_rng_state() for kind in others}
    with torch.random.fork_rng(on_cuda):
        # torch.manual_seed would seed devices too that are not put back
        torch.default_generator.manual_seed(seed)
        for index in on_cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        try:
            for kind in others:
                torch.get_device_module(kind).manual_seed(seed)
            yield
        finally:
            for kind, state in states.items():
                torch.get_device_module(kind).set_rng_state(state)


def openings_of(tokenizer: Any) -> list[tuple[list[int], int | None]]:
    """What a document starts with, and a user's turn if there is a chat template; their last token.

    A chat goes on after the end of a turn. Where a tokenizer begins every text with the same tokens
    (Llama's, Gemma's, GLM's) the model knows none without them. A template that was put to such a
    tokenizer since may lack them, and have brought a separator that the model has never seen. Of a
    processor it is the tokenizer, with the processor's template where that has none.
    """
    template, tokenizer = chat_template_of(tokenizer), tokenizer_in(tokenizer)
    separator, always = _separator(tokenizer), before_every_text(tokenizer)
    starts = [separator, tokenizer.bos_token_id, tokenizer.eos_token_id]
    start = always or [token for token in starts if token is not None][:1]
    if not start:
        raise ValueError("the tokenizer has no token that starts a text; give texts of your own.")
    openings = [(start, tokenizer.eos_token_id if separator is None else separator)]
    if template is not None:
        turn = _user_turn(tokenizer, template)
        if turn:
            # A blank at its end is none of its tokens but of the first word's: alone, as "▁" after
            # Mistral's "[INST]", a model of SentencePiece's tokens knows it before digits and other
            # scripts. One that is a token by itself is what the model says next.
            turn = turn.rstrip(" ") or turn
            opening = tokenizer(turn, add_special_tokens=False)["input_ids"]
            begun = opening[: len(always)] == always
            openings.append((opening if begun else always + opening, separator))
    return openings


def stops_of(model: Any, tokenizer: Any) -> list[int]:
    """After which tokens a sample says no more, beside the end that its opening has.

    The first token of every text, if there is one: a second text's would be read as an attention
    sink, whose inputs may hold most of a layer's energy. And the ends that tokenizer and model name
    (Llama 3's documents have one that the model's generation config alone names), without those
    that chats contain, which go on after them.
    """
    template, own = chat_template_of(tokenizer), tokenizer_in(tokenizer)
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, (list, tuple)) else [named]
    chats = "" if template is None else "".join(_chats(own, template))
    # words are not among these, whatever a config's class has for a default
    added = getattr(own, "added_tokens_decoder", {})
    ends = [getattr(own, "eos_token_id", None), *named]
    ends = [token for token in ends if token in added and str(added[token]) not in chats]
    return list(dict.fromkeys([*before_every_text(own)[:1], *ends]))


def _chats(tokenizer: Any, template: Any) -> list[str]:
    """Chats of one turn, two and three of `_SAID`, as many as a template takes, as it has them."""
    import jinja2

    chats: list[str] = []
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": text} for role, text in zip(roles, _SAID, strict=True)]
    with contextlib.suppress(jinja2.TemplateError):  # none by a user alone, or one turn only
        for count in range(1, len(turns) + 1):
            chat = as_its_template_reads(turns[:count], tokenizer, template)
            chats.append(
                tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
            )
    return chats


def _user_turn(tokenizer: Any, template: Any) -> str:
    """What opens a user's turn, without the system prompt that a template puts before the first.

    SmolLM2's prompt before every chat made what is drawn, and so what is protected, much alike: a
    tuned model's KL was 1.7 times what it is without (Shakespeare, 40 steps, at equal loss). Others
    have today's date in it, with which samples would change from day to day.
    """
    question, answer, mark = _SAID
    chats = _chats(tokenizer, template)
    first, found, _ = chats[0].partition(question) if chats else ("", "", "")
    if not found:
        return ""
    if len(chats) < 3:
        return first
    _, talk, longer = chats
    if longer.startswith(talk):
        turn = longer[len(talk) :].partition(mark)[0]
    else:
        turn = _after_the_end(tokenizer, talk, longer.partition(mark)[0], answer)
    start = tokenizer.bos_token
    if turn and start and first.startswith(start) and not turn.startswith(start):
        turn = start + turn
    return turn or first


def _after_the_end(tokenizer: Any, talk: str, longer: str, answer: str) -> str:
    """What stands between an answer's end and the next turn, where a last answer ends otherwise.

    gpt-oss ends it with ``<|return|>`` and others with ``<|end|>``. Empty if the other end is none
    of as many added tokens.
    """
    end, between = (text.rpartition(answer)[2] for text in (talk, longer))
    added = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    for _ in tokenizer.tokenize(end):
        token = next((token for token in added if between.startswith(token)), None)
        if token is None:
            return ""
        between = between[len(token) :]
    return between


def _generate(
    model: Any, opening: list[int], count: int, length: int, ends: list[int]
) -> list[list[int]]:
    """Each with the first of ``ends`` that it says, if any, as its last token."""
    prompt = torch.tensor([opening] * count, device=model.device)
    # What the call leaves open, min_p for one, generate takes from the model's own config. And off
    # the CPU it would copy the experts that each sample chooses, for each token anew, which suits a
    # few samples: 96 of Qwen3-30B-A3B choose nearly all, and 7 GB a layer would be copied.

    def check(_: Tensor, logits: Tensor) -> Tensor:
        check_logits(model, logits)  # CUDA would end the process's work by an assert in the draw
        return logits

    kept, model.generation_config = model.generation_config, GenerationConfig()
    model.__dict__["_optimize_model_for_decode"] = contextlib.nullcontext
    try:
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            # By default a process waits at each token for others where DeepSpeed's ZeRO-3 is
            # configured, whether or not this model is split; one alone may be sampling.
            synced_gpus=False,
            do_sample=True,
            top_k=0,
            max_new_tokens=max(1, length - len(opening)),
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            logits_processor=LogitsProcessorList([check]),
        ).tolist()
    finally:
        model.generation_config = kept
        del model.__dict__["_optimize_model_for_decode"]
    texts = []
    for row in tokens:
        last = next((i for i in range(len(opening), len(row)) if row[i] in ends), len(row))
        texts.append(row[: last + 1])
    return texts
