"""
Folders and paths.

`QWENLOCAL_HOME` moves all of qwenlocal's own files. Files from the Hugging Face Hub are in the Hub's cache, so that
other programs find them; `HF_HOME` and `HF_HUB_CACHE` move that.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.errors import NotWritable, UsageError
from qwenlocal.i18n import tr

_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Folders:
    """The folders that qwenlocal reads and writes; tests use temporary ones."""

    home: Path  # records, settings, history, files from sources other than the Hub
    hub_cache: Path  # the Hugging Face Hub's cache
    user: Path  # the user's home directory, for models of other programs
    cache: Path  # the platform's cache folder, likewise

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Folders:
        """Build from the defaults and `QWENLOCAL_HOME`, `HF_HUB_CACHE`, `HF_HOME` and `XDG_CACHE_HOME`."""
        user = Path(environ.get("HOME") or Path.home())
        xdg_cache = Path(environ.get("XDG_CACHE_HOME") or user / ".cache")
        hub_home = Path(environ.get("HF_HOME") or xdg_cache / "huggingface").expanduser()
        hub_cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or hub_home / "hub"
        data, cache = Path(environ.get("XDG_DATA_HOME") or user / ".local/share") / "qwenlocal", xdg_cache
        if sys.platform in ("darwin", "win32"):  # elsewhere platformdirs gives the same, in 3 ms of every start
            import platformdirs

            data = Path(platformdirs.user_data_dir("qwenlocal", appauthor=False))
            cache = Path(platformdirs.user_cache_dir())
        home = environ.get("QWENLOCAL_HOME") or data
        return cls(Path(home).expanduser().absolute(), Path(hub_cache).expanduser().absolute(), user, cache)

    @property
    def records(self) -> Path:
        """Records of installed models, one JSON file each."""
        return self.home / "library"

    @property
    def tuned(self) -> Path:
        """Settings measured by `qwenlocal tune`, one JSON file per model."""
        return self.home / "tuned"

    @property
    def states(self) -> Path:
        """Saved KV caches of chats, which make resuming fast; can be deleted at any time."""
        return self.home / "states"

    @property
    def files(self) -> Path:
        """Model files from sources other than the Hub, and converted ones."""
        return self.home / "files"

    @property
    def partial(self) -> Path:
        """Unfinished downloads, on the same disk as the Hub's cache so that most can be renamed into place."""
        same_disk = _device(self.home) == _device(self.hub_cache)
        return self.home / "partial" if same_disk else self.hub_cache.parent / "qwenlocal-partial"

    @property
    def endpoints(self) -> Path:
        """Names and addresses of remote engines, written by the user."""
        return self.home / "endpoints.toml"

    @property
    def servers(self) -> Path:
        """Files of the servers that are running."""
        return self.home / "servers"

    @property
    def page_key(self) -> Path:
        """The key of the web page, which is the same at every start so that the address can be a bookmark."""
        return self.home / "page-key"

    @property
    def locks(self) -> Path:
        """Lock files of running downloads."""
        return self.home / "locks"

    @property
    def history(self) -> Path:
        """The input history of the chat."""
        return self.home / "history"

    @property
    def chats(self) -> Path:
        """Conversations saved with /save."""
        return self.home / "chats"

    @property
    def journal(self) -> Path:
        """The database of all chats."""
        return self.home / "chats.db"


def _device(folder: Path) -> int:
    """Return the device number of the disk that a folder is on, or would be on if it existed."""
    for existing in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return existing.stat().st_dev
    return 0


def bundled_folder(kind: str) -> Path:
    """
    Return the data folder `kind` ("models" or "prompts") of the program.

    A checkout has it next to the package, an installed wheel inside it.
    """
    inside = _PACKAGE / "shipped" / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def ensure_writable(folder: Path) -> Path:
    """
    Create `folder` if necessary, and return it.

    Raises
    ------
    NotWritable: the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise NotWritable(folder, reason.strerror or str(reason)) from reason
    if not os.access(folder, os.W_OK):
        raise NotWritable(folder, "permission denied")
    return folder


def parse_path(text: str) -> Path:
    """
    Parse a path as typed, expanding `~`; the file need not exist.

    Raises
    ------
    UsageError: no file can have this name: it is too long, or contains a null character or a lone surrogate.
    """
    path = Path(os.path.expanduser(text))
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as reason:
        problem = getattr(reason, "strerror", None) or str(reason)
        raise UsageError(tr("Invalid file name: {reason}.", reason=problem)) from reason
    return path


def parse_typed_path(text: str) -> Path:
    """
    Parse a path typed or dropped into the chat: `"my notes.txt"` and `my\\ notes.txt` are my notes.txt.

    Quotes and backslashes stay if a file has them in its name.

    Raises
    ------
    UsageError: no file can have this name.
    """
    return parse_path(text if os.path.exists(os.path.expanduser(text)) else unquote_path(text))


def unquote_path(text: str) -> str:
    """Remove quotes around a path, or the backslashes of a Unix shell."""
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text if sys.platform == "win32" else re.sub(r"\\(.)", r"\1", text)
