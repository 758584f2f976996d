"""Files of results that took long to make, kept on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)
_Kept = TypeVar("_Kept")


def cache_folder() -> Path:
    """``$LOKI_KERNELS_CACHE``, else ``$XDG_CACHE_HOME/loki_kernels``, else ``~/.cache/...``."""
    own, shared = (os.environ.get(name) for name in ("LOKI_KERNELS_CACHE", "XDG_CACHE_HOME"))
    # an empty one is none, and not the working directory; who names one may have no home
    if own:
        return Path(own).expanduser()  # from a Dockerfile's ENV no shell has done so
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "loki_kernels"


def read_cached(path: Path, load: Callable[[Path], _Kept]) -> _Kept | None:
    """What a file of the cache holds; None if it is not there, or of no use, which is logged."""
    try:
        return load(path) if path.is_file() else None
    except (OSError, ValueError) as error:  # another user's has perhaps no way in
        logger.warning("%s could not be used: %s; it is made again", path, error)
        return None


def write_cached(path: Path, save: Callable[[Path], None]) -> None:
    """Write a file of the cache; that it cannot be is logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path)
    except OSError as error:
        logger.warning("%s could not be written: %s", path, error)
