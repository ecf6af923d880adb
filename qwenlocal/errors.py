"""
Everything that can go wrong for a user of qwenlocal.

    QwenlocalError                 1  something the user can act on
    ├── EngineGone                 1  llama.cpp ends the process: a device is gone
    ├── UsageProblem               2  the command's words contradict each other
    ├── ModelNotFound              3  no such name, path, file or repository
    │   └── NotConvertedYet        3  the model exists, but only as a checkpoint
    ├── ChatNotFound               3  no chat of that number in the journal
    ├── DownloadFailed             4  no place delivered the bytes
    │   ├── SourceUnreachable      4  nothing answered at all
    │   └── DigestMismatch         4  what arrived is not the published file
    ├── OutputExists               2  a file that would be written is there already
    ├── BadWeights                 5  the file is not a model this program can run
    │   ├── NotFinite              5  a weight is NaN or infinite
    │   ├── BadCheckpoint          5  a checkpoint is damaged or incomplete
    │   └── CannotExpress          5  llama.cpp cannot compute what the checkpoint asks for
    ├── BadCatalog               5  a file in models/ cannot be read
    ├── NotEnoughMemory            6  the model does not fit
    ├── MemoryLow                  6  memory is nearly used up while a model answers
    ├── NoContext                  6  llama.cpp cannot make a context of that size
    ├── DiskFull                   6  no room for the file
    ├── BeingWritten               6  another process is writing this very file
    ├── CannotWrite                6  a folder that must be written is not writable
    ├── CannotPrint                6  standard output takes nothing: a full disk, a terminal that is gone
    ├── JournalUnusable            6  the file of chats is damaged, locked, newer, or cannot be written
    ├── ContextFull                7  the prompt does not fit in the context
    ├── TextTooLong                7  a text is so long that its tokens are not even counted
    └── Interrupted              130  Ctrl-C

The rooms below `cli` raise these where the cause is known; only `cli` turns them into words and exit codes.
Anything else that escapes is a bug, and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwenlocal.i18n import mark, tr


class QwenlocalError(Exception):
    """Something the user can act on: `str(error)` is the sentence, `hint` the next step."""

    exit_code = 1
    http_status = 500

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class EngineGone(QwenlocalError):
    """llama.cpp cannot go on and ends the process; `reason` is what it says, behind the line of its source."""

    def __init__(self, reason: str) -> None:
        place, _, what = reason.partition(": ")
        self.reason = (what if ".c" in place or ".m" in place else reason).strip().rstrip(".")
        super().__init__(
            tr("llama.cpp cannot go on: {reason}.", reason=self.reason),
            hint=tr("Where a graphics card went away or is out of memory, -ngl 0 does without it."),
        )


class UsageProblem(QwenlocalError):
    """The words of a command are off in a way the argument parser cannot see."""

    exit_code, http_status = 2, 400


class ModelNotFound(QwenlocalError):
    """`name` names no model, file or repository; `suggestions` are names that look alike."""

    exit_code, http_status = 3, 404

    def __init__(self, name: str, *, reason: str = "", suggestions: Sequence[str] = (), hint: str = "") -> None:
        self.name, self.suggestions = name, tuple(suggestions)
        if suggestions and not hint:
            hint = tr("Did you mean {name}?", name=tr(" or ").join(suggestions))
        super().__init__(
            reason or tr("There is no model called “{name}”.", name=name),
            hint=hint or tr("See the names: qwenlocal list --all"),
        )


class NotConvertedYet(ModelNotFound):
    """`name` exists as a checkpoint in `repo`, but nobody published a GGUF file of it."""

    def __init__(self, name: str, repo: str) -> None:
        self.repo = repo
        super().__init__(
            name,
            reason=tr(
                "{name} is published as a checkpoint only ({repo}); there is no GGUF file of it to run.",
                name=name,
                repo=repo,
            ),
            hint=tr("Fetch it and convert it in one go: qwenlocal pull {name}", name=name),
        )


class ChatNotFound(QwenlocalError):
    """There is no chat `id` in the journal, or, with "", none at all."""

    exit_code, http_status = 3, 404

    def __init__(self, id: int | str) -> None:
        self.id = id
        said = tr("There is no chat {id}.", id=id) if id else tr("There is no chat to go on with.")
        super().__init__(said, hint=tr("Which there are: qwenlocal chats"))


class DownloadFailed(QwenlocalError):
    """No place delivered the file; what did arrive is kept and the next try goes on from there."""

    exit_code, http_status = 4, 502


class SourceUnreachable(DownloadFailed):
    """None of `places` answered, so nothing is known about the file."""

    def __init__(self, what: str, places: Sequence[str], *, hint: str = "") -> None:
        self.places = tuple(places)
        super().__init__(
            tr(
                "{what} is not on this disk, and none of its sources could be reached ({places}).",
                what=what,
                places="; ".join(places),
            ),
            hint=hint
            or tr("Check the network (qwenlocal doctor), or point HF_ENDPOINT or HTTPS_PROXY at something reachable."),
        )


class DigestMismatch(DownloadFailed):
    """The bytes of `file` have the sha256 `actual` where `expected` was published."""

    def __init__(self, file: str, expected: str, actual: str, *, source: str) -> None:
        self.file, self.expected, self.actual, self.source = file, expected, actual, source
        super().__init__(
            tr(
                "{file} from {source} is not the published file: its sha256 is {actual}…, it should be {expected}….",
                file=file,
                source=source,
                actual=actual[:16],
                expected=expected[:16],
            ),
            hint=tr(
                "The download was thrown away. Try again, or on another network: something in between changes files."
            ),
        )


class BadWeights(QwenlocalError):
    """`path` cannot be used as a model; `reason` is what is wrong with it."""

    exit_code, http_status = 5, 500

    def __init__(self, path: Path | str, reason: str, *, hint: str = "") -> None:
        self.path, self.reason = str(path), reason
        super().__init__(
            f"{path}: {reason}",
            hint=hint
            or tr("Is it the right file, and whole? One that was fetched can be mended: qwenlocal verify NAME"),
        )


class NotFinite(BadWeights):
    """Weights of `tensor` in the file `path` are NaN or infinite, the first of them in `row`."""

    def __init__(self, path: Path | str, tensor: str, row: int, *, hint: str = "") -> None:
        self.tensor, self.row = tensor, row
        super().__init__(
            path,
            tr("“{tensor}” has weights that are NaN or infinite, the first in row {row:,}", tensor=tensor, row=row),
            hint=hint or tr("The model was damaged in training or on the way; fetch it again, whole."),
        )


class BadCheckpoint(BadWeights):
    """A file of a checkpoint is damaged, missing or contradicts another one."""

    def __init__(self, path: Path | str, reason: str, *, hint: str = "") -> None:
        super().__init__(path, reason, hint=hint or tr("Fetch the checkpoint again, whole, and try once more."))

    @classmethod
    def unreadable(cls, path: Path | str, reason: OSError) -> BadCheckpoint:
        """It is there, but the system does not let it be read."""
        hint = tr("Check who may read it.") if isinstance(reason, PermissionError) else ""
        return cls(path, tr("it cannot be read ({reason})", reason=reason.strerror), hint=hint)


_AS_PUBLISHED = mark(
    "Nothing was written, since llama.cpp would answer wrongly with it. What converts: checkpoints of Qwen1.5, "
    "CodeQwen1.5, Qwen2 and Qwen2.5 as they were published."
)


class CannotExpress(BadWeights):
    """The checkpoint in `path` is whole, but llama.cpp would compute something else; `reason` is what."""

    def __init__(self, path: Path | str, reason: str, *, hint: str = "") -> None:
        super().__init__(path, reason, hint=hint or tr(_AS_PUBLISHED))


class OutputExists(QwenlocalError):
    """`path` would be written, and is there already."""

    exit_code, http_status = 2, 409

    def __init__(self, path: Path, *, hint: str = "") -> None:
        self.path = path
        super().__init__(
            tr("{path} is there already.", path=path), hint=hint or tr("Name another file, or replace it with --force.")
        )


class BadCatalog(QwenlocalError):
    """A file in `models/` cannot be read."""

    exit_code = 5

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(
            tr("The catalogue file {path} cannot be read: {reason}.", path=path, reason=reason),
            hint=tr("Restore it (git checkout, or install qwenlocal again). Models given by path still run."),
        )


class NotEnoughMemory(QwenlocalError):
    """A model needs `needed` bytes where `available` are free."""

    exit_code, http_status = 6, 507

    def __init__(self, what: str, needed: int, available: int, *, hint: str) -> None:
        self.needed, self.available = needed, available
        super().__init__(
            tr(
                "{what} needs about {needed:.1f} GiB of memory; {available:.1f} GiB are available.",
                what=what,
                needed=needed / 2**30,
                available=available / 2**30,
            ),
            hint=hint,
        )


class MemoryLow(QwenlocalError):
    """
    `available` bytes are left while a model answers, or for `stalled` (0 to 1) of the last ten seconds everything
    waited for memory; the answer was stopped.
    """

    exit_code, http_status = 6, 507

    def __init__(self, available: int, stalled: float = 0.0) -> None:
        self.available, self.stalled = available, stalled
        left = tr("{available:,.0f} MiB are left", available=available / 2**20)
        said = tr("Memory is nearly used up ({left}), so the answer was stopped.", left=left)
        if stalled:
            said = tr(
                "The machine does little but move memory about ({stalled:.0%} of its time; {left}), so the answer was "
                "stopped.",
                stalled=stalled,
                left=left,
            )
        super().__init__(
            said,
            hint=tr("What was said is kept. Close other programs, then go on."),
        )


class JournalUnusable(QwenlocalError):
    """Chats cannot be kept in the file `path`, which may be `damaged`; `reason` says why."""

    exit_code, http_status = 6, 507

    def __init__(self, path: Path, reason: str, *, damaged: bool = False) -> None:
        self.path, self.reason = path, reason
        hint = tr("What can be read of it can be copied out: qwenlocal chats recover")
        if not damaged:
            hint = tr("Nothing was changed in it. To chat without keeping what is said: --no-journal")
        super().__init__(tr("The chats in {path} cannot be used: {reason}.", path=path, reason=reason), hint=hint)


class NoContext(QwenlocalError):
    """llama.cpp cannot make a context of `n_ctx` tokens; `reason` is what it says."""

    exit_code, http_status = 6, 507

    def __init__(self, n_ctx: int, reason: str) -> None:
        self.n_ctx, self.reason = n_ctx, reason
        super().__init__(
            tr("There is no making room for {n_ctx:,} tokens: {reason}.", n_ctx=n_ctx, reason=reason),
            hint=tr("Ask for less: -c {fewer}", fewer=max(512, n_ctx // 2)),
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 10e6 else f"{size / 1e6:,.0f} MB"


class DiskFull(QwenlocalError):
    """`folder` has `free` bytes left where `needed` more must be written."""

    exit_code, http_status = 6, 507

    def __init__(self, folder: Path, needed: int, free: int) -> None:
        self.folder, self.needed, self.free = folder, needed, free
        super().__init__(
            tr(
                "The disk of {folder} has {free} free; {needed} are needed.",
                folder=folder,
                free=_megabytes(free),
                needed=_megabytes(needed),
            ),
            hint=tr("Free some room (qwenlocal list, qwenlocal rm NAME), or move QWENLOCAL_HOME or HF_HOME elsewhere."),
        )


class BeingWritten(QwenlocalError):
    """Another process is writing this very file."""

    exit_code, http_status = 6, 409

    def __init__(self, path: Path | str) -> None:
        self.path = path
        super().__init__(
            tr("Another qwenlocal is writing {path}.", path=path), hint=tr("Wait for it, or write to another file.")
        )


class CannotWrite(QwenlocalError):
    """`folder` must be written and is not writable."""

    exit_code, http_status = 6, 500

    def __init__(self, folder: Path, reason: str, *, hint: str = "") -> None:
        self.folder, self.reason = folder, reason
        super().__init__(
            tr("{folder} cannot be written: {reason}.", folder=folder, reason=reason),
            hint=hint or tr("Set QWENLOCAL_HOME (and HF_HOME for models of the hub) to a folder of yours."),
        )


class CannotPrint(QwenlocalError):
    """Standard output cannot be written; `reason` is the system's."""

    exit_code = 6

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            tr("What comes out cannot be written: {reason}.", reason=reason),
            hint=tr("Where it goes into a file, free some room on that disk, or choose another."),
        )


class TextTooLong(QwenlocalError):
    """A message of `letters` letters; no more than `most` are read, which fill any context many times over."""

    exit_code, http_status = 7, 400

    def __init__(self, letters: int, most: int) -> None:
        self.letters, self.most = letters, most
        super().__init__(
            tr(
                "The text is {letters:,} letters long; no model here reads more than {most:,}.",
                letters=letters,
                most=most,
            ),
            hint=tr("In a chat, @FILE takes the beginning of a file, or the passages that fit the question."),
        )


class ContextFull(QwenlocalError):
    """A prompt of `n_prompt` tokens leaves no room for an answer in a context of `n_ctx` tokens."""

    exit_code, http_status = 7, 400

    def __init__(self, n_prompt: int, n_ctx: int, n_ctx_train: int) -> None:
        self.n_prompt, self.n_ctx, self.n_ctx_train = n_prompt, n_ctx, n_ctx_train
        wanted = -(-(n_prompt + 512) // 1024) * 1024
        if wanted <= n_ctx_train:
            hint = tr("Load the model with more room: -c {wanted}", wanted=wanted)
        else:
            hint = tr("Shorten the text: this model was trained for {most:,} tokens.", most=n_ctx_train)
        super().__init__(
            tr(
                "The text is {n_prompt:,} tokens long; the model was loaded with room for {n_ctx:,}.",
                n_prompt=n_prompt,
                n_ctx=n_ctx,
            ),
            hint=hint,
        )


class Interrupted(QwenlocalError):
    """The user pressed Ctrl-C; `kept` says what survives."""

    exit_code = 130

    def __init__(self, kept: str = "") -> None:
        super().__init__(tr("Interrupted."), hint=kept)
