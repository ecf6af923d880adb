"""Commands about the model, its system prompt and the settings of its answers."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, replace
from pathlib import Path

from qwenlocal.chat.context_window import EVICTION_THRESHOLD, OVERFLOW_ALIASES, OVERFLOW_POLICIES
from qwenlocal.chat.documents import find_mentions, find_missing_mentions, read_document
from qwenlocal.chat.prompt_files import find_prompt_files
from qwenlocal.errors import InvalidChoice, ModelNotFound, UsageError
from qwenlocal.i18n import mark, tr
from qwenlocal.paths import parse_typed_path, unquote_path
from qwenlocal.terminal.session import Session
from qwenlocal.text_encoding import read_text

SETTINGS = {
    "temperature": mark("0 to 10; 0 always takes the most likely token"),
    "top_k": mark("0 to 1,000,000; keep this many of the most likely tokens, 0 keeps all"),
    "top_p": mark("0 to 1; keep the most likely tokens with this total probability"),
    "min_p": mark("0 to 1; drop tokens below this share of the highest probability"),
    "repeat_penalty": mark("0.01 to 10; penalize repeated tokens, 1 is off"),
    "repeat_last_n": mark("0 to 131,072; the number of tokens that penalties look back, 0 is off"),
    "frequency_penalty": mark("-2 to 2; penalize a token for each time it occurs, 0 is off"),
    "presence_penalty": mark("-2 to 2; penalize a token that occurs, 0 is off"),
    "seed": mark("an integer, or none for a new one each time"),
    "max_tokens": mark("1 or more, or none to answer until the context is full"),
    "overflow": mark("shift, summarize or stop; what to do when the context is full"),
}
_OPTION_NAMES = {"temp": "temperature", "n": "max_tokens"}  # options of `run` whose names differ
_NONE = ("none", "off", "-")
_INTEGER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)")
_SHORT_PROMPT = 200  # characters, which any context holds; to count tokens, the model must be loaded


def switch_model(session: Session, name: str) -> None:
    """Continue with another model; without a name, show the current and the available ones."""
    if not name:
        names = session.models.names()
        if set(names) <= {session.model, session.models.current}:
            session.say(tr("Current model: {model}. There are no others.", model=session.model))
        else:
            listed = ", ".join(names)
            session.say(tr("Current model: {model}. Available: {names}.", model=session.model, names=listed))
        return
    name = unquote_path(name) if not os.path.exists(name) else name
    session.conversation = session.models.switch(name, session.thread)
    session.model = Path(name).name if os.path.exists(os.path.expanduser(name)) else name
    if session.journal_writer:
        session.journal_writer.model = session.models.current
    if window := session.conversation.window:
        n_ctx = window.n_ctx
        session.say(tr("Switched to {model} with a context of {n_ctx:,} tokens.", model=session.model, n_ctx=n_ctx))
    else:
        session.say(tr("Switched to {model}.", model=session.model))
    check_system_prompt(session)


def set_system_prompt(session: Session, argument: str) -> None:
    """Set the system prompt, which may mention files; without a text, show it."""
    if argument:
        session.thread.set_system_prompt(_insert_files(argument))
        session.say(tr("System prompt set. It applies from the next message on."))
        check_system_prompt(session)
    else:
        session.say(session.thread.system or tr("(the model's default system prompt)"))


def _insert_files(text: str) -> str:
    """
    Return the text of the file if `text` is `@file`; otherwise put the files that it mentions before it.

    Raises
    ------
    ModelNotFound: there is no such file. UsageError: a file contains no text.
    """
    documents = [read_document(path) for path in find_mentions(text, Path())]
    if text.startswith("@"):
        if os.path.isfile(parse_typed_path(text[1:])):
            return documents[0].text.strip()
        if missing := find_missing_mentions(text, Path()):
            raise ModelNotFound.unreadable(missing[0])
    return "\n\n".join([*(document.to_markdown() for document in documents), text])


def check_system_prompt(session: Session) -> None:
    """Say so if the system prompt leaves too little of the context."""
    if len(session.thread.system) <= _SHORT_PROMPT:
        return
    window = session.conversation.window
    if window is None:
        return
    count, n_ctx = window.count_system_tokens(session.thread), window.n_ctx
    if count > n_ctx * EVICTION_THRESHOLD:
        session.say(
            tr(
                "The system prompt has {count:,} tokens, which leaves too little of the context of {n_ctx:,} tokens "
                "for a chat. Shorten it with /system, or start again with a longer context: -c {needed}",
                count=count,
                n_ctx=n_ctx,
                needed=-(-count * 2 // 1024) * 1024,
            )
        )


def use_prompt_file(session: Session, name: str) -> None:
    """Set the system prompt from a file; without a name, list the files."""
    files = find_prompt_files(session.prompt_folders)
    names = ", ".join(files)
    if not name:
        session.say(tr("Prompts: {names}. Add your own in {folder}.", names=names, folder=session.prompt_folders[-1]))
        return
    if name not in files:
        raise UsageError(
            tr("No prompt is called “{name}”.", name=name), hint=tr("Available prompts: {names}", names=names)
        )
    session.thread.set_system_prompt(read_text(files[name]).strip())
    session.say(tr("System prompt set: {name}. It applies from the next message on.", name=name))
    check_system_prompt(session)


def change_setting(session: Session, argument: str) -> None:
    """Change a setting (`/set temperature 0.3`); without a value, show it; without a name, show all."""
    name, _, value = argument.replace("=", " ").partition(" ")
    name, value = name.lstrip("-").replace("-", "_"), value.strip()
    name = _OPTION_NAMES.get(name, name)
    config = session.conversation.config
    current = {**asdict(config.sampling), "max_tokens": config.max_tokens, "overflow": config.overflow}
    current |= dict.fromkeys(config.unset, tr("default"))
    if not name:
        for setting, description in SETTINGS.items():
            if setting == "overflow" and session.conversation.window is None:  # the engine decides
                continue
            session.say(f"  {setting:<17}  {_format_value(current[setting]):<8}  {tr(description)}")
        return
    if name not in SETTINGS:
        raise UsageError(
            tr("No setting is called “{name}”.", name=name),
            hint=tr("Available settings: {names}", names=", ".join(SETTINGS)),
        )
    if not value:
        shown = _format_value(current[name])
        session.say(tr("{name} is {value} ({range})", name=name, value=shown, range=tr(SETTINGS[name])))
        return
    _apply_setting(session, name, value.lower())
    session.say(tr("{name} is now {value}.", name=name, value=value))


def _apply_setting(session: Session, name: str, value: str) -> None:
    config = session.conversation.config
    if name == "overflow":
        session.require_window("/set overflow")
        value = OVERFLOW_ALIASES.get(value, value)
        if value not in OVERFLOW_POLICIES:
            raise InvalidChoice("overflow", OVERFLOW_POLICIES, value)
        config.overflow = value
    elif name == "max_tokens":
        config.max_tokens = None if value in _NONE else int(_parse_number(name, value, int))
    elif name == "seed" and value in _NONE:
        config.sampling = replace(config.sampling, seed=None)
    else:
        kind = int if name in ("top_k", "repeat_last_n", "seed") else float
        config.sampling = config.sampling.with_overrides({name: _parse_number(name, value, kind)})
    config.unset -= {name}


def _parse_number(name: str, value: str, kind: type[int] | type[float]) -> float | int:
    """Parse an integer such as 1,000, or a number with a decimal point or comma."""
    is_number = _INTEGER.fullmatch(value) if kind is int else "_" not in value
    try:
        number = kind(value.replace(",", "." if kind is float else ""))
        if not is_number or (name == "max_tokens" and number < 1):
            raise ValueError
    except ValueError as error:
        message = tr("“{value}” is not a valid {name}: {range}.", value=value, name=name, range=tr(SETTINGS[name]))
        raise UsageError(message) from error
    return number


def _format_value(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
