"""A checkpoint on the loopback hub: its names, what is published, and what is downloaded of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub import COMMIT, HubServer, Response

REPO = "owner/Tiny-Qwen-0.1B"


HF_NAME = f"hf:{REPO}"


PINNED_NAME = f"{HF_NAME}@{COMMIT}"


CHECKPOINT = "@checkpoint"


UNREACHABLE = {"HF_ENDPOINT": "http://127.0.0.1:1"}


OFFLINE = {"HF_HUB_OFFLINE": "1"}


COMMANDS = [("convert", HF_NAME), ("pull", HF_NAME), ("run", HF_NAME, "Hi", "-n", "1")]


each_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])


def publish(hub: HubServer, folder: Path, repo: str = REPO) -> None:
    """Put the files of a checkpoint on the hub."""
    hub.repository(repo).files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


class WeightRequests:
    """The byte ranges of safetensors files that were requested."""

    def __init__(self, hub: HubServer) -> None:
        self.spans: list[tuple[str, int, int]] = []
        self._hub = hub
        hub.always.append(self._note)

    def _note(self, answer: Response) -> None:
        if answer.path.endswith(".safetensors"):
            self.spans.append((answer.path.rpartition("/")[2], answer.start, answer.start + len(answer.body)))

    @property
    def files(self) -> set[str]:
        return {file for file, _, _ in self.spans}

    @property
    def weights(self) -> set[str]:
        """Files of which more than the header was requested."""
        files = self._hub.repository(REPO).files
        return {file for file, _, end in self.spans if end > 8 + int.from_bytes(files[file][:8], "little")}

    @property
    def saw_headers_only(self) -> bool:
        """True if no byte of a weight was requested."""
        return not self.weights


def fetched_files(hub: HubServer) -> list[str]:
    """Return the names of the files that were requested."""
    return [path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path]


def read_tree(folder: Path) -> dict[str, bytes]:
    """Return the content of all files by path, of links that of their targets; without locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
