"""The command line: a thin client of the packages below, and the only place that prints errors."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing and signal take milliseconds to import, in which Ctrl-C would print a traceback

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from types import FrameType

    import typer
    from typer.models import CommandInfo

_INTERRUPTED = 130  # qwenlocal.errors.Interrupted, which is not imported yet
_RETRY_SECONDS = 0.02


def main() -> None:
    """Run the program and exit; Ctrl-C never prints a traceback."""
    try:
        import signal
        import threading  # noqa: F401 - for _interrupt

        can_interrupt = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in the background
        if can_interrupt:
            signal.signal(signal.SIGINT, _interrupt)
        try:
            with _keep_keys(sys.argv[1:]) as early_bytes:
                from qwenlocal.cli.app import app

                _run(app, early_bytes)
        finally:
            if can_interrupt:
                signal.signal(signal.SIGINT, _exit_at_once)
    except KeyboardInterrupt:
        os._exit(_INTERRUPTED)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but not inside an import, where Python may print it and go on: try again after that."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            import _thread
            import threading

            threading.Timer(_RETRY_SECONDS, _thread.interrupt_main).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _exit_at_once(_number: int, _frame: object) -> None:
    os._exit(_INTERRUPTED)


def _keep_keys(arguments: Sequence[str]) -> AbstractContextManager[bytes | None]:
    """
    Let keys keep their meaning from now on if a chat opens: `run` or `run MODEL`. Yields what has been typed already.

    For other arguments, the chat itself does so, once its modules are imported.
    """
    import contextlib

    command, *names = arguments or [""]
    opens_chat = command == "run" and not names[1:] and not any(name[:1] == "-" or " " in name for name in names)
    if not opens_chat or not all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout)):
        return contextlib.nullcontext()
    from qwenlocal.terminal.tty import disable_echo

    return disable_echo(sys.stdin, sys.stdout)


def _run(app: typer.Typer, early_bytes: bytes | None) -> None:
    import io

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None without a console; something else in tests
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    if "_QWENLOCAL_COMPLETE" not in os.environ:
        _skip_unused_options(app, sys.argv[1:])
    app(prog_name="qwenlocal", obj=early_bytes)


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
