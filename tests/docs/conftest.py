from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loki_kernels.protection.samples import draw_samples

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHAT_TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the model that the pages name is a tiny one, to be loaded by that name."""
    from transformers import AutoTokenizer

    from tests.models import save_base

    root = tmp_path_factory.mktemp("hub")
    model = root / NAME
    model.mkdir(parents=True)
    save_base(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.pad_token = None  # as Llama's and Mistral's
    tokenizer.save_pretrained(model)
    return root


@pytest.fixture
def reader(
    hub: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The folder where someone tries what a page says; an analysis is kept for the next page."""
    (tmp_path / "HuggingFaceTB").symlink_to(hub / "HuggingFaceTB")
    monkeypatch.chdir(tmp_path)
    cache = tmp_path_factory.getbasetemp() / "pages-cache"
    monkeypatch.setenv("LOKI_KERNELS_CACHE", str(cache))
    monkeypatch.setattr("loki_kernels.protection.estimate.draw_samples", _few_samples)
    return tmp_path


def _few_samples(model: Any, tokenizer: Any, **_: Any) -> list[list[int]]:
    return draw_samples(model, tokenizer, count=4, length=16, progress=False)
