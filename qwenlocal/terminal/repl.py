"""The chat loop: read a line, then run a slash command or answer the message."""

from __future__ import annotations

import functools
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit.application import Application
from prompt_toolkit.formatted_text import StyleAndTextTuples

from qwenlocal.chat.documents import find_mentions, find_missing_mentions, read_document
from qwenlocal.chat.events import Done, Event, FinishReason
from qwenlocal.chat.worker import iterate_in_thread
from qwenlocal.errors import ContextFull, QwenlocalError, UsageError
from qwenlocal.formatting import replace_surrogates
from qwenlocal.i18n import tr
from qwenlocal.terminal.ansi import supports_ansi, supports_color
from qwenlocal.terminal.attachments import attach_documents
from qwenlocal.terminal.commands.table import ExitChat, describe_unknown, find_command, is_command, unescape_slashes
from qwenlocal.terminal.input import PasteStore, create_line_editor
from qwenlocal.terminal.markdown import RenderOptions, warm_up
from qwenlocal.terminal.screen import Screen
from qwenlocal.terminal.session import AnswerStarter, Session
from qwenlocal.terminal.tty import disable_echo
from qwenlocal.terminal.type_ahead import TypeAhead, capture_keys
from qwenlocal.terminal.view import DRAFT_UNLOADED, AnswerView, describe_drafting, describe_stats, print_answer

if TYPE_CHECKING:
    from qwenlocal.engine.draft_model import ModelDrafter

PROMPT: StyleAndTextTuples = [("bold fg:ansigreen", "> ")]


class Repl:
    """The read-eval-print loop of one chat."""

    def __init__(
        self,
        session: Session,
        *,
        history: Path | None,
        drafter: Callable[[], ModelDrafter | None],
        on_ready: Callable[[], object],
    ) -> None:
        """
        Prepare the loop; the lines typed are appended to the file `history`, if given.

        `drafter` returns the drafter of the current model, if it has a draft model. `on_ready` is called when the input
        line is shown for the first time, so that the model can load while the user types.
        """
        self._session, self._drafter, self._on_ready = session, drafter, on_ready
        self._type_ahead, self._pastes = TypeAhead(), PasteStore()
        self._editor = create_line_editor(session, self._pastes, history, self._format_toolbar)
        self._editor.app.after_render.add_handler(self._after_render)
        self._printed_unloading, self._printed_save_error, self._is_warm = False, "", False

    def run(self, first_message: str | None = None) -> None:
        """Chat until the user exits; `first_message` is sent at once."""
        session = self._session
        session.say(tr("Chatting with {model}. /help for commands, Ctrl-D to exit.", model=session.model))
        try:
            with disable_echo(sys.stdin, sys.stdout):
                self._loop(first_message)
        except (EOFError, ExitChat):
            return
        finally:
            if session.journal_writer:
                session.journal_writer.close()

    def _loop(self, first_message: str | None) -> None:
        """Process lines until the user presses Ctrl-C twice."""
        session = self._session
        has_warned = False
        if first_message:
            self._process(first_message)
        while True:
            try:
                self._process(self._read_line())
                has_warned = False
            except KeyboardInterrupt:
                if session.pending_edit:
                    session.pending_edit = None
                    session.say(tr("Nothing was changed."))
                    continue
                if has_warned:
                    return
                session.say(tr("(Press Ctrl-C again or Ctrl-D to exit.)"))
                has_warned = True

    def on_model_loaded(self, failure: BaseException | None) -> None:
        """End the chat with `failure` if the model could not be loaded. Can be called from any thread."""
        app = self._editor.app
        if failure is not None and app.is_running and app.loop is not None:
            app.loop.call_soon_threadsafe(functools.partial(app.exit, exception=failure))

    def _after_render(self, _app: Application[str]) -> None:
        self._on_ready()
        if not self._is_warm and supports_ansi(sys.stdout) and self._session.render_markdown:
            threading.Thread(target=warm_up, daemon=True).start()
        self._is_warm = True

    # --- input

    def _read_line(self) -> str:
        """Return the next line: one that was sent during the last answer, or one typed now."""
        session, type_ahead = self._session, self._type_ahead
        if type_ahead.submitted:
            text = type_ahead.submitted.pop(0)
            sys.stdout.write(f"> {text}\n")
            return text
        if type_ahead.eof:
            raise EOFError
        default = session.default_text or type_ahead.text
        session.default_text = type_ahead.text = ""
        return self._pastes.expand(replace_surrogates(self._editor.prompt(PROMPT, default=default)))

    def _process(self, line: str) -> None:
        """Run a command, or send a message; print errors."""
        session = self._session
        if line.strip() and not is_command(line):
            _ = session.conversation  # outside `try`: without a model the chat ends
        try:
            if session.pending_edit and not (is_command(line) and find_command(line.split()[0])):
                self._finish_edit(line)
            elif is_command(line):
                session.pending_edit = None
                self._run_command(line)
            elif line.strip():
                self._send(unescape_slashes(line))
        except QwenlocalError as error:
            is_full = isinstance(error, ContextFull)
            hint = tr("Or start a new chat (/clear), or drop a turn (/drop).") if is_full else ""
            session.say(" ".join(part for part in (str(error), error.hint, hint) if part))

    def _run_command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        command = find_command(name.strip())
        if command is None:
            hint = tr("/help lists the commands, // starts a message with a slash.")
            self._session.say(f"{describe_unknown(name.strip())} {hint}")
            return
        if argument.strip() and not command.takes_argument:
            raise UsageError(tr("{name} takes no argument.", name=command.name))
        result = command.handler(self._session, argument.strip())
        for start in [result] if callable(result) else result or ():
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
            session.say(tr("Answer changed. What followed it is kept: /branch"))
        else:
            message = self._attach_mentions(unescape_slashes(line))
            if message is not None:
                self._answer(lambda: session.conversation.edit(edit.turn, message))

    def _send(self, text: str) -> None:
        message = self._attach_mentions(text)
        if message is not None:
            self._answer(lambda: self._session.conversation.ask(message))

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
        if reason not in (FinishReason.EOS, FinishReason.STOP_STRING):
            can_continue = reason in (FinishReason.LENGTH, FinishReason.INTERRUPTED) and done.ids
            hint = " " + tr("Type /continue for more.") if can_continue else ""
            session.say(f"[{tr(reason.value)}]{hint}")
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
        view = AnswerView(
            Screen(sys.stdout, shutil.get_terminal_size),
            render_options,
            session.conversation.n_ctx,
            lambda: self._type_ahead.text,
            markdown=session.render_markdown,
        )
        with capture_keys(sys.stdin, self._type_ahead, view.redraw_footer):
            return view.show(events)

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
            stats, n_ctx = session.last_result.stats, session.conversation.n_ctx
            used = stats.prompt_tokens + stats.answer_tokens
            parts.append(tr("{used:,} of {n_ctx:,} tokens", used=used, n_ctx=n_ctx))
            if stats.answer_speed:
                speed, seconds = stats.answer_speed, stats.first_token
                parts.append(
                    tr("{speed:.1f} tokens/s, first token after {seconds:.1f} s", speed=speed, seconds=seconds)
                )
        return " | ".join(parts)


def render_options() -> RenderOptions:
    """Return the current width and color support of the terminal."""
    return RenderOptions(max(20, shutil.get_terminal_size().columns), color=supports_color(sys.stdout))
