"""Where errors become words and exit codes."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer
import typer.core

from qwenlocal.errors import CannotPrint, Interrupted, QwenlocalError

CLOSED_PIPE = 141  # what a shell reports for a program that SIGPIPE ended
_OUTPUT_FAILS = {errno.ENOSPC, errno.EIO, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class Boundary(typer.core.TyperGroup):
    """
    The one place that catches errors: ours become a sentence, a next step and an exit code.

    Anything else is a bug and keeps its traceback.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--resume` may stand without a value, which typer does not know: "?" asks which."""
        end = args.index("--") if "--" in args else len(args)
        places = [place for place, word in enumerate(args[:end]) if word == "--resume"]
        for place in reversed(places):
            if place + 1 >= len(args) or not args[place + 1].lstrip("#").isdecimal():
                args = [*args[: place + 1], "?", *args[place + 1 :]]
        return super().parse_args(ctx, args)

    def make_context(self, *arguments: Any, **more: Any) -> Any:
        with _in_words():  # --help and --version speak already here
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: Any) -> Any:
        with _in_words():
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Errors become words on stderr and `typer.Exit` with their code."""
    try:
        yield
    except QwenlocalError as error:
        with _nobody_reading():
            show(error)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as stop:
        raise typer.Exit(Interrupted.exit_code) from stop
    except BrokenPipeError as closed:
        _turn_away()
        raise typer.Exit(CLOSED_PIPE) from closed
    except OSError as reason:
        if reason.filename is not None or reason.errno not in _OUTPUT_FAILS:
            raise
        _turn_away()
        with contextlib.suppress(OSError):  # where that was a terminal that is gone, nobody reads this
            show(CannotPrint(reason.strerror or str(reason)))
        raise typer.Exit(CannotPrint.exit_code) from reason


@contextlib.contextmanager
def _nobody_reading() -> Iterator[None]:
    """What is said where nobody reads is said in vain; the exit code still tells."""
    try:
        yield
    except BrokenPipeError:
        _turn_away()


def _turn_away() -> None:
    """Where nobody reads any more, or no room is left, Python must not complain about that at exit either."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show(error: QwenlocalError) -> None:
    """The sentence and the next step, on stderr."""
    from qwenlocal.terminal.plain import dimmed, harmless, has_colours, wrapped

    mark, plain = ("\x1b[1;31m", "\x1b[0m") if has_colours(sys.stderr) else ("", "")
    sentence = wrapped(f"qwenlocal: {harmless(str(error))}", sys.stderr).removeprefix("qwenlocal:")
    sys.stderr.write(f"{mark}qwenlocal:{plain}{sentence}\n")
    if error.hint:
        sys.stderr.write(dimmed(wrapped("  " + harmless(error.hint), sys.stderr), sys.stderr) + "\n")
