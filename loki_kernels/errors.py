"""Exceptions raised by loki_kernels."""


class UnsupportedModelError(ValueError):
    """The model's structure is one this library cannot treat exactly, so it refuses."""
