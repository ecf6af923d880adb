"""The chat of `qwenlocal run`: a new one, or one of the journal that continues."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from dataclasses import dataclass

from qwenlocal.chat.journal import ChatInfo, Journal
from qwenlocal.chat.journal_writer import JournalWriter
from qwenlocal.chat.thread import Thread
from qwenlocal.cli.console import can_ask, choose_number, say_dimmed
from qwenlocal.cli.context import AppContext
from qwenlocal.cli.model_pool import ModelPool
from qwenlocal.cli.options import RunOptions
from qwenlocal.cli.remote_pool import RemotePool
from qwenlocal.cli.server_pool import ServerPool
from qwenlocal.errors import ChatNotFound, JournalError, NotWritable, UsageError
from qwenlocal.formatting import format_count, format_model_name, format_time, join_sentences, shorten
from qwenlocal.i18n import tr
from qwenlocal.paths import bundled_folder, ensure_writable
from qwenlocal.terminal.ansi import escape_controls
from qwenlocal.terminal.commands.turns import OPEN_ELSEWHERE, describe_cut
from qwenlocal.terminal.repl import Repl
from qwenlocal.terminal.session import Session

PICK = "?"
_MAX_CHOICES = 20
_MAX_LINES = 6  # of the last answer


@dataclass(frozen=True)
class ResumedChat:
    """A chat of the journal that continues."""

    journal: Journal
    info: ChatInfo
    thread: Thread


def run_chat(
    app: AppContext,
    options: RunOptions,
    pool: ModelPool | RemotePool | ServerPool,
    resumed: ResumedChat | None,
    system: str,
    prompt: str | None,
    early_bytes: bytes,
) -> None:
    """
    Chat with the models of `pool` until the user leaves.

    `prompt` is asked at once; `early_bytes` were typed before.
    """
    thread = resumed.thread if resumed else Thread(system)
    session = Session(
        thread,
        pool.title,
        pool,
        say_dimmed,
        lambda question: repl.ask(question),
        [bundled_folder("prompts"), app.library.folders.home / "prompts"],
        app.library.folders.chats,
        show_stats=options.stats,
        render_markdown=options.markdown,
    )
    if options.journal:
        _record_in_journal(session, app, pool.current, resumed)
    if resumed and system:
        thread.set_system_prompt(system)
    _end_on_signals(session)
    repl = Repl(
        session,
        history=app.library.folders.history if options.journal else None,
        drafter=lambda: pool.drafter,
        on_ready=pool.start_loading,
        early_bytes=early_bytes,
    )
    pool.on_first_loaded = repl.on_model_loaded
    keep = False
    try:
        repl.run(prompt)
        keep = True
    finally:
        pool.close(keep=keep)
    _say_how_to_return(session)


def _end_on_signals(session: Session) -> None:
    """
    Let SIGHUP (the window is closed) and SIGTERM end the chat: write the cut answer, free the chat, exit.

    The chat is closed in another thread, because the signal may interrupt this one while it writes; and before the
    model, which takes longer.
    """
    numbers = [getattr(signal, name) for name in ("SIGHUP", "SIGTERM") if hasattr(signal, name)]

    def end(number: int, _frame: object) -> None:
        for other in numbers:  # the terminal and the shell both send SIGHUP
            signal.signal(other, signal.SIG_IGN)
        if session.journal_writer:
            threading.Thread(target=session.journal_writer.close).start()
        sys.exit(128 + number)

    for number in numbers:  # even if a parent ignores them, as nohup does: there is no chat without a terminal
        signal.signal(number, end)


def _say_how_to_return(session: Session) -> None:
    """Name the command that continues the chat, if it is saved and somebody reads this."""
    writer = session.journal_writer
    if writer is not None and writer.error:
        session.say(tr("The end of this chat was not saved: {reason}.", reason=writer.error))
        return
    if session.journal is None or writer is None or not sys.stderr.isatty():
        return
    with contextlib.suppress(JournalError):
        ids = [chat.id for chat in session.journal.list_chats()]
        if writer.chat_id in ids:
            option = "--continue" if writer.chat_id == ids[0] else f"--resume {writer.chat_id}"
            command = f"qwenlocal run {option}"
            say_dimmed(tr("To continue this chat: {command}", command=command))


def select_chat(app: AppContext, choice: str) -> ResumedChat:
    """
    Find and open the chat to continue: a number, "last", or one that the user picks from a list (`PICK`).

    Raises
    ------
    ChatNotFound: there is none. JournalError: the journal cannot be read. Interrupted: the user did not pick.
    """
    journal, info = _pick_chat(app) if choice == PICK else app.find_chat(choice)
    return ResumedChat(journal, info, journal.open_thread(info.id))


def _pick_chat(app: AppContext) -> tuple[Journal, ChatInfo]:
    journal = app.open_existing_journal()
    chats = journal.list_chats() if journal else []
    if journal is None or not chats:
        raise ChatNotFound("")
    if not can_ask():
        raise UsageError(
            tr("--resume without a number needs a terminal to choose a chat in."),
            hint=tr("Use --resume NUMBER, or --continue."),
        )
    for info in chats[:_MAX_CHOICES]:
        count, model = format_count(info.messages, "message"), format_model_name(info.model)
        title = escape_controls(info.title)
        sys.stderr.write(f"{info.id:>3}  {format_time(info.changed)}  {title}  ({count}, {model})\n")
    by_id = {info.id: info for info in chats}  # older chats that are not shown can be chosen, too
    return journal, by_id[int(choose_number(by_id, default=chats[0].id))]


def _record_in_journal(session: Session, app: AppContext, model: str, resumed: ResumedChat | None) -> None:
    journal = resumed.journal if resumed else _open_journal(app)
    if journal is None:
        return
    session.journal = journal
    session.journal_writer = JournalWriter(journal, session.thread, model, resumed.info.id if resumed else None)
    if resumed:
        _say_resumed(resumed, session.journal_writer)


def _open_journal(app: AppContext) -> Journal | None:
    """Open the journal; if it cannot be used, say so, and the chat continues without it."""
    path = app.library.folders.journal
    try:
        ensure_writable(path.parent)
        return Journal(path)
    except (JournalError, NotWritable) as error:
        consequence = tr("This chat is not saved.")
        app.say(join_sentences(str(error), consequence, error.hint))
        return None


def _say_resumed(resumed: ResumedChat, writer: JournalWriter) -> None:
    """Say which chat continues, and repeat the end of its last turn."""
    info, turns = resumed.info, resumed.thread.turns
    say_dimmed(
        tr(
            "Continuing chat {id}, “{title}”: {messages}.",
            id=info.id,
            title=info.title,
            messages=format_count(len(resumed.thread.path), "message"),
        )
    )
    if writer.original is not None:
        say_dimmed(tr(OPEN_ELSEWHERE))
    if turns:
        say_dimmed(f"> {shorten(turns[-1].question.text)}")
        lines = (turns[-1].answer.text if turns[-1].answer else tr("(no answer yet)")).strip().splitlines()
        for line in [*(["…"] if len(lines) > _MAX_LINES else []), *lines[-_MAX_LINES:]]:
            say_dimmed(line)
        if cut := describe_cut(turns[-1]):
            say_dimmed(cut)
