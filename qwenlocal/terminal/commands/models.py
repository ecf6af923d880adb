"""Commands about the model and the manner of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from qwenlocal.errors import UsageError
from qwenlocal.i18n import mark, tr
from qwenlocal.terminal.session import Session

SETTINGS = {
    "temperature": mark("0 to 10; 0 takes the likeliest token each time"),
    "top_k": mark("0 (all) to 1,000,000; choose among so many of the likeliest tokens"),
    "top_p": mark("0 to 1; choose among tokens of this probability together"),
    "min_p": mark("0 to 1; drop tokens below this share of the likeliest"),
    "repeat_penalty": mark("0.01 to 10; 1 is none"),
    "seed": mark("a number, or none: another one each time"),
    "max_tokens": mark("1 or more, or none: until the context is full"),
    "overflow": mark("shift, summarise or stop: what happens when the context is full"),
}
_NONE = ("none", "off", "-")


def model(session: Session, rest: str) -> None:
    """Go on with another model; without a name, show which it is and which there are."""
    name = rest.strip()
    if not name:
        session.say(
            tr(
                "{model} answers. On this disk: {names}.",
                model=session.model,
                names=", ".join(session.models.names()) or tr("no other"),
            )
        )
        return
    session.conversation = session.models.switch(name, session.thread)
    session.model = name.rpartition("/")[2] if name.startswith((".", "/", "~")) else name
    if session.keeper:
        session.keeper.model = session.models.current
    session.say(
        tr(
            "{model} goes on from here, with room for {n_ctx:,} tokens.",
            model=session.model,
            n_ctx=session.conversation.n_ctx or 0,
        )
    )


def system(session: Session, text: str) -> None:
    """Another system prompt; without one, show it."""
    if text:
        session.thread.tell(text)
        session.say(tr("The model is told so from the next message on."))
    else:
        session.say(session.thread.system or tr("(the model's own system prompt)"))


def prompt(session: Session, rest: str) -> None:
    """A system prompt from a file; without a name, show which there are."""
    found = prompt_files(session.prompts)
    name = rest.strip()
    if not name:
        session.say(
            tr("Prompts: {names}. Your own go into {folder}.", names=", ".join(found), folder=session.prompts[-1])
        )
        return
    if name not in found:
        raise UsageError(
            tr("There is no prompt {name}.", name=name), hint=tr("There are: {names}", names=", ".join(found))
        )
    try:
        text = found[name].read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as reason:
        raise UsageError(tr("The prompt {name} cannot be read: {reason}.", name=name, reason=reason)) from reason
    system(session, text)


def prompt_files(folders: Sequence[Path]) -> dict[str, Path]:
    """Prompts by their names: the files `*.txt` and `*.md` of the folders; of two alike, the later folder's."""
    files = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    return {path.stem: path for path in files if path.suffix in (".txt", ".md") and path.is_file()}


def set_(session: Session, rest: str) -> None:
    """`/set temperature 0.3`; alone, show all."""
    name, _, value = rest.strip().replace("=", " ").partition(" ")
    manner = session.conversation.manner
    known = {**{k: v for k, v in asdict(manner.sampling).items() if k in SETTINGS}}
    known |= {"max_tokens": manner.limit, "overflow": manner.overflow}
    if not name:
        for setting, range_ in SETTINGS.items():
            session.say(f"  {setting:<14}  {_shown(known[setting]):<8}  {tr(range_)}")
        return
    name = name.replace("-", "_")
    if name not in SETTINGS:
        raise UsageError(
            tr("There is no setting {name}.", name=name), hint=tr("There are: {names}", names=", ".join(SETTINGS))
        )
    if not value.strip():
        session.say(tr("{name} is {shown} ({range})", name=name, shown=_shown(known[name]), range=tr(SETTINGS[name])))
        return
    _change(session, name, value.strip().lower())
    session.say(tr("{name} is {value} from now on.", name=name, value=value.strip()))


def _change(session: Session, name: str, value: str) -> None:
    manner = session.conversation.manner
    if name == "overflow":
        if value not in ("shift", "summarise", "stop"):
            raise UsageError(tr("overflow is shift, summarise or stop; it is {value}.", value=value))
        manner.overflow = value
    elif name == "max_tokens":
        manner.limit = None if value in _NONE else _at_least_one(name, value)
    elif name == "seed" and value in _NONE:
        manner.sampling = replace(manner.sampling, seed=None)
    else:
        kind = int if name in ("top_k", "seed") else float
        manner.sampling = manner.sampling.with_known({name: _parsed(name, value, kind)})


def _at_least_one(name: str, value: str) -> int:
    number = int(_parsed(name, value, int))
    if number < 1:
        raise _nothing_for(name, value)
    return number


def _parsed(name: str, value: str, kind: type[int] | type[float]) -> float | int:
    try:
        return kind(value.replace(",", "." if kind is float else ""))
    except ValueError as wrong:
        raise _nothing_for(name, value) from wrong


def _nothing_for(name: str, value: str) -> UsageError:
    return UsageError(tr("“{value}” is nothing for {name}: {range}.", value=value, name=name, range=tr(SETTINGS[name])))


def _shown(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
