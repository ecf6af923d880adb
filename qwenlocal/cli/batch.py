"""`qwenlocal run --batch`: many prompts, several at once, each answer a line of JSON as soon as it is there."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from qwenlocal.chat.background import in_background
from qwenlocal.chat.events import Why
from qwenlocal.chat.fill import filled
from qwenlocal.chat.loading import Loaded
from qwenlocal.chat.prompt import chat_ids
from qwenlocal.cli.asked import Asked
from qwenlocal.cli.texts import text_of
from qwenlocal.engine.context import Context
from qwenlocal.engine.text import TextStream
from qwenlocal.engine.together import Request, Result, Together, worth_at_once
from qwenlocal.errors import CannotWrite, ContextFull, Interrupted, UsageProblem
from qwenlocal.language import tr
from qwenlocal.terminal.status import StatusLine

MOST_AT_ONCE = 16
_MOST_PROMPTS = 1 << 30  # bytes
_ID = re.compile(rb'\{"id": ("(?:[^"\\]|\\.)*(?:"|\\?\Z)|-?\d+)', re.DOTALL)


@dataclass(frozen=True)
class Item:
    """A line of the batch: its name, and the messages that it stands for."""

    id: str | int
    messages: Sequence[Mapping[str, str]]


def read_batch(name: str, system: str, template: str | None, values: Mapping[str, str]) -> list[Item]:
    """
    The prompts in the file `name`, one a line: a text, or JSON: "text", {"prompt": …} or {"messages": […]}.

    With a template, an object's keys fill its places; a text is {input}.

    Raises
    ------
    ModelNotFound: the file cannot be read. UsageProblem: a line is none of these.
    """
    lines = text_of(name, most=_MOST_PROMPTS).split("\n")  # splitlines() would cut JSON at U+2028
    items = [
        _item(number, line.rstrip("\r"), system, template, values)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    ids = collections.Counter(item.id for item in items)
    if twice := [id for id, count in ids.items() if count > 1]:
        raise UsageProblem(
            tr("Several lines of {name} have the id {twice}.", name=name, twice=twice[0]),
            hint=tr("Each needs its own, or none."),
        )
    if not items:
        raise UsageProblem(
            tr("There are no prompts in {name}.", name=name), hint=tr('One a line: a text, or {"prompt": "…"}')
        )
    return items


def _item(number: int, line: str, system: str, template: str | None, values: Mapping[str, str]) -> Item:
    data: Any = line
    if line.lstrip()[:1] in ('"', "{"):
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as reason:
            raise UsageProblem(
                tr("Line {number} of the batch is not JSON: {reason}.", number=number, reason=reason)
            ) from reason
    if isinstance(data, str):
        data = {"prompt": data}
    id = data.get("id", number)
    if not isinstance(id, (str, int)):
        raise UsageProblem(tr("The id of line {number} of the batch is neither a text nor a number.", number=number))
    given = data.get("messages")
    if given is not None:
        is_good = isinstance(given, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in given
        )
        if not is_good or not given:
            raise UsageProblem(
                tr("The messages of line {number} of the batch are not a list of roles and contents.", number=number)
            )
        return Item(id, given)
    texts = {key: str(value) for key, value in data.items() if isinstance(value, (str, int, float))}
    prompt = texts.get("prompt", texts.get("input"))
    if template is not None:
        prompt = filled(template, {**values, **({"input": prompt} if prompt is not None else {}), **texts})
    if not prompt or not prompt.strip():
        raise UsageProblem(
            tr("Line {number} of the batch has no prompt.", number=number),
            hint=tr('{"prompt": "…"}, or use --template.'),
        )
    own = texts.get("system", system)
    return Item(id, [*([{"role": "system", "content": own}] if own else []), {"role": "user", "content": prompt}])


def done_before(output: Path | None) -> set[str | int]:
    """The ids that an output has already; a last line that was cut off is taken away."""
    if output is None or not os.path.isfile(output):  # Path.is_file raises without permission
        return set()
    try:
        data = output.read_bytes()
        whole = data.rfind(b"\n") + 1
        lines = [json.loads(line) for line in data[:whole].decode("utf-8").split("\n") if line.strip()]
        if not all(isinstance(line["answer"], str) for line in lines) or not _could_be_ours(data[whole:]):
            raise ValueError("these are other lines")
        if whole < len(data):
            os.truncate(output, whole)
        return {line["id"] for line in lines if not _had_no_room(line)}
    except OSError as reason:
        raise CannotWrite(output.parent, reason.strerror or str(reason), hint=tr("Choose another folder.")) from reason
    except (ValueError, KeyError, TypeError) as reason:
        raise UsageProblem(
            tr("{output} is no output of a batch.", output=output), hint=tr("Name another file with -o.")
        ) from reason


def _had_no_room(line: Mapping[str, Any]) -> bool:
    """Whether a prompt was too long; with more room it can be answered."""
    return line.get("why") == Why.CONTEXT.value and not line["answer"]


def _could_be_ours(cut: bytes) -> bool:
    """Whether a line without an end is the beginning of one that `_write` wrote: `{"id": "a", "answer": "Whe`."""
    begun = _ID.match(cut)
    if begun is None:
        return any(start.startswith(cut) for start in (b'{"id": "', b'{"id": -'))
    after, answer = cut[begun.end() :], b', "answer": "'
    return after.startswith(answer) or answer.startswith(after)


def answer_batch(asked: Asked, loaded: Loaded, items: Sequence[Item], output: Path | None, before: int) -> None:
    """
    Answer `items`, as many at once as pays; `before` were answered in an earlier run.

    Raises
    ------
    Interrupted: Ctrl-C; the same command with the same output goes on. ContextFull: a prompt is too long even alone.
    """
    if loaded.template is None:
        raise UsageProblem(tr("A base model continues text; it has no turns to answer."), hint=tr("Take a chat model."))
    loaded.context.close()
    count = worth_at_once(loaded.costs, min(MOST_AT_ONCE, len(items)))
    context = Context(loaded.model, replace(loaded.context.options, sequences=count + 1))
    together, vocabulary, n_ctx = Together(context), loaded.model.vocabulary, context.n_ctx
    sampling = replace(loaded.sampling.with_known(asked.sampling), grammar=asked.grammar)
    requests = [
        Request(
            place, chat_ids(loaded.template, item.messages, vocabulary), sampling, asked.limit or n_ctx, asked.stops
        )
        for place, item in enumerate(items)
    ]

    def answers() -> Iterator[Result]:
        return together.answer(requests, vocabulary.is_end)

    status, begun, said, finished = StatusLine(sys.stderr), time.monotonic(), 0, 0
    too_long: list[int] = []
    try:
        with _opened(output) as out, in_background(answers, together.stop) as results:
            for result in results:
                finished += 1
                said += len(result.ids)
                stream = TextStream(asked.stops)
                text = "".join(stream.feed(vocabulary.piece(token)) for token in result.ids) + stream.finish()
                too_long += [result.key] if result.is_full and not result.ids else []
                _write(out, items[result.key], text, result, len(requests[result.key].ids))
                speed = said / max(0.001, time.monotonic() - begun)
                status.show(
                    tr(
                        "{done} of {all} answered, {count} at once, {speed:.1f} tokens/s",
                        done=before + finished,
                        all=before + len(items),
                        count=count,
                        speed=speed,
                    )
                )
    finally:
        status.clear()
        context.close()
    if finished < len(items):
        raise Interrupted(tr("What was answered is kept: the same command with the same -o goes on from there."))
    if too_long:
        first = requests[too_long[0]]
        raise ContextFull(len(first.ids), n_ctx, loaded.model.n_ctx_train)


def _write(out: TextIO, item: Item, text: str, result: Result, prompt_tokens: int) -> None:
    line = {
        "id": item.id,
        "answer": text,
        "why": _why(result).value,
        "prompt_tokens": prompt_tokens,
        "answer_tokens": len(result.ids),
    }
    out.write(json.dumps(line, ensure_ascii=False) + "\n")
    out.flush()


def _why(result: Result) -> Why:
    if result.ended:
        return Why.END
    return Why.STOP if result.has_stopped else Why.CONTEXT if result.is_full else Why.LENGTH


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    """The output for appending, or standard output."""
    if path is None:
        yield sys.stdout
        return
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as reason:
        raise CannotWrite(path.parent, reason.strerror or str(reason), hint=tr("Choose another folder.")) from reason
    with file:
        yield file
