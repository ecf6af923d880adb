"""The error boundary: turns errors into messages on stderr and exit codes."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import typer
import typer.core
from typer.exceptions import TyperException

from qwenlocal.errors import Interrupted, NotEnoughMemory, OutputError, QwenlocalError
from qwenlocal.formatting import cut_long_words
from qwenlocal.i18n import tr

_Function = TypeVar("_Function", bound=Callable[..., Any])

CLOSED_PIPE = 141  # as a shell reports a program that SIGPIPE ended
_OUTPUT_ERRORS = {errno.ENOSPC, errno.EIO, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class ErrorBoundary(typer.core.TyperGroup):
    """
    The command group that catches errors: prints a `QwenlocalError` with its hint, and exits with its code.

    Any other exception is a bug and keeps its traceback.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments; `--resume` without a value, which typer does not support, becomes `--resume ?`."""
        end = args.index("--") if "--" in args else len(args)
        places = [place for place, word in enumerate(args[:end]) if word == "--resume"]
        for place in reversed(places):
            if place + 1 >= len(args) or not args[place + 1].lstrip("#").isdecimal():
                args = [*args[: place + 1], "?", *args[place + 1 :]]
        return super().parse_args(ctx, args)

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _report_errors():  # --help and --version print here already
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _report_errors():
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result


class CliCommand(typer.core.TyperCommand):
    """A command whose usage names required arguments without braces."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


class CliApp(typer.Typer):
    """A group of such commands."""

    def command(self, *arguments: Any, **options: Any) -> Callable[[_Function], _Function]:
        return super().command(*arguments, cls=CliCommand, **options)


@contextlib.contextmanager
def _report_errors() -> Iterator[None]:
    """Print errors on stderr, and raise `typer.Exit` with their code."""
    try:
        yield
    except QwenlocalError as error:
        try:
            print_error(error)
        except BrokenPipeError:  # the exit code still reports the error
            _discard_output()
        raise typer.Exit(error.exit_code) from error
    except TyperException as error:  # it quotes an argument that typer refuses
        error.message = cut_long_words(error.message)
        raise
    except KeyboardInterrupt as stop:
        raise typer.Exit(Interrupted.exit_code) from stop
    except BrokenPipeError as closed:
        _discard_output()
        raise typer.Exit(CLOSED_PIPE) from closed
    except MemoryError as reason:
        hint = tr("Close other programs, then run the same command again.")
        print_error(QwenlocalError(tr("The system has no memory left."), hint=hint))
        raise typer.Exit(NotEnoughMemory.exit_code) from reason
    except OSError as reason:
        if reason.filename is not None or reason.errno not in _OUTPUT_ERRORS:
            raise
        _discard_output()
        with contextlib.suppress(OSError):  # the terminal may be gone
            print_error(OutputError(reason.strerror or str(reason)))
        raise typer.Exit(OutputError.exit_code) from reason


def _discard_output() -> None:
    """Redirect closed or full streams to the null device, so that Python's flush at exit does not fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_error(error: QwenlocalError) -> None:
    """Print the message and the hint on stderr."""
    from qwenlocal.hints import find_hint
    from qwenlocal.terminal.ansi import dim, escape_controls, supports_color
    from qwenlocal.terminal.wrapping import wrap

    mark, plain = ("\x1b[1;31m", "\x1b[0m") if supports_color(sys.stderr) else ("", "")
    sentence = wrap(f"qwenlocal: {escape_controls(str(error))}", sys.stderr).removeprefix("qwenlocal:")
    sys.stderr.write(f"{mark}qwenlocal:{plain}{sentence}\n")
    if hint := find_hint(error):
        sys.stderr.write(dim(wrap("  " + escape_controls(hint), sys.stderr), sys.stderr) + "\n")
