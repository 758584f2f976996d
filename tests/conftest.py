from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
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
    "test_distributed",
    "test_gpu_script",
    "test_smollm2",
    "test_compile_triton",
    "test_forgetting",
)
SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where models are tested: cpu, cuda, cuda:1")


def pytest_configure(config: pytest.Config) -> None:
    # What a developer has set (a backend, a cache) is nothing that tests should run with. The one
    # name that is kept says where benchmarks/gpu.sh wants its records.
    for name in [n for n in os.environ if n.startswith("LOKI_KERNELS_")]:
        if name != "LOKI_KERNELS_RESULTS":
            del os.environ[name]
    # Before a test module imports datasets, which reads it then.
    folder = tempfile.TemporaryDirectory(prefix="datasets-")
    config.add_cleanup(folder.cleanup)
    os.environ["HF_DATASETS_CACHE"] = folder.name


def pytest_collection(session: pytest.Session) -> None:
    from tests import models

    models.set_device(session.config.getoption("--device"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(n) if (n := item.path.stem) in FIRST else len(FIRST))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where a test names no folder of its own, what is analysed is not the user's to keep.

    Set for the session, so that a test's `monkeypatch.undo` does not unset it.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LOKI_KERNELS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of this process alone, in which sharding does all that it does among others."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


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
