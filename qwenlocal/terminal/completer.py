"""Completion in the input line: commands, their arguments, and files after an @."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from qwenlocal.chat.documents import format_mention, split_open_mention
from qwenlocal.chat.prompt_files import find_prompt_files
from qwenlocal.errors import QwenlocalError
from qwenlocal.i18n import tr
from qwenlocal.paths import unquote_path
from qwenlocal.terminal.commands.models import SETTINGS
from qwenlocal.terminal.commands.table import COMMANDS, find_command
from qwenlocal.terminal.session import Session


class ChatCompleter(Completer):
    """Completes commands at the start of a line, their arguments, and files after an @."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        if before.startswith("/") and not before.startswith("//") and "\n" not in before:
            name, space, argument = before.partition(" ")
            if not space:
                return self._complete_word("command", name)
            command = find_command(name)
            if command and command.completes:
                return self._complete_argument(command.completes, argument.lstrip())
        mention = split_open_mention(before)
        return _complete_mention(*mention) if mention else ()

    def _complete_argument(self, kind: str, typed: str) -> Iterable[Completion]:
        if kind == "file":
            return _complete_path(typed)
        if kind == "model" and ("/" in typed or typed.startswith((".", "~", '"', "'"))):
            return _complete_path(typed, suffix=".gguf")
        return self._complete_word(kind, typed)

    def _complete_word(self, kind: str, typed: str) -> Iterator[Completion]:
        beginning = unquote_path(typed)
        for word, description in self._words(kind):
            name = os.path.basename(word)  # noqa: PTH119 - not always a path
            if word.startswith(beginning) or name.startswith(beginning):
                yield Completion(word, start_position=-len(typed), display_meta=description)

    def _words(self, kind: str) -> Iterable[tuple[str, str]]:
        """Return words with their descriptions; `kind` is that of `Command.completes`."""
        match kind:
            case "command":
                return [(command.name, tr(command.help)) for command in COMMANDS]
            case "setting":
                return [(name, tr(description)) for name, description in SETTINGS.items()]
            case "turn":
                return [(str(number), "") for number in range(1, len(self._session.thread.turns) + 1)]
            case "model":
                with contextlib.suppress(QwenlocalError):  # a remote engine that does not answer
                    models = self._session.models
                    return [(name, "") for name in (*models.names(), *models.nearby_files())]
            case "adapter":
                adapters = self._session.models.adapters
                scales = adapters.scales if adapters else {}
                return [(name, f"{scale:g}") for name, scale in scales.items()] + [("off", ""), ("on", "")]
            case "prompt":
                return [(name, "") for name in find_prompt_files(self._session.prompt_folders)]
            case "code":
                return [("code", tr("the last code block of the last answer"))]
        return []


def _complete_mention(mention: str, quote: str, typed: str) -> Iterator[Completion]:
    for path, name in _find_files(typed):
        text = format_mention(path, quote)
        if name.endswith("/") and not text.endswith("/"):  # the name goes on
            text = text[:-1]
        yield Completion(text, start_position=-len(mention), display=name)


def _complete_path(typed: str, suffix: str = "") -> Iterator[Completion]:
    """Complete a path that is the whole argument of a command, so that spaces need no quotes."""
    quote = typed[:1] if typed.startswith(('"', "'")) else ""
    for path, name in _find_files(typed[len(quote) :], suffix):
        closing = "" if name.endswith("/") else quote
        yield Completion(f"{quote}{path}{closing}", start_position=-len(typed), display=name)


def _find_files(typed: str, suffix: str = "") -> Sequence[tuple[str, str]]:
    """Return what `_match_files` yields; if nothing, `typed` may have the backslashes of a shell."""
    return [*_match_files(typed, suffix)] or [*_match_files(unquote_path(typed), suffix)]


def _match_files(typed: str, suffix: str) -> Iterator[tuple[str, str]]:
    """
    Yield path and name of each folder, and of each file with `suffix`, whose path begins with `typed`.

    Folders end with a slash. Names that nobody could type (control characters, bytes that are not UTF-8) are left out,
    and hidden files unless a dot is typed.
    """
    folder, prefix = os.path.split(typed)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except (OSError, ValueError):
        return
    for entry in entries:
        name = entry.name + ("/" if entry.is_dir() else "")
        is_wanted = name.endswith("/") or name.lower().endswith(suffix)
        is_hidden = name.startswith(".") and not prefix
        if is_wanted and not is_hidden and _is_typable(name) and _normalize(name).startswith(_normalize(prefix)):
            yield typed.removesuffix(prefix) + name, name


def _normalize(name: str) -> str:
    """Compose accents: macOS stores them as characters of their own, keyboards do not."""
    return unicodedata.normalize("NFC", name)


def _is_typable(name: str) -> bool:
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
