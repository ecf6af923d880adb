"""The command line: a thin client of the packages below, and the only place that prints errors."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typer.models import CommandInfo


def main() -> None:
    """Run the program and exit."""
    import sys

    from qwenlocal.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None without a console; something else in tests
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")

    # typer builds every command before it runs one; `run` alone has 25 options, 20 ms that `list` need not wait for.
    asked = [command for command in app.registered_commands if sys.argv[1:2] == [_name(command)]]
    app.registered_commands = asked or app.registered_commands
    app(prog_name="qwenlocal")


def _name(command: CommandInfo) -> str:
    return str(command.name or getattr(command.callback, "__name__", ""))
