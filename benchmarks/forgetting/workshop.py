"""What pieces share: the data, the model and its analyses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loki_kernels as loki
from loki_kernels import Attribution
from loki_kernels.demo.model import load_smollm2
from loki_kernels.questions import CALIBRATION_PER_SUBJECT, Question

from . import stability
from .precision import DEVICE, keep_head
from .retention import Retention
from .study import Study
from .tasks import Task, load_task


class Workshop:
    """What pieces share: the data, and the model and the analyses, kept in ``work``.

    ``drawings`` is where the heatmaps go.
    """

    def __init__(self, work: Path, data: Path, drawings: Path, study: Study) -> None:
        self.work, self.data, self.drawings = work, data, drawings
        self._model = work / "model"
        if not self._model.is_dir():
            model, tokenizer = load_smollm2()
            partial = work / "model.partial"
            tokenizer.save_pretrained(partial)
            model.save_pretrained(partial)
            partial.rename(self._model)
        self.tokenizer = AutoTokenizer.from_pretrained(self._model)
        self.questions, self.evaluation = study.questions, study.evaluation
        self.retention = Retention(
            data, self.tokenizer, study.evaluation.records, study.evaluation.windows
        )

    def model(self) -> Any:
        """A fresh copy."""
        model = AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32)
        keep_head(model)
        return model.to(DEVICE).eval()

    def task(self, name: str, seed: int) -> Task:
        records = self.evaluation.task_records[name]
        return load_task(name, self.data, self.tokenizer, seed, records)

    def attribution(self, definition: str) -> Attribution:
        """Of the study's questions, evenly taken from those `loki.patch` takes by itself."""
        return self.attribute(self.questions[definition], keep=True)(definition=definition)

    def block(self, number: int) -> Attribution:
        """On 5 questions of each of MMLU's subjects, kept."""
        first = number * stability.BLOCK
        questions = stability.mmlu(self.data, first, stability.BLOCK)
        return self._attribute(questions, keep=True)(definition="published")

    def attribute(self, count: int, keep: bool = False) -> Callable[..., Attribution]:
        """`loki.attribute` on so many of the questions `loki.patch` takes, evenly taken."""
        every = loki.load_questions(CALIBRATION_PER_SUBJECT)
        return self._attribute(every[:: max(1, len(every) // count)][:count], keep)

    def _attribute(self, questions: Sequence[Question], keep: bool) -> Callable[..., Attribution]:
        """With ``keep``, what was computed once is read from the folder."""
        prompts = [question.prompt(self.tokenizer) for question in questions]

        def attribute(model: Any = None, **options: Any) -> Attribution:
            wanted = json.dumps([loki.__version__, options, prompts]) if keep else ""
            digest = hashlib.sha256(wanted.encode()).hexdigest()[:16]
            path = self.work / f"attribution-{digest}.safetensors"
            if keep and path.is_file():
                return Attribution.load(path)
            model = self.model() if model is None else model
            result = loki.attribute(model, prompts, tokenizer=self.tokenizer, **options)
            if keep:
                result.save(path)
            return result

        return attribute
