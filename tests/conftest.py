from __future__ import annotations

import os
from pathlib import Path

# Deterministic cuBLAS, which tests/ops asks for, needs this before CUDA starts, or always warns.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
import transformers

from tests import models
from tests.models import build_model, save_base

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where models are tested: cpu, cuda, cuda:1")


def pytest_configure(config: pytest.Config) -> None:
    models.set_device(config.getoption("--device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return models.DEVICE


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    return build_model()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the shared evaluation data is not here")
    return SHARED


@pytest.fixture
def prompts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 97, (n,), generator=generator)} for n in (1, 7, 13, 4)]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, as a checkpoint."""
    return save_base(tmp_path_factory.mktemp("base"))
