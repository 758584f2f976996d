from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

# Deterministic cuBLAS, which tests/ops asks for, needs this before CUDA starts, or always warns.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest

# Imported when a test is collected or run: pytest-xdist's first process, which only hands them
# out, would import transformers for eight seconds before the others start.
if TYPE_CHECKING:
    import torch
    import transformers

# The files of a minute each, heaviest first: started last, one would leave other workers idle.
FIRST = (
    "test_forgetting",
    "test_distributed",
    "test_gpu_script",
    "test_smollm2",
    "test_compile_triton",
)
SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where models are tested: cpu, cuda, cuda:1")


def pytest_collection(session: pytest.Session) -> None:
    from tests import models

    models.set_device(session.config.getoption("--device"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(n) if (n := item.path.stem) in FIRST else len(FIRST))


@pytest.fixture(scope="session")
def device() -> torch.device:
    from tests import models

    return models.DEVICE


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    from tests.models import build_model

    return build_model()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the shared evaluation data is not here")
    return SHARED


@pytest.fixture
def prompts() -> list[dict[str, torch.Tensor]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 97, (n,), generator=generator)} for n in (1, 7, 13, 4)]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, as a checkpoint."""
    from tests.models import save_base

    return save_base(tmp_path_factory.mktemp("base"))
