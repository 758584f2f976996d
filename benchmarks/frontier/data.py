"""The frontier's texts as token ids, written once so that a machine without them can run."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loki_kernels as loki
from loki_kernels.demo.evaluation import general_text
from loki_kernels.files import atomic_path
from loki_kernels.protection.samples import draw_samples
from loki_kernels.tokenizing import before_every_text

from ..records import read_lines

LENGTH = 256  # tokens of every sequence
TASKS = ("shakespeare", "gsm8k")
PARTS = ("train", "test")
# Where the model is compared with the base; 16 windows of 256 tokens each.
DOMAINS = ("wikitext", "code", "chat")
# What the general inputs and the sensitivities are estimated on, and what replay replays.
SOURCES = ("samples", "docs")
_IGNORED = -100


class Data:
    """Sequences ``[n, 256]`` of ids and labels, -100 where nothing is predicted.

    ``ids`` and ``labels`` are keyed by ``<task>/train``, ``<task>/test``, a domain or a source.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.ids = {k.removesuffix(":ids"): v.long() for k, v in tensors.items() if ":ids" in k}
        self.labels = {
            k.removesuffix(":labels"): v.long() for k, v in tensors.items() if ":labels" in k
        }

    @classmethod
    def load(cls, path: Path) -> Data:
        return cls(load_file(path))

    def digest(self) -> str:
        """What tells these sequences from others."""
        found = hashlib.sha256()
        for part in (self.ids, self.labels):
            for name in sorted(part):
                found.update(name.encode() + part[name].to(torch.int32).cpu().numpy().tobytes())
        return found.hexdigest()[:12]

    def texts_of(self, source: str, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Ids and labels of a source; of ``count`` of its sequences, at equal distances."""
        ids, labels = self.ids[source], self.labels[source]
        if count is None or count >= len(ids):
            return ids, labels
        chosen = torch.linspace(0, len(ids) - 1, count).round().long()
        return ids[chosen], labels[chosen]

    def to(self, device: str) -> Data:
        for part in (self.ids, self.labels):
            part.update({name: tensor.to(device) for name, tensor in part.items()})
        return self


def write_data(path: Path, shared: Path, drawn: Path, model: Any, tokenizer: Any) -> None:
    """Tokenize the texts of ``shared`` and put the model's own to them.

    Those are read from ``drawn`` if there is such a file. Else they are drawn, which no other
    machine repeats, and ``drawn`` is written: ``samples`` and ``answers`` as lists of tokens.
    """
    goals = _goals(shared, tokenizer)
    if not drawn.is_file():
        _draw(drawn, goals, model, tokenizer)
    own = json.loads(drawn.read_text(encoding="utf-8"))
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (train, test) in {
        "shakespeare": _shakespeare(shared, tokenizer),
        "gsm8k": _gsm8k(shared, tokenizer),
    }.items():
        parts[f"{name}/train"], parts[f"{name}/test"] = train, test
    wikitext = (shared / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    parts["wikitext"] = _windows(tokenizer, _tokens(tokenizer, wikitext), 16)
    solutions = [
        record["prompt"] + record["canonical_solution"]
        for record in read_lines(shared / "general" / "HumanEval.jsonl")
    ]
    parts["code"] = _windows(tokenizer, _tokens(tokenizer, "\n\n".join(solutions)), 16)
    chats = [(goal + text, len(goal)) for goal, text in zip(goals, own["answers"], strict=True)]
    parts["chat"] = _pad(chats, tokenizer.eos_token_id)
    parts["docs"] = _docs(tokenizer)
    parts["samples"] = _pad([(sample, 1) for sample in own["samples"]], tokenizer.eos_token_id)
    tensors = {}
    for name, (ids, labels) in parts.items():
        tensors[f"{name}:ids"] = ids.to(torch.int32)
        tensors[f"{name}:labels"] = labels.to(torch.int32)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _windows(tokenizer: Any, ids: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """``count`` windows at equal distances, each after what the tokenizer begins a text with.

    All but the first token is predicted.
    """
    start = before_every_text(tokenizer)
    length = LENGTH - len(start)
    stride = (len(ids) - length) / max(1, count - 1)
    places = [int(i * stride) for i in range(count)]
    windows = torch.tensor([[*start, *ids[place : place + length]] for place in places])
    return windows, _all_but_first(windows)


def _all_but_first(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[:, 0] = _IGNORED
    return labels


def _pad(rows: Sequence[tuple[list[int], int]], padding: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and, from the given place on, labels; longer sequences are cut."""
    ids = torch.full((len(rows), LENGTH), padding)
    labels = torch.full((len(rows), LENGTH), _IGNORED)
    for i, (tokens, start) in enumerate(rows):
        tokens = tokens[:LENGTH]
        ids[i, : len(tokens)] = torch.tensor(tokens)
        labels[i, start : len(tokens)] = ids[i, start : len(tokens)]
    return ids, labels


def _shakespeare(shared: Path, tokenizer: Any) -> Any:
    """The plays: windows of the first nine tenths, overlapping by half, and 16 of the last."""
    text = (shared / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    ids = _tokens(tokenizer, text)
    cut = len(ids) * 9 // 10
    train, test = ids[:cut], ids[cut:]
    return _windows(tokenizer, train, 2 * cut // LENGTH), _windows(tokenizer, test, 16)


def _gsm8k(shared: Path, tokenizer: Any) -> Any:
    """Problems as chats, labelled on the solution; 64 are held out."""
    rows = []
    for record in read_lines(shared / "general" / "gsm8k_test.jsonl"):
        prompt = _prompt(tokenizer, record["question"])
        rows.append((prompt + _answer(tokenizer, record["answer"]), len(prompt)))
    rows = [row for row in rows if len(row[0]) <= LENGTH]
    random.Random(0).shuffle(rows)
    return _pad(rows[64:], tokenizer.eos_token_id), _pad(rows[:64], tokenizer.eos_token_id)


def _prompt(tokenizer: Any, question: str) -> list[int]:
    """A chat, or what a model that knows none goes on from."""
    if tokenizer.chat_template is None:
        return tokenizer(f"Question: {question}\nAnswer:\n")["input_ids"]
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]


def _answer(tokenizer: Any, text: str) -> list[int]:
    return _tokens(tokenizer, text + tokenizer.eos_token)


def _docs(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Python's documentation, and the package's questions with their answers: 3 to 1."""
    text = [window["input_ids"] for window in general_text(tokenizer, 192, LENGTH)]
    questions = loki.load_questions()
    chats = []
    for question in questions[:: len(questions) // 64][:64]:
        prompt = _prompt(tokenizer, question.text())
        chats.append((prompt + _answer(tokenizer, question.choices[question.answer]), 1))
    ids, labels = _pad(chats, tokenizer.eos_token_id)
    windows = torch.tensor(text)
    return torch.cat([windows, ids]), torch.cat([_all_but_first(windows), labels])


def _goals(shared: Path, tokenizer: Any) -> list[list[int]]:
    """Everyday questions (PIQA's) as prompts."""
    goals = [
        record["query"].removeprefix("Question: ").split("\n")[0]
        for record in read_lines(shared / "general" / "piqa.jsonl")
    ]
    return [_prompt(tokenizer, goal) for goal in goals[:: len(goals) // 40][:40]]


def _draw(path: Path, goals: Sequence[list[int]], model: Any, tokenizer: Any) -> None:
    """The model's samples, and its answers to the questions, at temperature 1."""
    answers = _generate(model, tokenizer, goals, 128)
    samples = draw_samples(model, tokenizer, length=LENGTH)
    text = json.dumps({"samples": samples, "answers": answers}, separators=(",", ":"))
    with atomic_path(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


@torch.no_grad()
def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], count: int
) -> list[list[int]]:
    """What follows the prompts at temperature 1, up to and with the token that ends each."""
    stop = tokenizer.eos_token_id
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.eos_token_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):  # padded on the left
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    tokens = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        repetition_penalty=1.0,
        max_new_tokens=count,
        eos_token_id=stop,
        pad_token_id=stop,
    )[:, longest:].tolist()
    return [row[: row.index(stop) + 1] if stop in row else row for row in tokens]
