"""One progress bar for every long job."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(
    total: int | None, description: str, enabled: bool | None = None, **options: Any
) -> tqdm:
    """A tqdm bar on stderr; ``enabled=None`` shows it only on a terminal and in a notebook."""
    if enabled is None:
        enabled = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(total=total, desc=description, disable=not enabled, **options)


def skip(bar: tqdm, count: int) -> None:
    """Advance a bar by what was done before, which says nothing of the speed."""
    if not bar.disable:
        bar.initial += count
        bar.update(count)
