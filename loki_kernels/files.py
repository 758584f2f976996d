"""Files that are either whole or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from torch import Tensor


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Raise before any work is done if ``path`` cannot be created."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {path.parent} does not exist; create it first.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"The folder {path.parent} is not writable.")
    return path


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Raise before any work is done if files cannot be written into a folder of this name."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; name a folder.")
    existing = path if path.is_dir() else path.parent
    if not existing.is_dir():
        raise FileNotFoundError(f"The folder {existing} does not exist; create it first.")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"The folder {existing} is not writable.")
    return path


def read_safetensors(
    path: str | os.PathLike[str], file_format: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose metadata names ``file_format``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != file_format:
                raise ValueError(f"{path} is a safetensors file, but not a {file_format} file.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return tensors, metadata


def write_safetensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: if it cannot be written; safetensors' own error for a full disk is none.
    """
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                temporary,
                metadata=metadata,
            )
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it only if the block succeeds."""
    path = check_writable(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives 0600, which a colleague cannot read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
