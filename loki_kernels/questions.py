"""General multiple-choice questions: the bundled calibration set, and a user's own prompts."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import explained, import_extra
from .tokenizing import writes_chats

_LETTERS = "ABCD"
_OF_TOKENIZERS = frozenset({"tokenize", "return_dict", "return_tensors", "tokenizer_kwargs"})
# Of 5 bundled questions a subject, the analysis uses 3 (171 in all) and leaves 2 for evaluation.
CALIBRATION_PER_SUBJECT = 3


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
        """What to give `attribute`: a chat if the tokenizer writes chats, else the text."""
        if not writes_chats(tokenizer):
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
        where = f"questions.jsonl, line {number}"
        question = _checked(from_json(line, where), where)
        by_subject.setdefault(question.subject, []).append(question)
    least = min(len(questions) for questions in by_subject.values())
    wanted = least - skip if per_subject is None else per_subject
    if wanted < 1 or skip < 0 or skip + wanted > least:
        raise ValueError(f"each subject has {least} questions; {skip} + {wanted} were asked for.")
    return [q for questions in by_subject.values() for q in questions[skip : skip + wanted]]


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Read MMLU's headerless csv (question, four choices, letter), jsonl or parquet.

    A record of the latter two has ``question``, ``choices`` (four) and ``answer`` (0 to 3, or a
    letter).

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: for parquet without the ``datasets`` extra.
        ValueError: for another suffix, or a record that is not a question, naming the line.
    """
    questions = [_checked(record, where) for where, record in records_of_file(Path(path))]
    if not questions:
        raise ValueError(f"{path} holds no question.")
    return questions


class PromptStream(Iterable[Any]):
    """Prompts of a file or a dataset, read whenever they are gone through and never held.

    Records are questions, as `read_questions` takes them, or have ``messages`` (a chat), ``prompt``
    or ``text``. All are read once at the start, so that what is neither raises before anything else
    is done.
    """

    def __init__(self, records: Callable[[], Iterator[tuple[str, Any]]]) -> None:
        """``records`` begins anew at each call; each comes with the place to name in an error."""
        self._records = records
        self._count = sum(1 for _ in self)

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> PromptStream:
        """Of csv, jsonl or parquet.

        Raises:
            FileNotFoundError: if there is no such file.
            ImportError: for parquet without the ``datasets`` extra.
            ValueError: for another suffix, no record, or one that is no prompt, naming the line.
        """
        stream = cls(partial(records_of_file, Path(path)))
        if not len(stream):
            raise ValueError(f"{path} holds no question.")
        return stream

    @classmethod
    def of_dataset(cls, name: str, split: str = "test") -> PromptStream:
        """Of a Hugging Face dataset.

        Args:
            name: a hub name or a local folder, with ``:CONFIG`` where it has several, such as
                ``cais/mmlu:all``.
            split: the split to read.

        Raises:
            ImportError: without the ``datasets`` extra.
            ValueError: if it has no record, or one that is no prompt.
        """
        dataset = _load_dataset(name, split)
        stream = cls(lambda: ((f"{name}, record {i}", dict(r)) for i, r in enumerate(dataset)))
        if not len(stream):
            raise ValueError(f"{name} has no record in its split {split!r}.")
        return stream

    def __iter__(self) -> Iterator[Any]:
        for where, record in self._records():
            written = isinstance(record, dict) and "question" not in record
            yield record if written and text_of(record) is not None else _checked(record, where)

    def __len__(self) -> int:
        return self._count


def text_of(record: Mapping[str, Any]) -> Any:
    """The chat or the text of a record in the columns that datasets have; None without one."""
    columns = ("messages", "prompt", "text")  # of mixed records some are null
    return next((record[name] for name in columns if record.get(name) is not None), None)


def template_options_of(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a chat's record gives its template beside the messages, in the columns that TRL reads.

    Raises:
        ValueError: if a column holds something else; it says ``where``.
    """
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"{where}: tools is a string that is no JSON ({error})") from error
    options = record.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise ValueError(
            f"{where}: chat_template_kwargs is a {type(options).__name__}, and no object"
        )
    return ({"tools": tools} if tools else {}) | checked_options(options, f"{where}: ")


def checked_options(options: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """``chat_template_kwargs``; ValueError for what the tokenizer would take for itself."""
    reserved = sorted(_OF_TOKENIZERS & set(options))
    if reserved:
        raise ValueError(
            f"{where}chat_template_kwargs names {reserved[0]}, which is not for the template."
        )
    return dict(options)


def refuse_table(name: str, given: object) -> None:
    """Raise TypeError for a data frame, which iterates over the names of its columns."""
    if hasattr(given, "to_dict") and hasattr(given, "columns"):
        raise TypeError(
            f"{name} is a {type(given).__name__}; give a column of it, {name}['text'].tolist(), or "
            f"its rows, {name}.to_dict('records')."
        )


def records_of_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each record of a file is, and what it is."""
    if path.suffix == ".parquet":
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist.")
        rows = _import_datasets().load_dataset(
            "parquet", data_files=str(path), split="train", streaming=True
        )
        yield from ((f"{path}, record {i}", row) for i, row in enumerate(rows))
        return
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(
            f"{path}: questions are read from .csv or .jsonl, or .parquet, not {path.suffix!r}."
        )
    with open(path, encoding="utf-8-sig", newline="") as file:  # Excel begins with a mark
        reader = csv.reader(file)
        try:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        where = f"{path}, line {number}"
                        yield where, from_json(line, where)
            else:
                for fields in reader:
                    where = f"{path}, line {reader.line_num}"
                    yield where, _from_csv(fields, where)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text.") from error
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num} is not csv: {error}.") from error


def _load_dataset(name: str, split: str) -> Any:
    folder = Path(name).exists()  # on Windows it may have a colon
    path, _, config = (name, "", "") if folder else name.partition(":")
    return _import_datasets().load_dataset(path, config or None, split=split)


def _import_datasets() -> Any:
    return import_extra("datasets", "datasets", "reading a dataset needs datasets")


def from_json(line: str, where: str) -> Any:
    """A line of a jsonl file; ValueError, naming where it is, if it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error


def _from_csv(fields: list[str], where: str) -> dict[str, Any]:
    if len(fields) != 6:
        raise explained(ValueError(f"{where} has {len(fields)} fields; MMLU's csv has 6."))
    return {"question": fields[0], "choices": fields[1:5], "answer": fields[5].strip()}


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
