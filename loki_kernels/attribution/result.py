"""`Attribution` and `AttributionCounts`, and the file that scores are written to as they come."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from .._version import __version__
from ..files import atomic_path, check_writable, read_safetensors, write_safetensors
from ..options import DEFAULT_QUOTA, Criterion
from .definitions import Definition
from .scores import Scores

_FORMAT = "loki-kernels-attribution"
_COUNTS_FORMAT = "loki-kernels-counts"


@dataclass
class Attribution:
    """What `attribute` found.

    Attributes:
        scores: float32 ``[N, L, D]`` on the CPU; memory-mapped when ``out=`` was given.
        targets: int64 ``[N]``, the attributed tokens.
        completeness: float32 ``[N, L]``, ``sum of scores - (F(z) - F(baseline))``, the convergence
            delta: 0 for an exact path integral. None where the definition has none: ``paper``,
            whose scores are plain gradients, and ``captum``, whose scores add up over all
            positions.
        change: float32 ``[N, L]``, ``F(z) - F(baseline)``, what the scores should add up to; None
            like ``completeness``.
        value: float32 ``[N]``, F(z), for example the target token's probability.
        run: how to repeat it: model, definition, steps, versions.
    """

    scores: Tensor
    targets: Tensor
    value: Tensor
    completeness: Tensor | None = None
    change: Tensor | None = None
    run: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        samples, layers, width = self.scores.shape
        return (
            f"Attribution({samples} samples, {layers} layers, {width} nodes, "
            f"definition={self.run.get('definition')!r}, steps={self.run.get('steps')})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``.safetensors``, or to ``.h5``/``.hdf5`` in the authors' layout.

        The HDF5 file holds ``dataset`` ``[N, L, D]`` (float32; the authors' float16 loses small
        scores) and the other tensors beside it. It needs the ``hdf5`` extra.

        Raises:
            ValueError: for another suffix.
        """
        tensors = {"scores": self.scores} | _present(self)
        suffix = Path(path).suffix
        if suffix == ".safetensors":
            write_safetensors(path, tensors, _metadata(_FORMAT, self.run))
        elif suffix in (".h5", ".hdf5"):
            with atomic_path(path) as temporary, import_h5py().File(temporary, "w") as file:
                for name, tensor in tensors.items():
                    file.create_dataset(
                        "dataset" if name == "scores" else name, data=tensor.numpy()
                    )
                file.attrs["run"] = json.dumps(self.run)
        else:
            raise ValueError(f"{path}: save to .safetensors, .h5 or .hdf5, not {suffix!r}.")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Attribution:
        """Read a file written by `save`, by ``attribute(out=...)``, or the authors' HDF5 log.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or is something else.
        """
        path = Path(path)
        if path.suffix in (".h5", ".hdf5"):
            return cls._load_hdf5(path)
        tensors, metadata = read_safetensors(path, _FORMAT)
        return cls(run=json.loads(metadata["run"]), **tensors)

    @classmethod
    def _load_hdf5(cls, path: Path) -> Attribution:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist.")
        try:
            with import_h5py().File(path, "r") as file:
                arrays = {name: torch.from_numpy(file[name][...]) for name in file}
                run = json.loads(file.attrs.get("run", "{}"))
        except OSError as error:
            raise ValueError(f"{path} is not a whole HDF5 file: {error}") from error
        if "dataset" not in arrays or arrays["dataset"].ndim != 3:
            raise ValueError(f"{path} has no 'dataset' [N, L, D].")
        scores = arrays.pop("dataset").to(torch.float32)
        samples = len(scores)
        return cls(
            scores=scores,
            targets=arrays.get("targets", torch.full((samples,), -1)),
            value=arrays.get("value", torch.full((samples,), float("nan"))),
            completeness=arrays.get("completeness"),
            change=arrays.get("change"),
            run=run,
        )

    def heatmap(self, path: str | os.PathLike[str], quota: float = DEFAULT_QUOTA) -> None:
        """Write a PNG of how often each node (layers x nodes) is among the highest and lowest
        ``quota`` % of its layer, as in the paper's Figure 2. It needs the ``plot`` extra."""
        from ..plots import plot_heatmap

        plot_heatmap(self.scores, path, quota)


@dataclass
class AttributionCounts:
    """What ``attribute(keep="counts")`` found.

    Attributes:
        counts: int64 ``[L, D]`` on the CPU: for how many prompts the node is among the ``quota`` %
            lowest of its layer.
        quota: percentage of each layer's nodes.
        criterion: what the lowest are: ``"signed"`` or ``"magnitude"``.
        targets, value, completeness, change, run: as in `Attribution`.
    """

    counts: Tensor
    quota: float
    criterion: Criterion
    targets: Tensor
    value: Tensor
    completeness: Tensor | None = None
    change: Tensor | None = None
    run: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        layers, width = self.counts.shape
        return (
            f"AttributionCounts({len(self.targets)} samples, {layers} layers, {width} nodes, "
            f"quota={self.quota}, criterion={self.criterion!r})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``.safetensors``.

        Raises:
            ValueError: for another suffix.
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"{path}: save to .safetensors, not {Path(path).suffix!r}.")
        tensors = {"counts": self.counts} | _present(self)
        counted = {"quota": self.quota, "criterion": self.criterion}
        metadata = _metadata(_COUNTS_FORMAT, self.run) | {"counted": json.dumps(counted)}
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttributionCounts:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or is something else.
        """
        tensors, metadata = read_safetensors(Path(path), _COUNTS_FORMAT)
        fields: dict[str, Any] = json.loads(metadata["counted"]) | tensors
        return cls(run=json.loads(metadata["run"]), **fields)


def load_result(path: str | os.PathLike[str]) -> Attribution | AttributionCounts:
    """Read a file of either kind.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or is something else.
    """
    with contextlib.suppress(ValueError):
        return AttributionCounts.load(path)
    return Attribution.load(path)


def _present(result: Attribution | AttributionCounts) -> dict[str, Tensor]:
    """Those of the tensors beside the scores that there are."""
    names = ("targets", "value", "completeness", "change")
    tensors = {name: getattr(result, name) for name in names}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def describe_run(model: nn.Module, name: str, definition: Definition, steps: int) -> dict[str, Any]:
    """Everything needed to repeat an attribution, as JSON values."""
    return {
        "model": getattr(model, "name_or_path", "") or type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "definition": name,
        "steps": steps,
        **definition.as_dict(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "loki_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _metadata(format: str, run: dict[str, Any]) -> dict[str, str]:
    return {"format": format, "run": json.dumps(run)}


def import_h5py() -> Any:
    """h5py, or an ImportError that says where to get it."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("HDF5 files need h5py: pip install 'loki-kernels[hdf5]'.") from error
    return h5py


class ScoreFile(contextlib.AbstractContextManager["ScoreFile"]):
    """Receives batches of scores in any order, in memory or straight into a safetensors file.

    The file's layout is known before the first score, so its header is written first and the rest
    is memory-mapped; it takes its final name only when the block ends without an exception.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        shape: tuple[int, int, int],
        run: dict[str, Any],
        *,
        complete: bool,
        scores: bool,
    ) -> None:
        if path is not None and check_writable(path).suffix != ".safetensors":
            raise ValueError(f"out={os.fspath(path)!r} must end in .safetensors.")
        samples, layers, _ = shape
        self._run = run
        self._shapes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
            "targets": (np.dtype("<i8"), (samples,)),
            "value": (np.dtype("<f4"), (samples,)),
        }
        if scores:
            self._shapes = {"scores": (np.dtype("<f4"), shape), **self._shapes}
        self._complete = complete
        if self._complete:
            self._shapes["completeness"] = (np.dtype("<f4"), (samples, layers))
            self._shapes["change"] = (np.dtype("<f4"), (samples, layers))
        self._path = path
        self._stack = contextlib.ExitStack()
        self._arrays: dict[str, np.ndarray] = {}

    def __enter__(self) -> ScoreFile:
        if self._path is None:
            self._arrays = {
                name: np.empty(shape, dtype) for name, (dtype, shape) in self._shapes.items()
            }
            return self
        names = {"<f4": "F32", "<i8": "I64"}
        header: dict[str, Any] = {"__metadata__": _metadata(_FORMAT, self._run)}
        offset = 0
        for name, (dtype, shape) in self._shapes.items():
            size = dtype.itemsize * int(np.prod(shape))
            header[name] = {
                "dtype": names[dtype.str],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        temporary = self._stack.enter_context(atomic_path(self._path))
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            total = 8 + len(text) + offset
            if hasattr(os, "posix_fallocate"):
                # a full disk is an OSError now, and would be a bus error in the mapped file
                os.posix_fallocate(file.fileno(), 0, total)
            else:
                file.truncate(total)
        for name, (dtype, shape) in self._shapes.items():
            start = 8 + len(text) + header[name]["data_offsets"][0]
            self._arrays[name] = np.memmap(temporary, dtype, "r+", start, shape)
        return self

    def write(self, members: list[int], scores: Scores) -> None:
        """Put one batch at the places ``members``; the only place that waits for the device."""
        if "scores" in self._arrays:
            self._arrays["scores"][members] = scores.scores.to(torch.float32).cpu().numpy()
        self._arrays["targets"][members] = scores.target.cpu().numpy()
        self._arrays["value"][members] = scores.value.cpu().numpy()
        if self._complete:
            change = scores.change.cpu()
            self._arrays["change"][members] = change.numpy()
            self._arrays["completeness"][members] = (scores.sums() - change).numpy()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for array in self._arrays.values():
            if isinstance(array, np.memmap):
                array.flush()
        self._stack.__exit__(kind, error, traceback)

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in self._arrays.items()}
