"""Scores as a table that pandas, polars and DuckDB read: a line for each prompt, layer and node."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import import_extra

_FORMAT = b"loki-kernels-attribution"
_LINES = 1 << 20  # of the table, at a time
_PLACES = {"prompt": "int32", "layer": "int16", "node": "int32"}
_COLUMNS = {"scores": "score", "targets": "target"} | {
    name: name for name in ("value", "completeness", "change")
}


def write_parquet(path: Path, tensors: dict[str, Tensor], run: dict[str, Any]) -> None:
    """Write ``scores`` ``[N, L, D]``, and tensors ``[N]`` or ``[N, L]`` beside each of them.

    The lines are in the order of ``scores``, so the column is them again by ``reshape``. A part of
    the prompts is in memory at a time.
    """
    pyarrow, parquet = import_pyarrow()
    arrays = {_COLUMNS[name]: tensor.numpy() for name, tensor in tensors.items()}
    samples, layers, width = shape = arrays["score"].shape
    types = _PLACES | {name: str(array.dtype) for name, array in arrays.items()}
    about = {_FORMAT: json.dumps({"shape": shape, "run": run}).encode()}
    schema = pyarrow.schema([(n, pyarrow.type_for_alias(t)) for n, t in types.items()], about)
    repeated = [name for name in types if name != "score"]
    with parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=repeated) as file:
        step = max(1, _LINES // (layers * width))
        for start in range(0, samples, step):
            part = {name: array[start : start + step] for name, array in arrays.items()}
            shape = part["score"].shape
            part = {n: a.reshape(*a.shape, *[1] * (3 - a.ndim)) for n, a in part.items()}
            part |= dict(zip(_PLACES, np.indices(shape, sparse=True), strict=True))
            part["prompt"] = part["prompt"] + start
            lines = [np.broadcast_to(part[n], shape).ravel().astype(t) for n, t in types.items()]
            file.write_table(pyarrow.table(lines, schema=schema))


def read_parquet(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_parquet` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or of another format.
    """
    pyarrow, parquet = import_pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if _FORMAT not in (schema.metadata or {}):
                raise ValueError(f"{path} is a parquet file, but not one of scores.")
            about = json.loads(schema.metadata[_FORMAT])
            samples, layers, _ = shape = about["shape"]
            shapes = {"score": shape, "target": [samples], "value": [samples]}
            shapes |= {name: [samples, layers] for name in ("completeness", "change")}
            if file.metadata.num_rows != math.prod(shape):
                raise ValueError(
                    f"{path} has {file.metadata.num_rows} lines of the {math.prod(shape)} of all "
                    "prompts, layers and nodes; filter what was loaded, not the file."
                )
            arrays = {
                name: np.empty(shape, schema.field(name).type.to_pandas_dtype())
                for name, shape in shapes.items()
                if name in schema.names
            }
            line = 0
            for batch in file.iter_batches(columns=[*arrays, *_PLACES]):
                _check_places(path, batch, line, shape)
                for name, array in arrays.items():
                    repeats = arrays["score"].size // array.size
                    first = -line % repeats
                    values = batch.column(name).to_numpy()[first::repeats]
                    place = (line + first) // repeats
                    array.reshape(-1)[place : place + len(values)] = values
                line += len(batch)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a whole parquet file: {error}") from error
    tensors = {n: torch.from_numpy(arrays[c]) for n, c in _COLUMNS.items() if c in arrays}
    return tensors, about["run"]


def _check_places(path: Path, batch: Any, line: int, shape: list[int]) -> None:
    """Raise ValueError if a batch's lines are not of the places that come there."""
    places = np.unravel_index(np.arange(line, line + len(batch)), shape)
    for name, wanted in zip(_PLACES, places, strict=True):
        if not np.array_equal(batch.column(name).to_numpy(), wanted):
            raise ValueError(
                f"{path} has its lines in another order than they were written in ({name}); sort "
                "what was loaded, not the file."
            )


def import_pyarrow() -> tuple[Any, Any]:
    """pyarrow and its parquet."""
    need = "parquet needs pyarrow"
    pyarrow, parquet = (import_extra(n, "parquet", need) for n in ("pyarrow", "pyarrow.parquet"))
    return pyarrow, parquet
