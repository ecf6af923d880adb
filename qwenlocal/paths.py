"""
Where things are on this machine.

One variable moves everything of ours: `QWENLOCAL_HOME`. Files that the hub serves live in the hub's own cache,
which moves with `HF_HOME` or `HF_HUB_CACHE`, so that other programs see them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.errors import CannotWrite, UsageProblem
from qwenlocal.i18n import tr

_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Folders:
    """The folders this program reads and writes; tests build one over a temporary directory."""

    home: Path  # records, settings, history, files from places other than the hub
    hub_cache: Path  # the Hugging Face hub's cache, in the hub's own layout
    user: Path  # the person's home directory, where other programs keep models
    cache: Path  # the platform's folder of caches, likewise

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Folders:
        """The folders of this machine, moved by `QWENLOCAL_HOME`, `HF_HUB_CACHE`, `HF_HOME` and `XDG_CACHE_HOME`."""
        import platformdirs

        user = Path(environ.get("HOME") or Path.home())
        xdg_cache = Path(environ.get("XDG_CACHE_HOME") or user / ".cache")
        hub_home = Path(environ.get("HF_HOME") or xdg_cache / "huggingface").expanduser()
        hub_cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or hub_home / "hub"
        home = environ.get("QWENLOCAL_HOME") or platformdirs.user_data_dir("qwenlocal", appauthor=False)
        cache = Path(platformdirs.user_cache_dir()) if sys.platform in ("darwin", "win32") else xdg_cache
        return cls(Path(home).expanduser().absolute(), Path(hub_cache).expanduser().absolute(), user, cache)

    @property
    def records(self) -> Path:
        """One JSON file a model that is here."""
        return self.home / "library"

    @property
    def tuned(self) -> Path:
        """Settings that were measured, one JSON file a model."""
        return self.home / "tuned"

    @property
    def states(self) -> Path:
        """What models had read when a chat was left, to go on from; can be deleted at any time."""
        return self.home / "states"

    @property
    def files(self) -> Path:
        """Model files that came from places other than the hub."""
        return self.home / "files"

    @property
    def partial(self) -> Path:
        """Files on their way. On the disk of the hub's cache, where most of them go, so that they can be renamed."""
        ours, theirs = _device(self.home), _device(self.hub_cache)
        return self.home / "partial" if ours == theirs else self.hub_cache.parent / "qwenlocal-partial"

    @property
    def locks(self) -> Path:
        """One lock file for each file on its way."""
        return self.home / "locks"

    @property
    def history(self) -> Path:
        """What was typed into the chat, one entry after the other."""
        return self.home / "history"

    @property
    def chats(self) -> Path:
        """Conversations that /save wrote."""
        return self.home / "chats"

    @property
    def journal(self) -> Path:
        """Every chat, as it happened."""
        return self.home / "chats.db"


def _device(folder: Path) -> int:
    """The number of the disk that a folder is on, or would be on."""
    while True:
        try:
            return folder.stat().st_dev
        except OSError:
            if folder == folder.parent:
                return 0
            folder = folder.parent


def shipped(kind: str) -> Path:
    """
    The folder `kind` ("models" or "prompts") that comes with the program.

    In a checkout it lies beside the package; an installed wheel carries a copy inside it.
    """
    inside = _PACKAGE / "shipped" / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def writable(folder: Path) -> Path:
    """
    `folder`, made if it was not there.

    Raises
    ------
    CannotWrite: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise CannotWrite(folder, reason.strerror or str(reason)) from reason
    if not os.access(folder, os.W_OK):
        raise CannotWrite(folder, "permission denied")
    return folder


def typed(word: str) -> Path:
    """
    A path as somebody typed it, `~` put in; it need not be there.

    Raises
    ------
    UsageProblem: no file can have such a name: it is too long, or has a zero byte or half a character in it.
    """
    path = Path(os.path.expanduser(word))
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as reason:
        why = getattr(reason, "strerror", None) or str(reason)
        raise UsageProblem(tr("No file can have this name: {reason}.", reason=why)) from reason
    return path
