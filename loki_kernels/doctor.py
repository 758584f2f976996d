"""Whether this installation works: its versions, every kernel that can run, and a tiny job."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from packaging.requirements import Requirement
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from ._version import __version__
from .attribution.attribute import attribute
from .cache import cache_folder
from .environment import environment
from .files import check_folder
from .ops import _dispatch
from .placement import device_to_use
from .selection import select
from .training.patching import patch

Status = Literal["pass", "FAIL", "skip"]


@dataclass(frozen=True)
class Check:
    """One line of the report: what was tried, how it went, what was found, in how many seconds."""

    name: str
    status: Status
    detail: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.status}  {self.name:16} {self.detail} ({self.seconds:.1f} s)"


class _Skip(Exception):
    """What cannot be tried here, which is no failure."""


def examine() -> Iterator[Check]:
    """Try one thing after another, and yield each verdict as soon as it is known.

    It takes under a minute on a CPU, downloads nothing and leaves no file. A check that raises is
    one that fails; the others go on.
    """
    yield _check("versions", _versions)
    yield _check("device", _device)
    for backend in _dispatch.BACKENDS:
        yield _check(f"kernels, {backend}", functools.partial(_kernels, backend))
    yield _check("peft", _peft)
    yield _check("cache", _cache)
    yield _check("fine-tune", _fine_tune)


def _check(name: str, work: Callable[[], str]) -> Check:
    start = time.perf_counter()
    status: Status = "pass"
    try:
        detail = work()
    except _Skip as reason:
        status, detail = "skip", str(reason)
    except Exception as error:
        status, detail = "FAIL", f"{type(error).__name__}: {error}"
    return Check(name, status, " ".join(detail.split()), time.perf_counter() - start)


# Extras whose packages run beside this one; of mkdocs, say, another project may want another.
_USED = ("datasets", "demo", "gpu", "hdf5", "parquet", "peft", "plot")


def _versions() -> str:
    """What is installed, against what this package's metadata asks for."""
    found = {"loki_kernels": __version__, "python": platform.python_version()}
    try:
        texts = importlib.metadata.requires("loki-kernels") or []
    except importlib.metadata.PackageNotFoundError:
        raise _Skip("the package runs from a folder that was never installed.") from None
    for requirement in map(Requirement, texts):
        name = requirement.name
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if needed:
                raise RuntimeError(f"{name} is not installed (pip install {name!r}).") from None
            continue
        used = needed or any(
            requirement.marker.evaluate({"extra": extra})  # type: ignore[union-attr]
            for extra in _USED
        )
        if used and not requirement.specifier.contains(version, prereleases=True):
            wanted = f"{name}{requirement.specifier}"
            raise RuntimeError(f"{name} {version} is installed; pip install -U {wanted!r}.")
        if needed or requirement.specifier:  # of the extras, those that ask for a version
            found[name] = version
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _device() -> str:
    if torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
        if listed.returncode == 0 and listed.stdout.strip():
            raise RuntimeError(
                f"there is {listed.stdout.splitlines()[0]}, but torch {torch.__version__} is a "
                "build for the CPU."
            )
    return environment()["device"]


def _kernels(backend: _dispatch.Backend) -> str:
    """Run every kernel of ``backend`` against its reference, forward and backward."""
    reason = _dispatch.why_not(backend)
    if reason is not None:
        raise _Skip(reason)
    dtypes = [torch.float32]
    if torch.cuda.is_available() and backend != "cpp":
        dtypes.append(torch.bfloat16)
    for dtype in dtypes:
        results = _dispatch.compare_all(backend, dtype)
        for op, result in results.items():
            if result is not None:
                raise RuntimeError(f"{op} in {dtype}: {result}")
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"the references' results in {names}: {', '.join(results)}"


def _peft() -> str:
    """Whether PEFT takes LoKI as one of its methods."""
    if importlib.util.find_spec("peft") is None:
        raise _Skip("peft is not installed (pip install 'peft>=0.18').")
    config: Any = importlib.import_module(f"{__package__}.peft").LokiConfig(rows=[[0]])
    return f"LokiConfig is PEFT's method {config.peft_type.value}"


def _cache() -> str:
    """Whether analyses and protections can be kept; `patch` works without, but anew each time."""
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    check_folder(existing)
    return f"{folder} can be written"


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without transformers' progress bars, which would lie between the lines."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _fine_tune() -> str:
    """Attribute, select, patch, train, save and load a random model of three layers."""
    device = device_to_use()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97, hidden_size=48, intermediate_size=112, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config)
        model.to(device)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        prompts = [{"input_ids": torch.randint(3, 97, (length,))} for length in (5, 9, 9)]
        ids = torch.randint(3, 97, (4, 9), device=device)
        rows = select(attribute(model, prompts, progress=False), quota=10.0)
        patch(model, rows)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.05)
        losses = []
        for _ in range(20):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if not losses[-1] < 0.9 * losses[0]:
            raise RuntimeError(f"the loss went from {losses[0]:.2f} to {losses[-1]:.2f}.")
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            torch.no_grad(),
            _without_bars(),
        ):
            model.save_pretrained(folder)
            saved: Any = AutoModelForCausalLM.from_pretrained(folder)
            saved.to(device)
            torch.testing.assert_close(saved(ids).logits, model.eval()(ids).logits)
    differ = {name: tensor != before[name] for name, tensor in saved.state_dict().items()}
    changed = [
        tensor.any(-1).nonzero()[:, 0].tolist() for tensor in differ.values() if tensor.any()
    ]
    if changed != [layer.tolist() for layer in rows]:
        raise RuntimeError(f"rows {changed} changed, and {rows} was selected.")
    return (
        f"on {device}: loss {losses[0]:.2f} to {losses[-1]:.2f}, {sum(rows.counts)} selected rows "
        "changed and no other, the checkpoint gives the same logits"
    )
