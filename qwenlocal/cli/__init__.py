"""The command line: a thin client of the rooms below, with the one place where errors become words and exit codes."""

from __future__ import annotations


def main() -> None:
    """Run the program; never returns."""
    from qwenlocal.cli.app import app

    app(prog_name="qwenlocal")
