from __future__ import annotations

from .reference import integrate_path_reference as forward

__all__ = ["forward"]
