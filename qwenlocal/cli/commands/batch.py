"""`qwenlocal run --batch`: answer many prompts, several at once; each answer is a line of JSON."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qwenlocal.chat.chat_template import encode_messages, require_tokens
from qwenlocal.chat.events import FinishReason
from qwenlocal.chat.worker import iterate_in_thread
from qwenlocal.cli.console import say
from qwenlocal.cli.context import AppContext
from qwenlocal.cli.options import RunOptions
from qwenlocal.cli.run_models import create_loader, load_with_status
from qwenlocal.cli.text_input import fill_placeholders, read_prompt_file
from qwenlocal.engine.batching import BatchGenerator, BatchRequest, BatchResult, choose_batch_size
from qwenlocal.engine.context import Context
from qwenlocal.engine.grammar import is_complete
from qwenlocal.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from qwenlocal.errors import ContextFull, IncompleteAnswer, Interrupted, NotWritable, UsageError
from qwenlocal.huge_pages import collapse_buffers
from qwenlocal.i18n import tr
from qwenlocal.paths import parse_path
from qwenlocal.terminal.progress import status_line
from qwenlocal.text_encoding import read_text

if TYPE_CHECKING:
    from qwenlocal.chat.chat_model import ChatModel

MAX_BATCH_SIZE = 16
_MAX_BYTES = 1 << 30  # of prompts
_ID_FIELD = re.compile(rb'\{"id": ("(?:[^"\\]|\\.)*(?:"|\\?\Z)|-?\d+)', re.DOTALL)


@dataclass(frozen=True)
class BatchItem:
    """A line of the batch: its id and the messages to answer."""

    id: str | int
    messages: Sequence[Mapping[str, str]]


def run_batch(app: AppContext, options: RunOptions) -> None:
    """
    Answer every prompt of a file that has no answer yet.

    The file and the output are checked before a model is downloaded or loaded.
    """
    assert options.batch is not None
    system = options.system or (read_prompt_file(options.file).rstrip("\r\n") if options.file else "")
    items = read_batch(options.batch, system, options.template, options.variables)
    output = parse_path(options.output) if options.output else None
    if output and output.exists() and output.samefile(parse_path(options.batch)):
        raise UsageError(tr("{output} is both input and output.", output=output), hint=tr("Name another file with -o."))
    finished = read_finished_ids(output)
    remaining = [item for item in items if item.id not in finished]
    if not remaining:
        app.say(tr("All prompts are already answered ({count:,}).", count=len(items)))
        return
    model, draft = app.library.models.ensure_models(options.model_name, options.draft)
    adapters = app.library.adapters.ensure_adapters(options.adapters, model.record)
    loader = create_loader(app, options, draft, adapters)
    loaded = load_with_status(loader, model)
    try:
        answer_batch(options, loaded, remaining, output, len(items) - len(remaining))
    finally:
        loader.close(loaded, model.record, keep=False)


# --- input


def read_batch(name: str, system: str, template: str | None, variables: Mapping[str, str]) -> list[BatchItem]:
    """
    Read the file `name`: a prompt per line, as text or as JSON: "text", {"prompt": …} or {"messages": […]}.

    With a template, the keys of an object fill its placeholders; text fills {input}.

    Raises
    ------
    ModelNotFound: the file cannot be read. UsageError: a line has another form, or an id occurs twice.
    """
    lines = read_text(parse_path(name), limit=_MAX_BYTES).split("\n")  # splitlines() would cut JSON at U+2028
    items = [
        _parse_line(number, line.rstrip("\r"), system, template, variables)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    counts = collections.Counter(item.id for item in items)
    if repeated := [id for id, count in counts.items() if count > 1]:
        raise UsageError(
            tr("Several lines of {name} have the id {id}.", name=name, id=repeated[0]),
            hint=tr("Give each line its own id, or none."),
        )
    if not items:
        raise UsageError(
            tr("{name} has no prompts.", name=name), hint=tr('Write one per line: text, or {"prompt": "…"}')
        )
    return items


def _parse_line(number: int, line: str, system: str, template: str | None, variables: Mapping[str, str]) -> BatchItem:
    data: Any = line
    if line.lstrip()[:1] in ('"', "{"):
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                tr("Line {number} of the batch is not JSON: {reason}.", number=number, reason=error)
            ) from error
    if isinstance(data, str):
        data = {"prompt": data}
    id = data.get("id", number)
    if not isinstance(id, (str, int)):
        raise UsageError(tr("The id in line {number} of the batch is neither text nor a number.", number=number))
    messages = data.get("messages")
    if messages is not None:
        if not _are_messages(messages):
            raise UsageError(
                tr("The messages in line {number} of the batch are not a list of roles and contents.", number=number)
            )
        return BatchItem(id, messages)
    texts = {key: str(value) for key, value in data.items() if isinstance(value, (str, int, float))}
    prompt = texts.get("prompt", texts.get("input"))
    if template is not None:
        prompt = fill_placeholders(
            template, {**variables, **({"input": prompt} if prompt is not None else {}), **texts}
        )
    if not prompt or not prompt.strip():
        raise UsageError(
            tr("Line {number} of the batch has no prompt.", number=number),
            hint=tr('Write {"prompt": "…"}, or use --template.'),
        )
    system = texts.get("system", system)
    return BatchItem(
        id, [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
    )


def _are_messages(data: object) -> bool:
    return (
        isinstance(data, list)
        and bool(data)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in data
        )
    )


# --- output of an earlier run


def read_finished_ids(output: Path | None) -> set[str | int]:
    """
    Return the ids that an output has answers for, without those that are incomplete.

    An incomplete last line is removed from the file.

    Raises
    ------
    NotWritable: the file cannot be read or changed. UsageError: it is not the output of a batch.
    """
    if output is None or not os.path.isfile(output):  # Path.is_file raises without permission
        return set()
    try:
        data = output.read_bytes()
        end = data.rfind(b"\n") + 1
        lines = [json.loads(line) for line in data[:end].decode("utf-8").split("\n") if line.strip()]
        if not all(isinstance(line["answer"], str) for line in lines) or not _is_incomplete_line(data[end:]):
            raise ValueError("other lines than a batch writes")
        if end < len(data):
            os.truncate(output, end)
        return {line["id"] for line in lines if line.get("complete", True) and not _was_too_long(line)}
    except OSError as error:
        raise NotWritable(output.parent, error.strerror or str(error), hint=tr("Choose another folder.")) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            tr("{output} is not the output of a batch.", output=output), hint=tr("Name another file with -o.")
        ) from error


def _was_too_long(line: Mapping[str, Any]) -> bool:
    """Tell whether a prompt did not fit; with a larger context it can be answered."""
    return line.get("why") == FinishReason.CONTEXT_FULL.value and not line["answer"]


def _is_incomplete_line(data: bytes) -> bool:
    """Tell whether `data` is the beginning of a line that `_write` writes: `{"id": "a", "answer": "Whe`."""
    id_field = _ID_FIELD.match(data)
    if id_field is None:
        return any(start.startswith(data) for start in (b'{"id": "', b'{"id": -'))
    rest, expected = data[id_field.end() :], b', "answer": "'
    return rest.startswith(expected) or expected.startswith(rest)


# --- answers


def answer_batch(
    options: RunOptions, loaded: ChatModel, items: Sequence[BatchItem], output: Path | None, finished_before: int
) -> None:
    """
    Answer `items`, as many at once as is fastest; an earlier run answered `finished_before`.

    Raises
    ------
    Interrupted: Ctrl-C; the same command with the same output continues. ContextFull: a prompt alone is too long.
    IncompleteAnswer: an answer was cut before it followed its grammar. UsageError: the model is a base model.
    """
    if loaded.template is None:
        raise UsageError(
            tr("A base model continues text; it cannot answer messages."), hint=tr("Use a chat model instead.")
        )
    loaded.context.close()
    batch_size = choose_batch_size(loaded.costs, min(MAX_BATCH_SIZE, len(items)))
    batch_options = replace(loaded.context.options, n_seq_max=batch_size + 1)
    context = Context(loaded.model, batch_options, thread_adapter=loaded.context.thread_adapter)
    collapse_buffers()
    generator, tokenizer, n_ctx = BatchGenerator(context), loaded.model.tokenizer, context.n_ctx
    sampling = options.merge_sampling(loaded.sampling)
    limit = options.max_tokens or n_ctx
    prompts = (encode_messages(loaded.template, item.messages, tokenizer) for item in items)
    requests = [
        BatchRequest(key, require_tokens(ids), sampling, limit, options.stop) for key, ids in enumerate(prompts)
    ]

    def generate() -> Iterator[BatchResult]:
        return generator.generate(requests, tokenizer.is_end)

    begin, tokens, finished = time.monotonic(), 0, 0
    cut: list[Mapping[str, Any]] = []  # the lines of answers that did not end by themselves
    with (
        contextlib.closing(context),
        status_line(sys.stderr) as show,
        _open_output(output) as out,
        iterate_in_thread(generate, generator.stop) as results,
    ):
        for finished, result in enumerate(results, start=1):
            tokens += len(result.ids)
            line = _output_line(items[result.key].id, requests[result.key], result, tokenizer)
            if not result.hit_eos:
                cut.append(line)
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            out.flush()
            show(
                tr(
                    "{done} of {total} answered, {count} at once, {speed:.1f} tokens/s",
                    done=finished_before + finished,
                    total=finished_before + len(items),
                    count=batch_size,
                    speed=tokens / max(0.001, time.monotonic() - begin),
                )
            )
    if finished < len(items):
        raise Interrupted(tr("Finished answers are kept. To continue, run the same command with the same -o."))
    _report_cut_answers(cut, len(items), n_ctx, loaded.model.n_ctx_train)


def _output_line(id: str | int, request: BatchRequest, result: BatchResult, tokenizer: Tokenizer) -> dict[str, Any]:
    """Build the line of an answer; `complete` says whether it follows its grammar, if there is one."""
    detokenizer = IncrementalDetokenizer(request.stops)
    text = "".join(detokenizer.feed(tokenizer.piece(id)) for id in result.ids) + detokenizer.finish()
    line = {
        "id": id,
        "answer": text,
        "why": _finish_reason(result).value,
        "prompt_tokens": len(request.ids),
        "answer_tokens": len(result.ids),
    }
    if request.sampling.grammar is not None:
        line["complete"] = result.hit_eos or is_complete(request.sampling.grammar, text)
    return line


def _report_cut_answers(cut: Sequence[Mapping[str, Any]], total: int, n_ctx: int, n_ctx_train: int) -> None:
    """
    Say how many answers the full context cut; what `-n` and `--stop` cut is what the user asked for.

    Raises
    ------
    ContextFull: a prompt is too long. IncompleteAnswer: an answer does not follow its grammar.
    """
    too_long = [line for line in cut if _was_too_long(line)]
    n_full = sum(line["why"] == FinishReason.CONTEXT_FULL.value for line in cut) - len(too_long)
    if n_full:
        say(
            tr(
                "Cut because the context of {n_ctx:,} tokens is full: {count:,} of {total:,} answers.",
                n_ctx=n_ctx,
                count=n_full,
                total=total,
            )
        )
    if too_long:
        raise ContextFull(too_long[0]["prompt_tokens"], n_ctx, n_ctx_train)
    if n_incomplete := sum(not line.get("complete", True) for line in cut):
        raise IncompleteAnswer(
            tr("Incomplete: {count:,} of {total:,} answers.", count=n_incomplete, total=total),
            hint=tr(
                'Their lines have "complete": false. Allow more tokens (-n) or a longer context (-c), or omit --stop.'
            ),
        )


def _finish_reason(result: BatchResult) -> FinishReason:
    if result.hit_eos:
        return FinishReason.EOS
    if result.hit_stop:
        return FinishReason.STOP_STRING
    return FinishReason.CONTEXT_FULL if result.is_full else FinishReason.LENGTH


def _open_output(path: Path | None) -> AbstractContextManager[TextIO]:
    """Open the output for appending; standard output for None."""
    if path is None:
        return contextlib.nullcontext(sys.stdout)
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise NotWritable(path.parent, error.strerror or str(error), hint=tr("Choose another folder.")) from error
