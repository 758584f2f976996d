"""`Attribution` and `AttributionCounts`: what an attribution found, and its files."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .._version import __version__
from ..errors import import_extra
from ..files import (
    atomic_path,
    check_writable,
    of_a_whole_file,
    read_safetensors,
    write_safetensors,
)
from ..options import DEFAULT_QUOTA, Criterion
from ..structure import Structure, embedding_weight, text_config
from .definitions import DEFINITIONS, PathIntegral
from .table import import_pyarrow, read_parquet, write_parquet

_FORMAT = "loki-kernels-attribution"
_COUNTS_FORMAT = "loki-kernels-counts"


@dataclass(eq=False)  # of tensors, which have no one truth
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
            f"definition={definition_of(self.run)!r}, steps={self.run.get('steps')})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``.safetensors``, to ``.h5``/``.hdf5`` in the authors' layout, or to
        ``.parquet`` for pandas and polars.

        The HDF5 file holds ``dataset`` ``[N, L, D]`` (float32; the authors' float16 loses small
        scores) and the other tensors beside it. It needs the ``hdf5`` extra. The parquet file has
        a line for each prompt, layer and node, in this order: ``prompt, layer, node, score``, and
        ``target, value, completeness, change`` repeated. It needs the ``parquet`` extra.

        Raises:
            ValueError: for another suffix.
            ImportError: without the extra.
        """
        tensors = {"scores": self.scores} | _present(self)
        suffix = check_suffix(path)
        if suffix == ".safetensors":
            write_safetensors(path, tensors, scores_metadata(self.run))
        elif suffix == ".parquet":
            with atomic_path(path) as temporary:
                write_parquet(temporary, tensors, self.run)
        else:
            with atomic_path(path) as temporary, import_h5py().File(temporary, "w") as file:
                for name, tensor in tensors.items():
                    file.create_dataset(
                        "dataset" if name == "scores" else name, data=tensor.numpy()
                    )
                file.attrs["run"] = json.dumps(self.run)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Attribution:
        """Read a file written by `save`, by ``attribute(out=...)``, or the authors' HDF5 log.

        A ``.safetensors`` file is mapped: nothing of it is read before it is used, so it may be
        larger than memory. `select` and `heatmap` go through it in parts.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or is something else.
        """
        path = Path(path)
        if path.suffix in (".h5", ".hdf5"):
            return cls._load_hdf5(path)
        if path.suffix == ".parquet":
            with of_a_whole_file(path):
                tensors, run = read_parquet(path)
                return cls(run=run, **tensors)
        tensors, metadata = read_safetensors(path, _FORMAT)
        with of_a_whole_file(path):
            return cls(run=json.loads(metadata["run"]), **tensors)

    @classmethod
    def _load_hdf5(cls, path: Path) -> Attribution:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist.")
        try:
            with of_a_whole_file(path), import_h5py().File(path, "r") as file:
                names = ("dataset", "targets", "value", "completeness", "change")
                arrays = {n: torch.from_numpy(file[n][...]) for n in names if n in file}
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
        """Write a PNG of how often each node is among its layer's highest and lowest.

        The ``quota`` % are of a layer; the paper's Figure 2, which this is after, ranks over all
        layers. It needs the ``plot`` extra.
        """
        from ..plots import plot_heatmap

        plot_heatmap(self.scores, path, quota, self.run.get("without_ffn", ()))


@dataclass(eq=False)
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
        check_writable(path, ".safetensors")
        tensors = {"counts": self.counts} | _present(self)
        metadata = counts_metadata(self.run, self.quota, self.criterion)
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttributionCounts:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or is something else.
        """
        tensors, metadata = read_safetensors(Path(path), _COUNTS_FORMAT)
        with of_a_whole_file(path):
            fields: dict[str, Any] = json.loads(metadata["counted"]) | tensors
            return cls(run=json.loads(metadata["run"]), **fields)


def check_suffix(path: str | os.PathLike[str]) -> str:
    """The suffix of a file that `Attribution.save` can write.

    Raises:
        ValueError: if it is another one.
        ImportError: without the extra that it needs.
    """
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".h5", ".hdf5", ".parquet"):
        raise ValueError(f"{path}: save to .safetensors, .h5, .hdf5 or .parquet, not {suffix!r}.")
    if suffix == ".parquet":
        import_pyarrow()
    elif suffix != ".safetensors":
        import_h5py()
    return suffix


def load_result(path: str | os.PathLike[str]) -> Attribution | AttributionCounts:
    """Read a file of either kind.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or is something else.
    """
    path = Path(path)
    if path.suffix not in (".h5", ".hdf5", ".parquet"):
        _, metadata = read_safetensors(path, _FORMAT, _COUNTS_FORMAT)
        if metadata["format"] == _COUNTS_FORMAT:
            return AttributionCounts.load(path)
    return Attribution.load(path)


def _present(result: Attribution | AttributionCounts) -> dict[str, Tensor]:
    """Those of the tensors beside the scores that there are."""
    names = ("targets", "value", "completeness", "change")
    tensors = {name: getattr(result, name) for name in names}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def definition_of(run: Mapping[str, Any]) -> str | None:
    """What a run's definition is called, with the fields of it that the call changed."""
    name: str | None = run.get("definition")
    if name not in DEFINITIONS:
        return name
    own = asdict(DEFINITIONS[name])
    changed = [f"{key}={run[key]}" for key, value in own.items() if run.get(key, value) != value]
    return f"{name} with {', '.join(changed)}" if changed else name


def describe_run(
    structure: Structure,
    name: str,
    integral: PathIntegral,
    steps: int,
    target: object = None,
    contrast: object = None,
) -> dict[str, Any]:
    """Everything needed to repeat an attribution, and which layers have no FFN, as JSON values.

    Of the tokens to attribute that they were given: they may be as many as the prompts.
    """
    model = structure.causal_lm
    without = [i for i, ffn in enumerate(structure.ffns) if ffn is None]
    adapters = _adapters_in_force(model)
    return {
        "model": getattr(model, "name_or_path", "") or type(model).__name__,
        "dtype": str(embedding_weight(model).dtype).removeprefix("torch."),
        "definition": name,
        "steps": steps,
        **integral.described(),
        "target": "predicted" if target is None else "given",
        **({} if contrast is None else {"contrast": "given"}),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "loki_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        **({"adapters": adapters} if adapters else {}),
        **({"without_ffn": without} if without else {}),
    }


def describe_machine(device: torch.device) -> dict[str, str]:
    """What the last bits of scores depend on."""
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"CPU ({capability}, {torch.get_num_threads()} threads)"
    else:
        module = torch.get_device_module(device)  # torch.mps tells no properties
        ask = getattr(module, "get_device_properties", None)
        name = device.type if ask is None else str(ask(device).name)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": name, "loki_kernels": __version__, **versions}


def model_settings(model: nn.Module) -> str:
    """What the config says of the function that the weights are a part of (RoPE, norms, ...)."""
    fields = text_config(model).to_dict()
    other = {"architectures", "dtype", "transformers_version", "use_cache"}
    kept = {k: v for k, v in fields.items() if k not in other and not k.startswith("_")}
    adapters = _adapters_in_force(model)
    if adapters:
        kept["adapters in force"] = adapters
    return json.dumps(kept, sort_keys=True, default=str)


def _adapters_in_force(model: nn.Module) -> list[str]:
    """Which of PEFT's adapters act, and how much: no weight says so."""
    found = set()
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "base_layer")]
    for layer in layers:
        if hasattr(layer, "active_adapters"):
            active = [] if getattr(layer, "disable_adapters", False) else layer.active_adapters
            scaling = getattr(layer, "scaling", {})
            found.add(str([(name, scaling.get(name)) for name in active]))
    return sorted(found)


def scores_metadata(run: dict[str, Any]) -> dict[str, str]:
    """Of a file of scores."""
    return {"format": _FORMAT, "run": json.dumps(run)}


def counts_metadata(run: dict[str, Any], quota: float, criterion: Criterion) -> dict[str, str]:
    """Of a file of counts."""
    counted = {"quota": quota, "criterion": criterion}
    return {"format": _COUNTS_FORMAT, "run": json.dumps(run), "counted": json.dumps(counted)}


def import_h5py() -> Any:
    return import_extra("h5py", "hdf5", "HDF5 files need h5py")
