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
    if "LOKI_KERNELS_CACHE" in os.environ:
        return Path(os.environ["LOKI_KERNELS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loki_kernels"


def read_cached(path: Path, load: Callable[[Path], _Kept]) -> _Kept | None:
    """What a file of the cache holds; None if it is not there, or damaged, which is logged."""
    if not path.is_file():
        return None
    try:
        return load(path)
    except ValueError as error:
        logger.warning("%s; it is made again", error)
        return None


def write_cached(path: Path, save: Callable[[Path], None]) -> None:
    """Write a file of the cache; that it cannot be is logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path)
    except OSError as error:
        logger.warning("%s could not be written: %s", path, error)
