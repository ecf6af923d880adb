"""The commands of `qwenlocal chats` and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from qwenlocal.cli.boundary import CliApp
from qwenlocal.cli.option_types import ForceOption, JsonOption

ChatArgument = Annotated[str, Argument(metavar="CHAT", help="Number of a chat, or last.")]

chats_app = CliApp(rich_markup_mode=None, help="List, search and export chats; they are saved on this machine only.")


@chats_app.callback(invoke_without_command=True)
def chats(context: typer.Context) -> None:
    """List, search and export chats; they are saved on this machine only."""
    if context.invoked_subcommand is None:
        list_()


@chats_app.command("list", short_help="List all chats.")
def list_(as_json: JsonOption = False) -> None:
    """List all chats, the newest first."""
    from qwenlocal.cli.commands.chats import list_chats

    list_chats(as_json=as_json)


@chats_app.command(short_help="Print a chat.")
def show(chat: ChatArgument, as_json: JsonOption = False) -> None:
    """Print a chat as Markdown."""
    from qwenlocal.cli.commands.chats import show_chat

    show_chat(chat, as_json=as_json)


@chats_app.command(short_help="Search all chats.")
def search(
    words: Annotated[list[str], Argument(metavar="WORD…", help="Words that a message must contain, in any order.")],
    as_json: JsonOption = False,
) -> None:
    """Search all chats for messages that contain all words, ignoring case."""
    from qwenlocal.cli.commands.chats import search_chats

    search_chats(" ".join(words), as_json=as_json)


@chats_app.command(short_help="Rename a chat.")
def rename(chat: ChatArgument, title: Annotated[list[str], Argument(metavar="TITLE…", help="New title.")]) -> None:
    """Rename a chat."""
    from qwenlocal.cli.commands.chats import rename_chat

    rename_chat(chat, " ".join(title))


@chats_app.command(short_help="Delete chats.")
def rm(
    chats: Annotated[list[str], Argument(metavar="CHAT…", help="Numbers of chats, ranges such as 3-7, or last.")],
    yes: Annotated[bool, Option("-y", "--yes", help="Delete without asking.")] = False,
) -> None:
    """Delete chats permanently."""
    from qwenlocal.cli.commands.chats import remove_chats

    remove_chats(chats, assume_yes=yes)


@chats_app.command(short_help="Export a chat as Markdown, JSON or HTML.")
def export(
    chat: ChatArgument,
    output: Annotated[
        Path | None, Option("-o", "--output", metavar="FILE", help="File to write. [default: standard output]")
    ] = None,
    format: Annotated[
        str | None, Option("--format", metavar="FORMAT", help="md, json or html. [default: from the file name, or md]")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Export a chat as Markdown, JSON (with all versions of every message) or an HTML page."""
    from qwenlocal.cli.commands.chats import export_chat

    export_chat(chat, format, output, force=force)


@chats_app.command(short_help="Recover a damaged journal.")
def recover() -> None:
    """Copy the readable parts of a damaged journal to a new one; the damaged file is kept."""
    from qwenlocal.cli.commands.chats import recover_chats

    recover_chats()
