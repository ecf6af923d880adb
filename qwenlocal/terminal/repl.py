"""The chat loop: read a line, then run a slash command or answer the message."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit.application import Application, run_in_terminal

from qwenlocal.chat.documents import find_mentions, find_missing_mentions, read_document
from qwenlocal.chat.events import Done, Event, FinishReason
from qwenlocal.chat.thread import ASSISTANT
from qwenlocal.chat.worker import iterate_in_thread
from qwenlocal.errors import ContextFull, QwenlocalError, TextTooLong, UsageError
from qwenlocal.formatting import format_count, join_sentences
from qwenlocal.hints import describe_error
from qwenlocal.i18n import tr
from qwenlocal.terminal.ansi import supports_ansi, supports_color
from qwenlocal.terminal.attachments import attach_documents, describe_cost, shorten_pastes
from qwenlocal.terminal.commands.models import check_system_prompt
from qwenlocal.terminal.commands.table import (
    describe_unknown,
    find_command,
    is_command,
    unescape_slashes,
    works_during_answer,
)
from qwenlocal.terminal.input import LineEditor
from qwenlocal.terminal.markdown import RenderOptions, warm_up
from qwenlocal.terminal.pastes import PasteStore
from qwenlocal.terminal.screen import Screen
from qwenlocal.terminal.session import AnswerStarter, Session
from qwenlocal.terminal.tty import call_on_resume
from qwenlocal.terminal.type_ahead import unquote_block
from qwenlocal.terminal.view import DRAFT_UNLOADED, AnswerView, describe_drafting, describe_stats, print_answer
from qwenlocal.terminal.wrapping import join_fitting, terminal_width

if TYPE_CHECKING:
    from qwenlocal.engine.draft_model import ModelDrafter


class Repl:
    """The read-eval-print loop of one chat."""

    def __init__(
        self,
        session: Session,
        *,
        history: Path | None,
        drafter: Callable[[], ModelDrafter | None],
        on_ready: Callable[[], object],
        early_bytes: bytes,
    ) -> None:
        """
        Prepare the loop; the lines typed are appended to the file `history`, if given.

        `drafter` returns the drafter of the current model, if it has a draft model. `on_ready` is called when the input
        line is shown for the first time, so that the model can load while the user types. `early_bytes` were typed
        before.
        """
        self._session, self._drafter, self._on_ready = session, drafter, on_ready
        self._pastes = PasteStore()
        self._editor = LineEditor(
            session, self._pastes, history=history, toolbar=self._format_toolbar, early_bytes=early_bytes
        )
        self._editor.app.after_render.add_handler(self._after_render)
        self._printed_unloading, self._printed_save_error, self._is_warm = False, "", False

    def run(self, first_message: str | None = None) -> None:
        """Chat until the user exits; `first_message` is sent at once."""
        session = self._session
        session.say(tr("Chatting with {model}. /help for commands, Ctrl-D to exit.", model=session.model))
        try:
            self._loop(first_message)
        except EOFError:  # Ctrl-D or /exit
            return
        finally:
            if session.journal_writer:
                session.journal_writer.close()

    def _loop(self, first_message: str | None) -> None:
        """Process lines until the user presses Ctrl-C twice."""
        session = self._session
        has_warned = False
        while True:
            try:
                self._process(self._read_line() if first_message is None else first_message)
                has_warned = False
            except KeyboardInterrupt:
                self._drop_queue()
                if session.pending_edit:
                    session.pending_edit = None
                    session.say(tr("Nothing was changed."))
                    continue
                if has_warned:
                    return
                session.say(tr("(Press Ctrl-C again or Ctrl-D to exit.)"))
                has_warned = True
            finally:
                first_message = None

    def on_model_loaded(self, failure: BaseException | None) -> None:
        """
        End the chat with `failure`, or check the system prompt if there is none. Can be called from any thread.

        While no line is being read, neither is necessary: the message that waits for the model gets the error.
        """
        app = self._editor.app
        if not app.is_running or app.loop is None:
            return
        if failure is not None:
            app.loop.call_soon_threadsafe(self._editor.end, failure)
        else:
            app.loop.call_soon_threadsafe(run_in_terminal, self._check_system_prompt)

    def _check_system_prompt(self) -> None:
        with contextlib.suppress(QwenlocalError):  # the first message raises it again
            check_system_prompt(self._session)

    def _after_render(self, _app: Application[str]) -> None:
        self._on_ready()
        if not self._is_warm and supports_ansi(sys.stdout) and self._session.render_markdown:
            threading.Thread(target=warm_up, daemon=True).start()
        self._is_warm = True

    # --- input

    def _read_line(self) -> str:
        session = self._session
        default, session.default_text = session.default_text, ""
        return self._editor.read_line(default)

    def ask(self, question: str) -> str:
        """Return the answer to a question, "" for Ctrl-C or Ctrl-D."""
        return self._editor.ask(question)

    def _drop_queue(self) -> None:
        """Send none of the lines that were typed ahead."""
        if count := self._editor.drop_queue():
            messages = format_count(count, "message")
            self._session.say(tr("Not sent: {messages} typed ahead. Press Up to recall them.", messages=messages))

    def _process(self, line: str) -> None:
        """Run a command, or send a message; print errors. A message that was not sent is the text of the next line."""
        session = self._session
        pending_edit, before = session.pending_edit, self._last_message()
        try:
            if line.strip() and not is_command(line):
                _ = session.conversation  # without a model the chat ends
            self._dispatch(line)
        finally:
            if line.strip() and not is_command(line) and self._last_message() == before:
                session.pending_edit, session.default_text = pending_edit, line
                self._drop_queue()

    def _last_message(self) -> tuple[int | None, str]:
        thread = self._session.thread
        return thread.leaf, thread.last.text if thread.last else ""

    def _dispatch(self, line: str) -> None:
        session = self._session
        try:
            if session.pending_edit and not (is_command(line) and find_command(line.split()[0])):
                self._finish_edit(line)
            elif is_command(line):
                session.pending_edit = None
                self._run_command(line)
            elif line.strip():
                self._send(_message_text(line), lambda message: session.conversation.ask(message))
        except QwenlocalError as error:
            is_full = isinstance(error, ContextFull) and session.thread.turns
            hint = tr("Or start a new chat (/clear), or drop a turn (/drop).") if is_full else ""
            session.say(join_sentences(describe_error(error), hint))

    def _run_command(self, line: str) -> None:
        name, argument = (*line.split(None, 1), "")[:2]
        command = find_command(name)
        if command is None:
            hint = tr("/help lists the commands, // starts a message with a slash.")
            self._session.say(join_sentences(describe_unknown(name), hint))
            return
        if argument and not command.takes_argument:
            raise UsageError(tr("{name} takes no argument.", name=command.name))
        is_path = os.path.exists(os.path.expanduser(argument))  # of a file whose name may end with a space
        for start in command.handler(self._session, argument if is_path else argument.strip()) or ():
            self._answer(start)
            if self._session.last_result and self._session.last_result.finish_reason is FinishReason.INTERRUPTED:
                break  # Ctrl-C also cancels the answers that have not started

    def _finish_edit(self, line: str) -> None:
        session = self._session
        edit, session.pending_edit = session.pending_edit, None
        if edit is None or not line.strip():
            session.say(tr("Nothing was changed."))
        elif edit.is_answer:
            session.conversation.replace_answer(edit.turn, line)
            session.say(tr("Answer changed. The messages after it are kept: /branch"))
        else:
            self._send(_message_text(line), lambda message: session.conversation.edit(edit.turn, message))

    def _send(self, text: str, start: Callable[[str], Iterator[Event]]) -> None:
        """Start the answer to `text`, with the files that it mentions; the user chooses how to cut files that are too
        long."""
        message = self._attach_mentions(text)
        if message is None:
            return
        pastes = self._pastes.find(text)
        try:
            for paste in pastes:
                self._session.say(describe_cost(self._session, paste))
            self._answer(lambda: start(message))
        except (ContextFull, TextTooLong):
            if not pastes:
                raise
            shorter = shorten_pastes(self._session, message, pastes)
            if shorter is not None:
                self._answer(lambda: start(shorter))

    def _attach_mentions(self, text: str) -> str | None:
        """Attach the files that `text` mentions and does not contain yet; return None if nothing is to be sent."""
        documents = [read_document(path) for path in find_mentions(text, Path())]
        documents = [document for document in documents if document.to_markdown() not in text]
        for name in find_missing_mentions(text, Path()):
            self._session.say(tr("There is no file {name}; sending the name as text.", name=name))
        return attach_documents(self._session, text, documents)

    # --- answers

    def _answer(self, start: AnswerStarter) -> None:
        """Start an answer, show it, and print notes about it."""
        session = self._session
        with iterate_in_thread(start, session.conversation.stop) as events:
            done = self._show(events)
        session.record_result(done)
        reason = done.finish_reason
        if reason not in (FinishReason.EOS, FinishReason.STOP_STRING) or done.is_incomplete:
            has_answer = session.thread.last is not None and session.thread.last.role == ASSISTANT
            can_continue = reason in (FinishReason.LENGTH, FinishReason.INTERRUPTED) and has_answer
            incomplete = tr("The answer does not follow the grammar yet.") if done.is_incomplete else ""
            hint = tr("Type /continue for more.") if can_continue else ""
            session.say(join_sentences(f"[{tr(reason.value)}]", incomplete, hint))
        if reason is FinishReason.INTERRUPTED:
            self._drop_queue()
        if session.show_stats:
            session.say(describe_stats(done))
            if drafter := self._drafter():
                session.say(describe_drafting(drafter))
        self._print_notes()
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _show(self, events: Iterator[Event]) -> Done:
        session = self._session
        if not supports_ansi(sys.stdout):
            return print_answer(events, sys.stdout, sys.stderr)
        screen, window = Screen(sys.stdout, shutil.get_terminal_size), session.conversation.window
        view = AnswerView(
            screen,
            render_options,
            window.n_ctx if window else 0,
            self._editor.describe_typed,
            markdown=session.render_markdown,
        )
        keys = self._editor.capture(view.redraw_footer, works_during_answer, lambda line: self._run_beside(view, line))
        with keys, call_on_resume(screen.leave):
            return view.show(events)

    def _run_beside(self, view: AnswerView, line: str) -> None:
        """Run a command while an answer is shown, and print its output above the rest of the answer."""
        session, say = self._session, self._session.say
        view.add_note(f"\n> {line}")
        session.say = view.add_note
        try:
            self._dispatch(line)
        finally:
            session.say = say

    def _print_notes(self) -> None:
        """Say that the draft model was unloaded, or that the journal cannot be written, once each."""
        session = self._session
        drafter = self._drafter()
        is_unloaded = drafter is not None and drafter.has_given_up
        if is_unloaded and not self._printed_unloading:
            session.say(tr(DRAFT_UNLOADED))
        self._printed_unloading = is_unloaded
        save_error = session.journal_writer.error if session.journal_writer else ""
        if save_error and save_error != self._printed_save_error:
            session.say(tr("Cannot save this chat: {reason}. Will try again.", reason=save_error))
        self._printed_save_error = save_error

    def _format_toolbar(self) -> str:
        """Return the line below the input line: the model, and numbers of the last answer."""
        session = self._session
        parts = [session.model]
        if session.last_result:
            stats, window = session.last_result.stats, session.conversation.window
            with contextlib.suppress(QwenlocalError):  # the next message raises it again
                if window:
                    used, n_ctx = window.count_used_tokens(session.thread), window.n_ctx
                    parts.append(tr("{used:,} of {n_ctx:,} tokens", used=used, n_ctx=n_ctx))
            if stats.answer_speed:
                speed, seconds = stats.answer_speed, stats.first_token
                parts.append(
                    tr("{speed:.1f} tokens/s, first token after {seconds:.1f} s", speed=speed, seconds=seconds)
                )
        return join_fitting(parts, " | ", terminal_width())


def _message_text(line: str) -> str:
    """Return what a line that is no command sends."""
    block = unquote_block(line)
    return unescape_slashes(line) if block is None else block


def render_options() -> RenderOptions:
    """Return the current width and color support of the terminal."""
    return RenderOptions(terminal_width(), color=supports_color(sys.stdout))
