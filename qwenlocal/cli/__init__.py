"""The command line: a thin client of the packages below, and the only place that prints errors."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import typer
    from typer.models import CommandInfo


def main() -> None:
    """Run the program and exit."""
    import os
    import sys

    from qwenlocal.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None without a console; something else in tests
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    if "_QWENLOCAL_COMPLETE" not in os.environ:
        _skip_unused_options(app, sys.argv[1:])
    app(prog_name="qwenlocal")


def _skip_unused_options(app: typer.Typer, arguments: Sequence[str]) -> None:
    """
    Spare typer the options of commands that do not run; it builds all of them at every start, which takes 50 ms.

    The list of commands in `qwenlocal --help` needs their names and help texts only.
    """
    named = [command for command in app.registered_commands if [_name(command)] == list(arguments[:1])]
    if named:
        app.registered_commands, app.registered_groups = named, []
    elif list(arguments) in ([], ["-h"], ["--help"], ["--version"]):
        for command in app.registered_commands:
            command.name, command.callback = _name(command), _no_options


def _name(command: CommandInfo) -> str:
    return str(command.name or getattr(command.callback, "__name__", ""))


def _no_options() -> None:
    """Stand in for a command that does not run."""
