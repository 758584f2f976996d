"""What a study's file says."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loki_kernels.errors import check_choice

from .methods import Method


@dataclass(frozen=True)
class Training:
    steps: int
    batch_size: int
    checkpoints: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.checkpoints[-1] != self.steps:
            raise ValueError(f"the last of checkpoints={self.checkpoints} must be {self.steps=}")


@dataclass(frozen=True)
class Evaluation:
    """``records`` of each set of questions and, in ``task_records``, of a task's fold; ``windows``
    of text."""

    records: int
    windows: int
    task_records: dict[str, int]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Stability:
    """How many questions each comparison takes; ``blocks`` of 5 MMLU questions a subject."""

    blocks: int
    steps: int
    definitions: int
    dtype: int


@dataclass(frozen=True)
class Stage:
    """Some methods on one task: a sweep of learning rates, then every seed.

    With ``after``, on top of what each method learned in that stage. Instead of a sweep,
    ``learning_rate`` is every method's, or names the stage whose best learning rates, times
    ``rate_factor``, are taken.
    """

    name: str
    task: str
    methods: tuple[str, ...]
    training: Training
    after: str | None = None
    learning_rate: float | str | None = None
    rate_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.after is not None and self.learning_rate is None:
            raise ValueError(f"{self.name}: a stage after another needs a learning_rate")
        if self.rate_factor != 1.0 and not isinstance(self.learning_rate, str):
            raise ValueError(f"{self.name}: rate_factor is for another stage's learning_rate")


@dataclass(frozen=True)
class Study:
    """A study's file.

    ``questions`` says for each definition how many of the questions that `loki.patch` takes by
    itself are analysed; ``quotas`` are zeroed in the rows that come out.
    """

    questions: dict[str, int]
    evaluation: Evaluation
    methods: dict[str, Method]
    stages: tuple[Stage, ...]
    quotas: tuple[float, ...]
    stability: Stability

    @classmethod
    def load(cls, path: Path) -> Study:
        """Read a study's file.

        Raises:
            ValueError: if it names a method or setting that does not exist.
        """
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        try:
            methods = {
                name: Method(**{k: _frozen(v) for k, v in fields.items()})
                for name, fields in content["methods"].items()
            }
            training = Training(**{k: _frozen(v) for k, v in content["training"].items()})
            stages = []
            for fields in content["stage"]:
                fields = {k: _frozen(v) for k, v in fields.items()}
                own = {k: fields.pop(k) for k in ("steps", "checkpoints") if k in fields}
                stages.append(Stage(**fields, training=replace(training, **own)))
            evaluation = Evaluation(**{k: _frozen(v) for k, v in content["evaluation"].items()})
            questions = content["analysis"]["questions"]
            quotas = tuple(content["suppression"]["quotas"])
            counts = Stability(**content["stability"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        swept: dict[str, Stage] = {}
        for stage in stages:
            for name in stage.methods:
                check_choice("method", name, methods)
            for other in (stage.after, stage.learning_rate):
                if isinstance(other, str):
                    check_choice("stage", other, swept)
                    for name in stage.methods:
                        check_choice(f"method of {other}", name, swept[other].methods)
            if stage.learning_rate is None:
                swept[stage.name] = stage
        return cls(questions, evaluation, methods, tuple(stages), quotas, counts)

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
