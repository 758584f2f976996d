"""``python -m loki_kernels`` and ``torchrun -m loki_kernels`` are the command ``loki-kernels``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
