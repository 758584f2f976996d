"""``python -m benchmarks.frontier``."""

from .runner import main

if __name__ == "__main__":
    main()
