"""The commands of `qwenlocal chats`, and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ChatArgument = Annotated[str, typer.Argument(metavar="CHAT", help="Its number, or last.")]

chats_app = typer.Typer(rich_markup_mode=None, help="What was said: every chat is kept on this machine, and only here.")


@chats_app.callback(invoke_without_command=True)
def chats(context: typer.Context) -> None:
    """What was said: every chat is kept on this machine, and only here."""
    if context.invoked_subcommand is None:
        list_()


@chats_app.command("list", short_help="All chats, the newest first.")
def list_(as_json: JsonOption = False) -> None:
    """All chats, the newest first."""
    from qwenlocal.cli.chats import list_chats

    list_chats(as_json=as_json)


@chats_app.command(short_help="What was said in a chat.")
def show(chat: ChatArgument, as_json: JsonOption = False) -> None:
    """What was said in a chat, as Markdown."""
    from qwenlocal.cli.chats import show_chat

    show_chat(chat, as_json=as_json)


@chats_app.command(short_help="Find words in all chats.")
def search(
    words: Annotated[list[str], typer.Argument(metavar="WORDS", help="All of them must be there, in any order.")],
    as_json: JsonOption = False,
) -> None:
    """Messages that have every one of the words, in any script; capitals make no difference."""
    from qwenlocal.cli.chats import search_chats

    search_chats(" ".join(words), as_json=as_json)


@chats_app.command(short_help="Give a chat another title.")
def rename(chat: ChatArgument, title: Annotated[list[str], typer.Argument(metavar="TITLE", help="The title.")]) -> None:
    """Give a chat another title."""
    from qwenlocal.cli.chats import rename_chat

    rename_chat(chat, " ".join(title))


@chats_app.command(short_help="Forget chats, for good.")
def rm(chats: Annotated[list[str], typer.Argument(metavar="CHAT", help="Numbers, or last.")]) -> None:
    """Forget chats, for good."""
    from qwenlocal.cli.chats import remove_chats

    remove_chats(chats)


@chats_app.command(short_help="Write a chat as Markdown, JSON or HTML.")
def export(
    chat: ChatArgument,
    output: Annotated[
        Optional[Path],  # noqa: UP045 - typer on Python 3.10
        typer.Option("-o", "--output", metavar="FILE", help="Where to. [default: standard output]"),
    ] = None,
    form: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--format", metavar="FORMAT", help="md, json or html. [default: by the file's name, or md]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a chat as Markdown, JSON (with every version of every message) or a page of HTML."""
    from qwenlocal.cli.chats import export_chat

    export_chat(chat, form, output, force=force)


@chats_app.command(short_help="Copy what can be read out of a damaged journal.")
def recover() -> None:
    """Copy what can be read out of a damaged journal; the damaged file is kept."""
    from qwenlocal.cli.chats import recover_chats

    recover_chats()
