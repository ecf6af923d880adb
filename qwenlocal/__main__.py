"""``python -m qwenlocal`` is the same program as ``qwenlocal``."""

from qwenlocal.cli import main

if __name__ == "__main__":
    main()
