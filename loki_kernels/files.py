"""Files that are either whole or absent."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import mmap
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor

from .errors import explained

logger = logging.getLogger(__name__)

# What a file system says that knows no locks, or whose server of locks is not there (NFS, Lustre).
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def check_writable(path: str | os.PathLike[str], *suffixes: str) -> Path:
    """The file to write, which ``path`` may be a link to.

    Raises before any work is done if it cannot be created, or if ``path`` ends in none of these.
    """
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path} must end in {' or '.join(suffixes)}.")
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it.")
    if path.exists() and not path.is_file():  # /dev/null would be replaced by what is written
        raise ValueError(f"{path} is a device or a pipe; name an ordinary file.")
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
    path: str | os.PathLike[str], *formats: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose metadata names one of ``formats``.

    The tensors are mapped: nothing of them is read before it is used, whatever the file's size, and
    what is written into them stays in this process.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        message = f"{path} is not a whole safetensors file: {error}"
        raise explained(ValueError(message)) from error
    if metadata.get("format") not in formats:
        known = " or ".join(formats)
        raise ValueError(f"{path} is a safetensors file, but not a {known} file.")
    mapping = _map(path)
    start = 8 + int.from_bytes(mapping[:8], "little")
    header = json.loads(mapping[8:start])
    header.pop("__metadata__")
    with of_a_whole_file(path):  # a dtype that torch has none for is a KeyError
        tensors = {name: _mapped(mapping, start, about) for name, about in header.items()}
    return tensors, metadata


@contextmanager
def of_a_whole_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """What a file's metadata lacks, or has otherwise, is a ValueError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error!r}.") from error


def _map(path: Path) -> mmap.mmap:
    """The file's bytes, copied where they are written to."""
    with open(path, "rb") as file:
        try:
            if sys.platform == "win32":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            # Linux refuses this for a file larger than its memory, as safetensors' own mapping is
            # refused, unless no memory is reserved. Python names the flag since 3.13.
            reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
            flags, access = mmap.MAP_PRIVATE | reserve, mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(file.fileno(), 0, flags, access)
        except OSError:  # memory is accounted strictly; torch warns that it cannot be written to
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _mapped(mapping: mmap.mmap, start: int, about: dict[str, Any]) -> Tensor:
    """A tensor of the file, from its entry in the header."""
    dtype, shape = cast(torch.dtype, safetensors.torch._TYPES[about["dtype"]]), about["shape"]
    begin, end = (start + offset for offset in about["data_offsets"])
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    buffer: mmap.mmap | bytearray = mapping
    if begin % dtype.itemsize:  # behind an odd number of smaller elements
        buffer, begin = bytearray(mapping[begin:end]), 0
    return torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape), offset=begin).view(shape)


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


def reserve(sizes: Mapping[io.FileIO, int], *, shared: bool) -> None:
    """Make room on the disk for open files to grow to so many bytes each.

    Where a file system knows no fallocate (NFS before 4.2), glibc reads a byte of every block
    within the file and writes a zero back if it was one, which undoes what another process writes
    there meanwhile. So of one process alone it is asked for from the files' ends on, and with
    others that write (``shared``) only the free space is compared.

    Raises:
        OSError: if there is not as much room.
    """
    ends = {file: os.fstat(file.fileno()).st_size for file in sizes}
    more = {file: size - ends[file] for file, size in sizes.items() if size > ends[file]}
    if shared and more and hasattr(os, "statvfs"):
        disk, missing = os.statvfs(next(iter(more)).fileno()), sum(more.values())
        free = disk.f_bavail * disk.f_frsize
        if disk.f_blocks and missing > free:  # some of FUSE's tell no sizes
            raise OSError(
                errno.ENOSPC,
                f"No space left on device: {missing} bytes are missing, and {free} are free",
                next(iter(more)).name,
            )
    if not shared and hasattr(os, "posix_fallocate"):
        for file, length in more.items():
            os.posix_fallocate(file.fileno(), ends[file], length)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Have the disk keep which files a folder has, where it can be asked to."""
    with suppress(OSError):  # Windows opens no folder, and some network folders sync none
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def lock(file: io.FileIO) -> None:
    """Lock an open file until it is closed, which the end of the process does too.

    Where the file system knows no locks a warning says so, and the file is not locked.

    Raises:
        BlockingIOError: if another process has it locked.
    """
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
    else:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s is not locked, since its file system has no locks (%s): let no other process "
                "write there at the same time.",
                file.name,
                error.strerror,
            )


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it only if the block succeeds."""
    suffix, path = Path(path).suffix, check_writable(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}{suffix}")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = os.fstat(handle).st_mode & 0o777  # less the umask's bits
    os.close(handle)
    try:
        yield temporary
        with suppress(OSError):  # some network folders know no modes
            # safetensors 0.8 puts a file of 0600 there, which a colleague cannot read
            os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
