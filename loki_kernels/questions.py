"""General multiple-choice questions: the bundled calibration set, and a user's own."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

_LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """A four-option question; ``answer`` is the right choice's number, 0 to 3."""

    question: str
    choices: tuple[str, str, str, str]
    answer: int
    subject: str = ""

    def text(self) -> str:
        """The question in MMLU's format, ending where the answer's letter would stand."""
        options = "\n".join(
            f"{letter}. {choice}" for letter, choice in zip(_LETTERS, self.choices, strict=True)
        )
        return f"{self.question}\n{options}\nAnswer:"

    def prompt(self, tokenizer: Any) -> str | list[dict[str, str]]:
        """What to give `attribute`: a chat if the tokenizer has a chat template, else the text."""
        if getattr(tokenizer, "chat_template", None) is None:
            return self.text()
        return [{"role": "user", "content": self.text()}]


def load_questions(per_subject: int | None = None, *, skip: int = 0) -> list[Question]:
    """The bundled questions: 5 for each of MMLU's 57 subjects, in subject order.

    Written for this package. ``per_subject`` takes that many of each subject after leaving out the
    first ``skip``.

    Raises:
        ValueError: if a subject has fewer than asked for.
    """
    text = resources.files("loki_kernels").joinpath("data/questions.jsonl").read_text("utf-8")
    by_subject: dict[str, list[Question]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        question = _from_json(line, f"questions.jsonl, line {number}")
        by_subject.setdefault(question.subject, []).append(question)
    least = min(len(questions) for questions in by_subject.values())
    wanted = least - skip if per_subject is None else per_subject
    if wanted < 1 or skip < 0 or skip + wanted > least:
        raise ValueError(f"each subject has {least} questions; {skip} + {wanted} were asked for.")
    return [q for questions in by_subject.values() for q in questions[skip : skip + wanted]]


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Read MMLU's headerless csv (question, four choices, letter) or jsonl.

    A jsonl line has ``question``, ``choices`` (four) and ``answer`` (0 to 3, or a letter).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another suffix, or a record that is not a question, naming the line.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path}: questions are read from .csv or .jsonl, not {path.suffix!r}.")
    with open(path, encoding="utf-8-sig", newline="") as file:  # Excel begins with a mark
        reader = csv.reader(file)
        try:
            if path.suffix == ".jsonl":
                questions = [
                    _from_json(line, f"{path}, line {number}")
                    for number, line in enumerate(file, 1)
                    if line.strip()
                ]
            else:
                questions = [
                    _from_csv(fields, f"{path}, line {reader.line_num}") for fields in reader
                ]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text.") from error
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num} is not csv: {error}.") from error
    if not questions:
        raise ValueError(f"{path} holds no question.")
    return questions


def read_dataset(name: str, split: str = "test") -> list[Question]:
    """Questions of a Hugging Face dataset with MMLU's columns (``question, choices, answer``).

    Args:
        name: a hub name or a local folder, with ``:CONFIG`` where it has several, such as
            ``cais/mmlu:all``.
        split: the split to read.

    Raises:
        ImportError: without the ``datasets`` extra.
        ValueError: if its records are not questions.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading a dataset needs: pip install 'loki-kernels[datasets]'."
        ) from error
    path, _, config = name.partition(":")
    records = datasets.load_dataset(path, config or None, split=split)
    return [_checked(dict(r), f"{name}, record {i}") for i, r in enumerate(records)]


def _from_json(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    return _checked(record, where)


def _from_csv(fields: list[str], where: str) -> Question:
    if len(fields) != 6:
        raise ValueError(f"{where} has {len(fields)} fields; MMLU's csv has 6.")
    return _checked(
        {"question": fields[0], "choices": fields[1:5], "answer": fields[5].strip()}, where
    )


def _checked(record: Any, where: str) -> Question:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not an object with question, choices and answer.")
    question, choices, answer = record.get("question"), record.get("choices"), record.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where} has no question.")
    if (
        not isinstance(choices, (list, tuple))
        or len(choices) != 4
        or not all(isinstance(choice, str) for choice in choices)
    ):
        raise ValueError(f"{where} must have four choices.")
    if isinstance(answer, str) and len(answer) == 1 and answer in _LETTERS:
        answer = _LETTERS.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < 4:
        raise ValueError(f"{where} must have an answer from 0 to 3 or A to D; it has {answer!r}.")
    return Question(question, tuple(choices), answer, str(record.get("subject", "")))
