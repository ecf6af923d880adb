"""Checkpoints wherever they are: on a hub, in a cache, on this disk; fetched late, converted once, compared."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socketserver
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import Run
from hub import COMMIT, Answer, HubServer, only_on, refuse, whole_file
from oracle import data_of
from test_checkpoint import change, change_model, small, vocabulary
from test_convert_cli import (
    REPO,
    SIZES,
    changed_pairs,
    clean,
    fetched,
    strictly,
    with_numbers,
    written,
)
from test_writing import inside, on_posix, poke

from qwenlocal import fileio, ggml
from qwenlocal.errors import BadWeights, CannotExpress
from qwenlocal.measure.fidelity import Fidelity, measure
from qwenlocal.measure.texts import known_texts
from qwenlocal.paths import Folders
from qwenlocal.testing import write_checkpoint
from qwenlocal.weights import gguf, writing
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.edition import EDITION
from qwenlocal.weights.header import read_header, read_metadata, read_pairs, tensor_type_name
from qwenlocal.weights.writing import Written, carry_out

NAME = f"hf:{REPO}"
FEW = {"generation_config.json": None}  # each file takes a while to be fetched
INDEX = "model.safetensors.index.json"
PINNED = f"{NAME}@{COMMIT}"
KEPT = "@checkpoint"
ENOUGH = 1 << 40  # bytes of memory
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:1"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}
UP = "model.layers.0.mlp.up_proj.weight"


# --- what the tests share


@pytest.fixture(autouse=True)
def _prompt_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub sends head and body of an answer apart, between which TCP otherwise waits for 40 ms."""
    monkeypatch.setattr(socketserver.StreamRequestHandler, "disable_nagle_algorithm", True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    return write_checkpoint(tmp_path_factory.mktemp("source") / "Tiny-Qwen-0.1B", config=SIZES, files=FEW)


@pytest.fixture(scope="module")
def good(source: Path) -> Path:
    """What comes of it, all of it f32."""
    return written(source, source.parent / "good.gguf", "f32")


@pytest.fixture
def mine(source: Path, tmp_path: Path) -> Path:
    """A checkpoint to be changed."""
    return Path(shutil.copytree(source, tmp_path / source.name))


def publish(hub: HubServer, folder: Path, repo: str = REPO) -> None:
    """Put a checkpoint on the hub."""
    hub.repository(repo).files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def on_hub(hub: HubServer, source: Path) -> str:
    """The name of a repository with a checkpoint."""
    publish(hub, source)
    return NAME


class Watch:
    """The bytes of safetensors files that the hub was asked for."""

    def __init__(self, hub: HubServer) -> None:
        self.spans: list[tuple[str, int, int]] = []
        self._hub = hub
        hub.always.append(self._note)

    def _note(self, answer: Answer) -> None:
        if answer.path.endswith(".safetensors"):
            self.spans.append((answer.path.rpartition("/")[2], answer.start, answer.start + len(answer.body)))

    @property
    def files(self) -> set[str]:
        return {file for file, _, _ in self.spans}

    @property
    def weights(self) -> set[str]:
        """Files of which more than the header was asked for."""
        files = self._hub.repository(REPO).files
        return {file for file, _, end in self.spans if end > 8 + int.from_bytes(files[file][:8], "little")}

    @property
    def saw_headers_only(self) -> bool:
        """Not a byte of a weight was asked for."""
        return not self.weights


@pytest.fixture
def watch(hub: HubServer) -> Watch:
    return Watch(hub)


def bring(folders: Folders, source: Path, *, without: tuple[str, ...] = (), main: bool = True) -> Path:
    """Put a checkpoint into the hub's cache, as another program does; returns its snapshot."""
    repo = folders.hub_cache / f"models--{REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in source.iterdir():
        if path.name not in without:
            content = path.read_bytes()
            in_git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            digest = hashlib.sha256(content).hexdigest() if path.suffix == ".safetensors" else in_git
            (repo / "blobs" / digest).write_bytes(content)
            (snapshot / path.name).symlink_to(os.path.relpath(repo / "blobs" / digest, snapshot))
    if main:
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


def everything_in(folder: Path) -> dict[str, bytes]:
    """Files with their content, links by what they lead to; locks do not count."""
    there = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in there}


def listed(run: Run) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in strictly(run("list", "--json").stdout)}


def states(run: Run) -> dict[str, str]:
    """What is here, being made or coming, by name."""
    return {name: str(entry["state"]) for name, entry in listed(run).items()}


def plan_of(text: str) -> dict[str, Any]:
    """A plan as --json has it, without what the clock says and what names the source."""
    found = strictly(text)
    del found["seconds"]
    for file in found["files"]:
        del file["size"]  # where it came from stands in the header
    return dict(found)


def damage(path: Path, at: int = -1) -> bytes:
    """Turn one bit over; returns what was there before."""
    before = path.read_bytes()
    content = bytearray(before)
    content[at] ^= 1
    path.write_bytes(content)
    return before


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> list[Written]:
    """What conversions in this process come to."""
    found: list[Written] = []

    def noting(*arguments: Any, **options: Any) -> Written:
        found.append(carry_out(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(writing, "carry_out", noting)
    return found


# --- convert hf:owner/repo --dry-run


class TestADryRunOfACheckpointOnAHub:
    def test_reads_nothing_of_the_weights_but_their_headers(
        self, on_hub: str, hub: HubServer, watch: Watch, invoke: Run, tmp_path: Path
    ) -> None:
        weights = hub.repository(REPO).files["model.safetensors"]
        result = invoke("convert", on_hub, "--dry-run")
        assert f"{len(weights) / 1e3:.0f} kB are to be fetched" in clean(result, 0)
        assert "nothing was written" in result.stdout
        assert watch.files == {"model.safetensors"}
        assert watch.saw_headers_only
        assert hub.sent < sum(len(c) for n, c in hub.repository(REPO).files.items() if n != "model.safetensors") + 8192
        assert inside(tmp_path) == {"person"}

    @pytest.mark.parametrize(
        "options",
        [{"shards": 3, "dtype": "F32"}, {"config": {**SIZES, "tie_word_embeddings": True}, "store_tied_head": True},
         {"tensors": {"model.layers.0.mlp.up_proj.bias": (64,)}}],
        ids=str,
    )  # fmt: skip
    def test_plans_what_would_be_done_with_the_same_on_this_disk(
        self, options: dict[str, Any], hub: HubServer, watch: Watch, invoke: Run, tmp_path: Path
    ) -> None:
        folder = write_checkpoint(tmp_path / REPO.rpartition("/")[2], **{"config": SIZES, "files": FEW, **options})
        for name in options.get("tensors", {}):
            poke(folder, name, 0, *[0.0] * 64)
        publish(hub, folder)
        command = ("--dry-run", "--json", "--type", "q4_k_m,q8_0")
        there, here = invoke("convert", NAME, *command), invoke("convert", str(folder), *command)
        clean(there, 0)
        clean(here, 0)
        assert plan_of(there.stdout) == plan_of(here.stdout)
        assert watch.saw_headers_only
        table = [invoke("convert", text, "--dry-run").stdout.split("\n\n")[0] for text in (NAME, str(folder))]
        assert table[0] == table[1]

    def test_announces_the_very_bytes_that_are_written_then(self, on_hub: str, invoke: Run, tmp_path: Path) -> None:
        (announced,) = strictly(invoke("convert", on_hub, "--dry-run", "--json", "--type", "q8_0").stdout)["files"]
        (done,) = strictly(invoke("convert", on_hub, "--json", "--type", "q8_0").stdout)["files"]
        assert announced["size"] == done["size"] == (tmp_path / done["path"]).stat().st_size

    def test_is_done_even_where_the_output_is_there(self, on_hub: str, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(b"old")
        clean(invoke("convert", on_hub, "--dry-run", "-o", "x.gguf"), 0)
        assert (tmp_path / "x.gguf").read_bytes() == b"old"

    def test_is_not_taken_for_a_model_that_is_here_and_what_it_fetched_can_be_removed(
        self, on_hub: str, invoke: Run, environment: dict[str, str]
    ) -> None:
        clean(invoke("convert", on_hub, "--dry-run"), 0)
        assert set(states(invoke).values()) <= {"partial"}
        clean(invoke("show", on_hub + KEPT), 3)
        assert "are free again" in clean(invoke("rm", on_hub + KEPT), 0)
        assert listed(invoke) == {}
        assert everything_in(Path(environment["HF_HUB_CACHE"])) == {}

    def test_does_not_make_a_later_download_somebody_elses(
        self, on_hub: str, invoke: Run, environment: dict[str, str]
    ) -> None:
        clean(invoke("convert", on_hub, "--dry-run"), 0)
        clean(invoke("pull", on_hub), 0)
        for name in (on_hub, on_hub + KEPT):
            assert "are free again" in clean(invoke("rm", name), 0)
        assert everything_in(Path(environment["HF_HUB_CACHE"])) == {}

    def test_of_a_hub_that_sends_whole_files_only_says_so(self, on_hub: str, hub: HubServer, invoke: Run) -> None:
        content = hub.repository(REPO).files["model.safetensors"]
        hub.always.append(only_on("model.safetensors", whole_file(content)))
        for options in ((), ("--json",)):
            result = invoke("convert", on_hub, "--dry-run", *options)
            assert "sends whole files only" in clean(result, 4)
            assert result.stdout == ""

    def test_of_a_checkpoint_that_is_here_already_asks_nobody(self, on_hub: str, hub: HubServer, invoke: Run) -> None:
        clean(invoke("pull", on_hub), 0)
        before = len(hub.requests)
        clean(invoke("convert", on_hub, "--dry-run"), 0)
        assert len(hub.requests) == before


# --- before weights are fetched

COMMANDS = [("convert", NAME), ("pull", NAME), ("run", NAME, "Hi", "-n", "1")]
each_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])


class TestBeforeTheWeightsAreFetched:
    @each_command
    def test_their_cost_is_said(
        self, command: tuple[str, ...], on_hub: str, hub: HubServer, watch: Watch, invoke: Run
    ) -> None:
        size = len(hub.repository(REPO).files["model.safetensors"])
        said = clean(invoke(*command), 0)
        cost = re.search(rf"{size / 1e3:.0f} kB are to be fetched, and converting it \(q4_k_m \d+ kB\) takes", said)
        assert cost
        assert cost.start() < said.index("Fetching the checkpoint")
        assert not watch.saw_headers_only

    def test_every_file_that_would_be_written_has_its_size_in_that_sentence(self, on_hub: str, invoke: Run) -> None:
        said = clean(invoke("convert", on_hub, "--type", "q8_0,f16"), 0)
        assert re.search(r"converting it \(q8_0 \d+ kB, f16 \d+ kB\) takes about \d+ s", said)

    def test_an_output_that_is_there_is_refused(self, on_hub: str, watch: Watch, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(b"old")
        for options in ((), ("--json",), ("--type", "q8_0")):
            assert "x.gguf is there already" in clean(invoke("convert", on_hub, "-o", "x.gguf", *options), 2)
        assert watch.saw_headers_only
        assert (tmp_path / "x.gguf").read_bytes() == b"old"

    def test_a_second_of_several_outputs_that_is_there_is_refused(
        self, on_hub: str, watch: Watch, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "x-q8_0.gguf").write_bytes(b"old")
        clean(invoke("convert", on_hub, "--type", "f16,q8_0", "-o", "x-{type}.gguf"), 2)
        assert watch.saw_headers_only
        assert not (tmp_path / "x-f16.gguf").exists()

    def test_a_damaged_file_is_refused_by_every_command(
        self, on_hub: str, hub: HubServer, watch: Watch, invoke: Run
    ) -> None:
        hub.repository(REPO).files["tokenizer.json"] = b"{"
        for command in (*COMMANDS, ("convert", NAME, "--dry-run")):
            assert "tokenizer.json: it is not readable JSON" in clean(invoke(*command), 5), command
        assert watch.saw_headers_only

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {}}}', "its tokenizer is not BPE"),
            ("tokenizer_config.json", b'{"chat_template": 5}', "“chat_template” has the wrong form"),
        ],
    )
    def test_a_broken_tokenizer_is_refused(
        self, file: str, content: bytes, message: str, on_hub: str, hub: HubServer,
        watch: Watch, invoke: Run,
    ) -> None:  # fmt: skip
        hub.repository(REPO).files[file] = content
        assert message in clean(invoke("pull", NAME), 5)
        assert watch.saw_headers_only
        assert set(states(invoke).values()) <= {"partial"}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tensors": {UP: None}}, f"“{UP}” is missing"),
            ({"tensors": {UP: (64, 32)}}, "is [64, 32]; by config.json it should be [64, 64]"),
            ({"tensors": {"model.layers.7.mlp.up_proj.weight": (64, 64)}}, "what this architecture does not have"),
            ({"config": {**SIZES, "vocab_size": 300}}, "by config.json it should be [300, 64]"),
        ],
        ids=["missing", "shape", "surplus", "config"],
    )
    def test_headers_that_contradict_the_config_are_refused(
        self, options: dict[str, Any], message: str, source: Path, hub: HubServer,
        watch: Watch, invoke: Run, tmp_path: Path,
    ) -> None:  # fmt: skip
        config, tensors = options.get("config", SIZES), options.get("tensors")
        folder = write_checkpoint(tmp_path / "other", config=config, tensors=tensors)
        publish(hub, source)
        file = "config.json" if "config" in options else "model.safetensors"
        hub.repository(REPO).files[file] = (folder / file).read_bytes()
        assert message in clean(invoke("pull", NAME), 5)
        assert watch.files == {"model.safetensors"}
        assert watch.saw_headers_only
        assert set(states(invoke).values()) <= {"partial"}

    def test_a_header_that_is_longer_than_its_file_is_refused(self, on_hub: str, hub: HubServer, invoke: Run) -> None:
        hub.repository(REPO).files["model.safetensors"] = b"\xff" * 7 + b"\x00" + b"{" * 1000
        assert "it is not a safetensors file, or cut off" in clean(invoke("pull", NAME), 5)
        assert set(states(invoke).values()) <= {"partial"}

    def test_weights_that_are_a_pointer_to_them_are_refused(self, on_hub: str, hub: HubServer, invoke: Run) -> None:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
        hub.repository(REPO).files["model.safetensors"] = pointer
        assert "git-lfs pointer" in clean(invoke("pull", NAME), 5)

    def test_a_disk_with_room_for_them_but_not_for_what_comes_of_them_is_refused(
        self, on_hub: str, hub: HubServer, watch: Watch, invoke: Run,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        size = len(hub.repository(REPO).files["model.safetensors"])
        free = shutil.disk_usage("/")._replace(free=size + 1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _folder: free)
        assert "MB are needed" in clean(invoke("pull", NAME), 6)
        assert watch.saw_headers_only

    def test_a_hub_that_sends_whole_files_only_is_no_hindrance(
        self, on_hub: str, hub: HubServer, invoke: Run, source: Path, tmp_path: Path
    ) -> None:
        content = hub.repository(REPO).files["model.safetensors"]
        hub.always.append(only_on("model.safetensors", whole_file(content)))
        clean(invoke("convert", on_hub, "--type", "q8_0", "-o", "x.gguf"), 0)
        assert data_of(tmp_path / "x.gguf") == data_of(written(source, tmp_path / "y.gguf", "q8_0"))

    def test_what_a_refusal_left_is_no_hindrance_once_the_checkpoint_was_put_right(
        self, on_hub: str, hub: HubServer, invoke: Run, environment: dict[str, str]
    ) -> None:
        whole = hub.repository(REPO).files["tokenizer.json"]
        hub.repository(REPO).files["tokenizer.json"] = b"{"
        clean(invoke("pull", on_hub), 5)
        hub.repository(REPO).files["tokenizer.json"] = whole
        clean(invoke("pull", on_hub), 0)
        for name in (on_hub, on_hub + KEPT):
            assert "are free again" in clean(invoke("rm", name), 0)
        left = everything_in(Path(environment["HF_HUB_CACHE"]))
        assert [name for name in left if "snapshots" in name] == []


# --- a repository with an index


class TestARepositoryWithAnIndex:
    @pytest.fixture
    def sharded(self, hub: HubServer, tmp_path: Path) -> Path:
        folder = write_checkpoint(tmp_path / "shards", config=SIZES, shards=2, files=FEW)
        publish(hub, folder)
        return folder

    def test_is_fetched_as_far_as_its_index_goes(
        self, sharded: Path, hub: HubServer, watch: Watch, invoke: Run, tmp_path: Path
    ) -> None:
        for stray in ("consolidated.safetensors", "model.safetensors", "zzz-00001-of-00002.safetensors"):
            hub.repository(REPO).files[stray] = (sharded / "model-00001-of-00002.safetensors").read_bytes()
        clean(invoke("convert", NAME, "--type", "f32", "-o", "x.gguf"), 0)
        assert watch.files == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
        assert data_of(tmp_path / "x.gguf") == data_of(written(sharded, tmp_path / "y.gguf", "f32"))

    def test_costs_what_the_files_of_its_index_cost(self, sharded: Path, hub: HubServer, invoke: Run) -> None:
        size = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
        hub.repository(REPO).files["consolidated.safetensors"] = bytes(10_000_000)
        said = clean(invoke("convert", NAME), 0)
        assert f"{size / 1e3:.0f} kB are to be fetched" in said
        assert "2 file(s)" in said

    def test_that_names_a_file_that_is_not_there_is_refused_before_weights_are_fetched(
        self, sharded: Path, hub: HubServer, watch: Watch, invoke: Run
    ) -> None:
        del hub.repository(REPO).files["model-00002-of-00002.safetensors"]
        missing = f"model-00002-of-00002.safetensors (1 of 2 files) is missing, which {INDEX} names"
        for command in (*COMMANDS, ("convert", NAME, "--dry-run")):
            assert missing in clean(invoke(*command), 5), command
        assert watch.spans == []

    def test_that_names_a_tensor_in_the_wrong_file_is_refused_before_weights_are_fetched(
        self, sharded: Path, hub: HubServer, watch: Watch, invoke: Run
    ) -> None:
        index = json.loads((sharded / INDEX).read_text())
        index["weight_map"][UP] = next(f for f in set(index["weight_map"].values()) if f != index["weight_map"][UP])
        hub.repository(REPO).files[INDEX] = json.dumps(index).encode()
        assert "but in another file" in clean(invoke("pull", NAME), 5)
        assert watch.saw_headers_only

    def test_that_names_files_elsewhere_is_refused(
        self, sharded: Path, hub: HubServer, watch: Watch, invoke: Run
    ) -> None:
        index = json.loads((sharded / INDEX).read_text())["weight_map"]
        for elsewhere in ("../../secret.safetensors", "/etc/passwd", "sub/model.safetensors", ""):
            hub.repository(REPO).files[INDEX] = json.dumps({"weight_map": {**index, UP: elsewhere}}).encode()
            assert "which is not a file beside it" in clean(invoke("pull", NAME), 5)
        assert watch.spans == []

    def test_that_is_not_there_leaves_numbered_files_of_which_all_must_be(
        self, sharded: Path, hub: HubServer, watch: Watch, invoke: Run
    ) -> None:
        del hub.repository(REPO).files[INDEX]
        clean(invoke("convert", NAME, "-o", "x.gguf"), 0)
        hub.repository("o/half").files = {**hub.repository(REPO).files}
        del hub.repository("o/half").files["model-00001-of-00002.safetensors"]
        watch.spans.clear()
        assert "part 1 of 2 is missing" in clean(invoke("convert", "hf:o/half", "-o", "y.gguf"), 5)
        assert watch.spans == []


class TestADownloadThatFails:
    @pytest.fixture
    def sharded(self, hub: HubServer, tmp_path: Path) -> Path:
        folder = write_checkpoint(tmp_path / "shards", config=SIZES, shards=2, files=FEW)
        publish(hub, folder)
        return folder

    def only_headers(self, hub: HubServer, *files: str) -> None:
        """Of these files the weights are refused from now on."""
        for file in files:
            end = 8 + int.from_bytes(hub.repository(REPO).files[file][:8], "little")

            def refused(answer: Answer, file: str = file, end: int = end) -> None:
                if answer.path.endswith(file) and answer.start + len(answer.body) > end:
                    refuse(404)(answer)

            hub.always.append(refused)

    def test_keeps_what_came_and_fetches_the_rest_the_next_time(
        self, sharded: Path, hub: HubServer, watch: Watch, invoke: Run
    ) -> None:
        before = list(hub.always)
        self.only_headers(hub, "model-00002-of-00002.safetensors")
        clean(invoke("pull", NAME), 4)
        assert set(states(invoke).values()) == {"partial"}
        hub.always = before
        watch.spans.clear()
        said = clean(invoke("pull", NAME), 0)
        first, second = (path.stat().st_size for path in sorted(sharded.glob("*.safetensors")))
        assert f"{second / 1e3:.0f} kB are to be fetched" in said
        assert first != second
        assert watch.weights == {"model-00002-of-00002.safetensors"}

    @pytest.mark.parametrize("then", ["weights are refused", "headers are refused"])
    def test_can_be_removed_with_all_that_came(
        self, then: str, sharded: Path, hub: HubServer, invoke: Run, environment: dict[str, str]
    ) -> None:
        self.only_headers(hub, "model-00002-of-00002.safetensors")
        for _ in range(2):
            clean(invoke("pull", NAME), 4)
            if then == "headers are refused":
                hub.always.append(only_on("model-00002", refuse(404)))
        for name in listed(invoke):
            clean(invoke("rm", name), 0)
        assert listed(invoke) == {}
        assert everything_in(Path(environment["HF_HUB_CACHE"])) == {}

    def test_while_it_is_mended_forgets_no_weights_that_were_touched_since(
        self, sharded: Path, hub: HubServer, invoke: Run, environment: dict[str, str]
    ) -> None:
        clean(invoke("pull", NAME), 0)
        (folder,) = Path(environment["HF_HUB_CACHE"]).glob("*/snapshots/*")
        first, second = ((folder / f"model-0000{part}-of-00002.safetensors").resolve() for part in (1, 2))
        damage(first)
        os.utime(second)
        before = list(hub.always)
        self.only_headers(hub, "model-00001-of-00002.safetensors")
        clean(invoke("verify", NAME + KEPT), 4)
        assert listed(invoke)[NAME + KEPT]["state"] == "partial"
        hub.always = before
        clean(invoke("pull", NAME), 0)
        for name in listed(invoke):
            clean(invoke("rm", name), 0)
        assert everything_in(Path(environment["HF_HUB_CACHE"])) == {}

    @pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "config.json"])
    def test_for_want_of_a_hub_while_it_is_mended_is_not_recorded_as_whole(
        self, file: str, sharded: Path, hub: HubServer, invoke: Run, environment: dict[str, str]
    ) -> None:
        clean(invoke("pull", NAME), 0)
        (folder,) = Path(environment["HF_HUB_CACHE"]).glob("*/snapshots/*")
        damage((folder / file).resolve())
        clean(invoke("verify", NAME + KEPT, environment=NOWHERE), 4)
        assert listed(invoke)[NAME + KEPT]["state"] == "partial"
        clean(invoke("pull", NAME + KEPT), 0)
        assert listed(invoke)[NAME + KEPT]["state"] == "checkpoint"
        clean(invoke("verify", NAME + KEPT), 0)

    @pytest.mark.parametrize("part", [1, 2])
    def test_while_it_is_mended_leaves_the_rest_listed_and_removable(
        self, part: int, sharded: Path, hub: HubServer, invoke: Run, environment: dict[str, str]
    ) -> None:
        clean(invoke("pull", NAME), 0)
        (folder,) = Path(environment["HF_HUB_CACHE"]).glob("*/snapshots/*")
        damage((folder / f"model-0000{part}-of-00002.safetensors").resolve())
        self.only_headers(hub, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        clean(invoke("verify", NAME + KEPT), 4)
        assert listed(invoke)[NAME + KEPT]["state"] == "partial"
        for name in listed(invoke):
            clean(invoke("rm", name), 0)
        assert everything_in(Path(environment["HF_HUB_CACHE"])) == {}


# --- what convert is asked for


class TestWhatIsAskedOfConvert:
    def test_a_type_in_the_name_belongs_into_an_option(self, on_hub: str, hub: HubServer, invoke: Run) -> None:
        assert "--type q8_0" in clean(invoke("convert", f"{on_hub}:q8_0"), 2)
        assert hub.requests == []

    def test_a_type_in_a_catalogue_name_does_so_too(self, hub: HubServer, invoke: Run) -> None:
        assert "--type q8_0" in clean(invoke("convert", "qwen1.5:1.8b-base-q8_0"), 2)
        assert hub.requests == []

    @pytest.mark.parametrize("text", [f"{NAME}/x.gguf", f"{PINNED}/x.gguf", "https://example.org/x.safetensors"])
    def test_a_file_of_a_repository_is_no_checkpoint(self, text: str, on_hub: str, hub: HubServer, invoke: Run) -> None:
        assert "is not a checkpoint" in clean(invoke("convert", text), 2)
        assert hub.requests == []

    def test_several_types_may_be_said_one_by_one(self, source: Path, invoke: Run, tmp_path: Path) -> None:
        clean(invoke("convert", str(source), "--type", "q8_0", "--type", "f16", "--type", "q4_0,q8_0", "-o", "out/"), 0)
        assert inside(tmp_path / "out") == {f"{source.name}-{kind}.gguf" for kind in ("q8_0", "f16", "q4_0")}

    @pytest.mark.parametrize("wish", ["nonsense=q8_0", "attn_norm=q8_0", "ffn_up.bias=q8_0", "^ffn_down=q8_0"])
    def test_a_wish_that_no_tensor_fits_is_refused(self, wish: str, source: Path, invoke: Run, tmp_path: Path) -> None:
        said = clean(invoke("convert", str(source), "--tensor-type", wish, "--type", "q4_0", "-o", "x.gguf"), 2)
        assert f"“{wish.partition('=')[0]}”" in said
        assert not (tmp_path / "x.gguf").exists()

    def test_one_of_several_wishes_that_fits_nothing_is_refused(self, source: Path, invoke: Run) -> None:
        wishes = ("--tensor-type", "ffn_down=q8_0", "--tensor-type", "nonsense=q8_0")
        assert "“nonsense”" in clean(invoke("convert", str(source), *wishes, "--dry-run"), 2)

    def test_of_a_checkpoint_on_a_hub_such_a_wish_is_refused_before_its_weights_are_fetched(
        self, on_hub: str, watch: Watch, invoke: Run
    ) -> None:
        clean(invoke("convert", on_hub, "--tensor-type", "nonsense=q8_0"), 2)
        assert watch.saw_headers_only

    def test_a_wish_is_obeyed_in_files_that_are_not_quantized_too(
        self, source: Path, invoke: Run, tmp_path: Path
    ) -> None:
        command = ("convert", str(source), "--tensor-type", "ffn_down=q8_0", "--type", "f16", "-o", "x.gguf")
        clean(invoke(*command), 0)
        types = {t.name: tensor_type_name(t.type).lower() for t in read_header(tmp_path / "x.gguf").tensors}
        assert types["blk.0.ffn_down.weight"] == "q8_0"
        assert {kind for name, kind in types.items() if "ffn_down" not in name} == {"f16", "f32"}

    def test_a_directory_with_weights_but_no_config_says_what_it_lacks(
        self, mine: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (mine / "config.json").unlink()
        for command in ("convert", "pull"):
            for text in (str(mine), mine.name, f"./{mine.name}/"):
                assert "it has weights, but no config.json" in clean(invoke(command, text), 5)


# --- a checkpoint that somebody else brought into the hub's cache


@pytest.mark.skipif(sys.platform == "win32", reason="the cache has no links there")
class TestACheckpointInTheHubsCache:
    @pytest.mark.parametrize("environment_", [OFFLINE, NOWHERE], ids=["offline", "nobody answers"])
    @each_command
    def test_is_found_without_a_network(
        self, command: tuple[str, ...], environment_: dict[str, str], source: Path, folders: Folders, hub: HubServer,
        invoke: Run, qwenlocal: Run,
    ) -> None:  # fmt: skip
        snapshot = bring(folders, source)
        before = everything_in(snapshot.parents[1])
        process = qwenlocal if command[0] == "run" else invoke
        clean(process(*command, environment=environment_), 0)
        assert hub.requests == []
        assert everything_in(snapshot.parents[1]) == before

    def test_is_found_in_another_type_too_and_only_converted_once(
        self, source: Path, folders: Folders, invoke: Run
    ) -> None:
        bring(folders, source)
        assert "Converting it once to q8_0" in clean(invoke("pull", f"{NAME}:q8_0", environment=OFFLINE), 0)
        assert "Converting" not in clean(invoke("pull", f"{NAME}:q8_0", environment=OFFLINE), 0)

    def test_stays_where_it_is_when_what_was_made_of_it_goes(self, source: Path, folders: Folders, invoke: Run) -> None:
        snapshot = bring(folders, source)
        before = everything_in(snapshot.parents[1])
        clean(invoke("pull", NAME, environment=OFFLINE), 0)
        assert set(listed(invoke)) == {f"{NAME}:q4_k_m"}
        clean(invoke("rm", NAME), 0)
        assert listed(invoke) == {}
        assert everything_in(snapshot.parents[1]) == before

    def test_is_used_where_the_hub_can_be_asked_too(
        self, source: Path, folders: Folders, on_hub: str, hub: HubServer, watch: Watch, invoke: Run
    ) -> None:
        bring(folders, source)
        clean(invoke("pull", on_hub), 0)
        assert fetched(hub) == []

    def test_of_a_named_branch_is_found_by_that(self, source: Path, folders: Folders, invoke: Run) -> None:
        bring(folders, source)
        clean(invoke("pull", f"{NAME}@main", environment=OFFLINE), 0)
        clean(invoke("pull", f"{NAME}@other", environment=OFFLINE), 4)

    def test_of_a_pinned_revision_needs_no_branch(self, source: Path, folders: Folders, invoke: Run) -> None:
        bring(folders, source, main=False)
        clean(invoke("pull", PINNED, environment=OFFLINE), 0)
        clean(invoke("pull", NAME, environment=OFFLINE), 4)

    @pytest.mark.parametrize("without", ["tokenizer.json", "config.json", "model.safetensors"])
    def test_does_not_count_where_a_part_is_missing(
        self, without: str, source: Path, folders: Folders, invoke: Run
    ) -> None:
        bring(folders, source, without=(without,))
        for command in COMMANDS:
            assert "could be reached" in clean(invoke(*command, environment=OFFLINE), 4), command
        assert listed(invoke) == {}

    def test_does_not_count_where_a_shard_is_missing(self, folders: Folders, invoke: Run, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "shards", config=SIZES, shards=2, files=FEW)
        bring(folders, folder, without=("model-00002-of-00002.safetensors",))
        clean(invoke("pull", NAME, environment=OFFLINE), 4)

    def test_does_not_count_where_a_link_leads_nowhere(self, source: Path, folders: Folders, invoke: Run) -> None:
        (bring(folders, source) / "model.safetensors").resolve().unlink()
        clean(invoke("pull", NAME, environment=OFFLINE), 4)

    def test_is_completed_where_a_part_is_missing_and_the_hub_answers(
        self, source: Path, folders: Folders, on_hub: str, invoke: Run
    ) -> None:
        snapshot = bring(folders, source, without=("tokenizer.json",))
        clean(invoke("pull", on_hub), 0)
        assert (snapshot / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()

    def test_that_was_completed_stays_when_it_is_removed_here(
        self, source: Path, folders: Folders, on_hub: str, invoke: Run
    ) -> None:
        snapshot = bring(folders, source, without=("tokenizer.json",))
        before = everything_in(snapshot)
        clean(invoke("pull", on_hub), 0)
        assert "was left alone" in clean(invoke("rm", on_hub + KEPT), 0)
        assert before.items() <= everything_in(snapshot).items()

    def test_of_which_somebody_elses_file_is_damaged_is_left_alone(
        self, source: Path, folders: Folders, on_hub: str, invoke: Run
    ) -> None:
        snapshot = bring(folders, source, without=("tokenizer.json",))
        clean(invoke("pull", on_hub), 0)
        weights = (snapshot / "model.safetensors").resolve()
        damage(weights)
        content, state = weights.read_bytes(), weights.stat()
        clean(invoke("verify", on_hub + KEPT), 5)
        assert (weights.read_bytes(), weights.stat().st_ino) == (content, state.st_ino)


# --- the other hub


class TestACheckpointOnTheOtherHub:
    NAME = f"ms:{REPO}"

    def test_is_planned_by_its_headers(self, on_hub: str, hub: HubServer, invoke: Run, source: Path) -> None:
        result = invoke("convert", self.NAME, "--dry-run", "--json")
        clean(result, 0)
        assert plan_of(result.stdout) == plan_of(invoke("convert", str(source), "--dry-run", "--json").stdout)
        whole = sum(map(len, hub.repository(REPO).files.values()))
        assert hub.sent < whole - len(hub.repository(REPO).files["model.safetensors"]) + 8192

    def test_is_pulled_once_listed_verified_and_removed(
        self, on_hub: str, hub: HubServer, invoke: Run, folders: Folders
    ) -> None:
        clean(invoke("pull", self.NAME), 0)
        states = {name: entry["state"] for name, entry in listed(invoke).items()}
        assert states == {f"{self.NAME}:q4_k_m": "here", self.NAME + KEPT: "checkpoint"}
        before = len(hub.requests)
        clean(invoke("convert", self.NAME, "-o", "x.gguf"), 0)
        clean(invoke("verify", self.NAME + KEPT), 0)
        assert len(hub.requests) == before
        for name in (self.NAME, self.NAME + KEPT):
            assert "are free again" in clean(invoke("rm", name), 0)
        assert everything_in(folders.files) == {}

    def test_that_is_broken_is_refused_before_its_weights_are_fetched(
        self, on_hub: str, hub: HubServer, invoke: Run
    ) -> None:
        hub.repository(REPO).files["tokenizer.json"] = b"{"
        before = hub.sent
        clean(invoke("pull", self.NAME), 5)
        assert hub.sent - before < len(hub.repository(REPO).files["model.safetensors"])
        assert set(states(invoke).values()) <= {"partial"}


# --- a pinned revision


class TestACheckpointOfAPinnedRevision:
    @pytest.fixture
    def pulled(self, on_hub: str, invoke: Run) -> str:
        """The name of its checkpoint, which is here."""
        clean(invoke("pull", PINNED), 0)
        return PINNED + KEPT

    def test_is_listed_and_shown_by_its_revision_and_is_no_branch(
        self, pulled: str, folders: Folders, invoke: Run
    ) -> None:
        assert states(invoke) == {f"{PINNED}:q4_k_m": "here", pulled: "checkpoint"}
        found = strictly(invoke("show", pulled, "--json").stdout)
        assert (found["name"], found["state"], found["owned"]) == (pulled, "checkpoint", True)
        assert found["origin"] == f"hf:{REPO}@{COMMIT[:12]}"
        assert not list(folders.hub_cache.rglob("refs/*"))
        clean(invoke("show", f"{NAME}{KEPT}"), 3)
        clean(invoke("rm", NAME), 3)

    def test_is_converted_and_run_without_asking_anybody(
        self, pulled: str, hub: HubServer, invoke: Run, qwenlocal: Run, source: Path, tmp_path: Path
    ) -> None:
        before = len(hub.requests)
        clean(invoke("convert", pulled, "--type", "f32", "-o", "x.gguf"), 0)
        assert data_of(tmp_path / "x.gguf") == data_of(written(source, tmp_path / "y.gguf", "f32"))
        clean(qwenlocal("run", pulled, "Hi", "-n", "1"), 0)
        assert len(hub.requests) == before

    def test_is_verified_and_mended_fetching_what_is_damaged_only(
        self, pulled: str, hub: HubServer, watch: Watch, invoke: Run
    ) -> None:
        assert "is whole" in clean(invoke("verify", pulled, environment=NOWHERE), 0)
        weights = Path(strictly(invoke("show", pulled, "--json").stdout)["path"]).parent / "model.safetensors"
        before = damage(weights.resolve())
        assert "the file is damaged" in clean(invoke("verify", pulled, "--no-repair"), 5)
        watch.spans.clear()
        assert "is whole again" in clean(invoke("verify", pulled), 0)
        assert weights.read_bytes() == before
        assert watch.files == {"model.safetensors"}
        assert "is whole" in clean(invoke("verify", pulled, environment=NOWHERE), 0)
        clean(invoke("convert", pulled, environment=NOWHERE), 0)

    @pytest.mark.parametrize("file", ["tokenizer.json", "config.json"])
    def test_of_which_a_small_file_is_damaged_is_mended_too(self, file: str, pulled: str, invoke: Run) -> None:
        path = Path(strictly(invoke("show", pulled, "--json").stdout)["path"]).parent / file
        before = damage(path.resolve(), before_last_digit(path.read_bytes()))
        clean(invoke("verify", pulled, "--no-repair"), 5)
        clean(invoke("verify", pulled), 0)
        assert path.read_bytes() == before

    def test_of_which_a_file_is_gone_says_how_to_have_it_again(self, pulled: str, invoke: Run) -> None:
        weights = Path(strictly(invoke("show", pulled, "--json").stdout)["path"]).parent / "model.safetensors"
        content = weights.read_bytes()
        weights.resolve().unlink()
        said = clean(invoke("verify", pulled), 5)
        hint = re.search(r"qwenlocal (.+)", said.replace("\n", " "))
        assert hint
        clean(invoke(*hint[1].split()), 0)
        assert weights.read_bytes() == content

    def test_is_removed_with_its_own_name(self, pulled: str, invoke: Run, environment: dict[str, str]) -> None:
        assert "are free again" in clean(invoke("rm", pulled), 0)
        assert everything_in(Path(environment["HF_HUB_CACHE"])) == {}
        assert set(listed(invoke)) == {f"{PINNED}:q4_k_m"}
        assert "are free again" in clean(invoke("rm", PINNED), 0)
        assert listed(invoke) == {}

    def test_and_that_of_the_branch_share_their_files(
        self, pulled: str, on_hub: str, watch: Watch, invoke: Run, environment: dict[str, str]
    ) -> None:
        watch.spans.clear()
        clean(invoke("pull", on_hub), 0)
        assert watch.saw_headers_only, "the bytes were here"
        clean(invoke("rm", pulled), 0)
        clean(invoke("verify", f"{on_hub}{KEPT}", environment=NOWHERE), 0)
        clean(invoke("convert", on_hub, environment=NOWHERE), 0)
        assert "are free again" in clean(invoke("rm", f"{on_hub}{KEPT}"), 0)
        assert everything_in(Path(environment["HF_HUB_CACHE"])) == {}

    def test_whose_weights_are_not_numbers_names_itself_in_the_way_out(
        self, hub: HubServer, mine: Path, invoke: Run
    ) -> None:
        poke(mine, "model.norm.weight", 0, numpy.nan)
        publish(hub, mine)
        assert f"qwenlocal convert {PINNED} --allow-nan" in clean(invoke("pull", PINNED), 5)


def before_last_digit(content: bytes) -> int:
    """Where a digit is, so that one bit more or less leaves readable JSON, but another."""
    return next(match.start() for match in re.finditer(rb"[0-9](?=[,}])", content))


# --- conversions that were cut short


UP_TO_THE_FOURTH_SLAB = """
import sys, time
from qwenlocal.cli.app import app
from qwenlocal.weights import writing
turn = writing._Run._turn
writing._Run._turn = lambda run, number, desk: turn(run, number, desk) if number < 3 else time.sleep(60)
app(sys.argv[1:])
"""


def slabs(folders: Folders) -> int:
    """How many slabs of rows the journal of the one conversion speaks of."""
    for journal in (folders.files / "converted").glob("*/*.journal"):
        return journal.read_text().count("\n") - 1
    return 0


@pytest.fixture
def cut_short(invoke: Run) -> Callable[..., None]:
    """Pull until all is written but has no name yet, and press Ctrl-C."""

    def cut(name: str, **options: Any) -> None:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(writing._Run, "_publish", stop)
            clean(invoke("pull", name, **options), 130)

    return cut


class TestAConversionThatWasCutShort:
    @on_posix
    def test_by_kill_9_is_listed_and_gone_on_with(
        self, on_hub: str, source: Path, environment: dict[str, str], folders: Folders, invoke: Run,
        carried: list[Written], tmp_path: Path,
    ) -> None:  # fmt: skip
        name = f"{on_hub}:q8_0"
        child = subprocess.Popen(
            [sys.executable, "-c", UP_TO_THE_FOURTH_SLAB, "pull", name],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while slabs(folders) < 3 and child.poll() is None:
            time.sleep(0.01)
        assert states(invoke)[name] == "converting"
        assert re.search(rf"^{re.escape(name)} .*being converted$", invoke("list").stdout, re.MULTILINE)
        child.kill()
        said = child.communicate(timeout=60)[1]
        assert child.returncode == -signal.SIGKILL, said
        assert states(invoke) == {name: "cut short", on_hub + KEPT: "checkpoint"}
        assert listed(invoke)[name]["size"] > 0
        assert re.search(rf"^{re.escape(name)} .*cut short while it was", invoke("list").stdout, re.MULTILINE)
        assert "Fetching the checkpoint" not in clean(invoke("pull", name), 0)
        weights = (source / "model.safetensors").stat().st_size
        assert [0 < each.resumed < weights for each in carried] == [True]
        assert states(invoke)[name] == "here"
        path = Path(listed(invoke)[name]["path"])
        assert inside(path.parent) == {path.name}
        assert data_of(path) == data_of(written(source, tmp_path / "whole.gguf", "q8_0"))

    @pytest.mark.parametrize("text", [NAME, f"{NAME}:q4_k_m"])
    def test_can_be_removed_by_its_name_with_or_without_the_type(
        self, text: str, on_hub: str, invoke: Run, cut_short: Callable[..., None], folders: Folders
    ) -> None:
        cut_short(on_hub)
        assert "Removed the unfinished conversion" in clean(invoke("rm", text), 0)
        assert set(listed(invoke)) == {on_hub + KEPT}
        assert not list((folders.files / "converted").iterdir())
        clean(invoke("rm", text), 3)

    def test_stays_where_one_of_another_type_is_removed(
        self, on_hub: str, invoke: Run, cut_short: Callable[..., None]
    ) -> None:
        cut_short(on_hub)
        cut_short(f"{on_hub}:q8_0")
        clean(invoke("rm", f"{on_hub}:q8_0"), 0)
        assert listed(invoke)[f"{on_hub}:q4_k_m"]["state"] == "cut short"
        assert f"{on_hub}:q8_0" not in listed(invoke)

    def test_of_a_pinned_revision_goes_by_that(self, on_hub: str, invoke: Run, cut_short: Callable[..., None]) -> None:
        cut_short(PINNED)
        assert listed(invoke)[f"{PINNED}:q4_k_m"]["state"] == "cut short"
        clean(invoke("rm", on_hub), 3)
        clean(invoke("rm", PINNED), 0)
        assert set(listed(invoke)) == {PINNED + KEPT}

    def test_of_a_folder_is_listed_gone_on_with_and_removed(
        self, mine: Path, invoke: Run, cut_short: Callable[..., None], carried: list[Written]
    ) -> None:
        cut_short(str(mine))
        assert {name: entry["state"] for name, entry in listed(invoke).items()} == {str(mine): "cut short"}
        clean(invoke("pull", f"./{mine.name}"), 0)
        assert carried[-1].resumed
        assert {name: entry["state"] for name, entry in listed(invoke).items()} == {str(mine): "here"}
        clean(invoke("rm", str(mine)), 0)
        cut_short(str(mine))
        assert "Removed the unfinished conversion" in clean(invoke("rm", f"./{mine.name}"), 0)
        assert listed(invoke) == {}

    def test_of_a_folder_that_is_gone_can_be_removed(
        self, mine: Path, invoke: Run, cut_short: Callable[..., None], folders: Folders
    ) -> None:
        cut_short(str(mine))
        shutil.rmtree(mine)
        (name,) = listed(invoke)
        assert "Removed the unfinished conversion" in clean(invoke("rm", name), 0)
        assert listed(invoke) == {}
        assert everything_in(folders.files) == {}

    @pytest.mark.parametrize("next_", ["list", "rm", "pull"])
    def test_while_what_came_of_it_was_checked_is_known_too(
        self, next_: str, mine: Path, invoke: Run, folders: Folders, carried: list[Written]
    ) -> None:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("qwenlocal.fileio.hash_blocks", stop)
            clean(invoke("pull", str(mine)), 130)
        assert next_ != "list" or str(mine) in listed(invoke)
        if next_ == "rm":
            clean(invoke("rm", str(mine)), 0)
            assert everything_in(folders.files) == {}
        if next_ == "pull":
            clean(invoke("pull", str(mine)), 0)
            assert inside(Path(listed_here(invoke)).parent) == {Path(listed_here(invoke)).name}
            assert len(carried) == 1 or carried[1].resumed, "it was written already"

    def test_while_it_was_checked_and_again_after_a_change_is_not_taken_for_whole(
        self, mine: Path, invoke: Run, cut_short: Callable[..., None]
    ) -> None:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("qwenlocal.fileio.hash_blocks", stop)
            clean(invoke("pull", str(mine)), 130)
        change(mine, "config.json", rope_theta=10000.0)
        cut_short(str(mine))
        clean(invoke("pull", str(mine)), 0)
        assert read_metadata(Path(listed_here(invoke)))["qwen2.rope.freq_base"] == 10000.0

    def test_while_an_earlier_one_is_there_leaves_that(
        self, mine: Path, invoke: Run, cut_short: Callable[..., None]
    ) -> None:
        clean(invoke("pull", str(mine)), 0)
        before = Path(listed(invoke)[str(mine)]["path"]).read_bytes()
        change(mine, "config.json", rope_theta=10000.0)
        cut_short(str(mine))
        states = [entry["state"] for entry in strictly(invoke("list", "--json").stdout)]
        assert sorted(states) == ["cut short", "here"]
        assert Path(listed_here(invoke)).read_bytes() == before
        clean(invoke("pull", str(mine)), 0)
        assert read_metadata(Path(listed_here(invoke)))["qwen2.rope.freq_base"] == 10000.0
        assert [entry["state"] for entry in strictly(invoke("list", "--json").stdout)] == ["here"]

    def test_by_weights_that_are_not_numbers_leaves_nothing(
        self, mine: Path, hub: HubServer, invoke: Run, folders: Folders
    ) -> None:
        poke(mine, "model.norm.weight", 0, numpy.nan)
        publish(hub, mine)
        assert f"qwenlocal convert {mine} --allow-nan" in clean(invoke("pull", str(mine)), 5)
        assert listed(invoke) == {}
        assert f"qwenlocal convert {NAME} --allow-nan" in clean(invoke("pull", NAME), 5)
        assert set(listed(invoke)) == {NAME + KEPT}
        assert not list((folders.files / "converted").iterdir())

    def test_by_weights_that_are_not_numbers_leaves_an_earlier_one(self, mine: Path, invoke: Run) -> None:
        clean(invoke("pull", str(mine)), 0)
        path = Path(listed_here(invoke))
        before = path.read_bytes()
        poke(mine, "model.norm.weight", 0, numpy.nan)
        os.utime(mine / "model.safetensors", ns=(10**18, 10**18))
        clean(invoke("pull", str(mine)), 5)
        assert inside(path.parent) == {path.name}
        assert path.read_bytes() == before

    @pytest.mark.parametrize("stage", ["written", "checked"])
    def test_is_not_removed_while_it_runs(
        self, stage: str, mine: Path, invoke: Run, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module, name = (writing._Run, "_publish") if stage == "written" else (fileio, "hash_blocks")
        goes_on, said = getattr(module, name), list[subprocess.CompletedProcess[str]]()

        def meanwhile(*arguments: Any) -> Any:
            if not said:
                command = [sys.executable, "-m", "qwenlocal", "rm", str(mine)]
                said.append(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60))
            return goes_on(*arguments)

        monkeypatch.setattr(module, name, meanwhile)
        clean(invoke("pull", str(mine)), 0)
        clean(said[0], 1)
        assert states(invoke) == {str(mine): "here"}


def listed_here(run: Run) -> str:
    """The path of the one model that is whole."""
    (path,) = (entry["path"] for entry in strictly(run("list", "--json").stdout) if entry["state"] == "here")
    return str(path)


# --- a checkpoint on this disk


class TestACheckpointOnThisDisk:
    def test_that_is_gone_still_runs(self, mine: Path, qwenlocal: Run) -> None:
        first = qwenlocal("run", str(mine), "Hi", "-n", "3", "--temp", "0")
        clean(first, 0)
        shutil.rmtree(mine)
        for text in (str(mine), f"./{mine.name}"):
            again = qwenlocal("run", text, "Hi", "-n", "3", "--temp", "0")
            assert "is gone; what was made of it is still here" in clean(again, 0)
            assert again.stdout == first.stdout

    def test_that_is_gone_is_shown_verified_and_looked_into_by_its_name(self, mine: Path, invoke: Run) -> None:
        clean(invoke("pull", str(mine)), 0)
        shutil.rmtree(mine)
        assert strictly(invoke("show", str(mine), "--json").stdout)["type"] == "q4_k_m"
        assert "is whole" in clean(invoke("verify", str(mine)), 0)
        clean(invoke("inspect", str(mine)), 0)

    @pytest.mark.parametrize("how", ["whole path", "name", "relative path"])
    def test_that_is_gone_can_be_removed_by_any_way_to_it(self, how: str, mine: Path, invoke: Run) -> None:
        clean(invoke("pull", str(mine)), 0)
        path = Path(listed_here(invoke))
        shutil.rmtree(mine)
        text = {"whole path": str(mine), "name": mine.name, "relative path": f"./{mine.name}"}[how]
        clean(invoke("rm", text), 0)
        assert listed(invoke) == {}
        assert not path.exists()

    def test_that_is_gone_is_not_a_checkpoint_any_more(self, mine: Path, invoke: Run) -> None:
        clean(invoke("pull", str(mine)), 0)
        shutil.rmtree(mine)
        assert f"{mine}" in clean_error(invoke("convert", str(mine)))

    @pytest.mark.parametrize(
        "command",
        [("pull", "{}"), ("run", "{}", "Hi"), ("convert", "{}", "-o", "x.gguf"), ("verify", "{}"),
         ("verify", "./y.gguf", "--against", "{}")],
        ids=" ".join,
    )  # fmt: skip
    def test_that_is_gone_is_not_taken_for_the_one_above_it(
        self, command: tuple[str, ...], source: Path, good: Path, mine: Path, invoke: Run, tmp_path: Path
    ) -> None:
        """As trainers leave them: out/ is a checkpoint, and out/checkpoint-500 an earlier one."""
        shutil.copy(good, tmp_path / "y.gguf")
        inner = Path(shutil.copytree(source, mine / "checkpoint-500"))
        clean(invoke("pull", str(inner)), 0)
        shutil.rmtree(inner)
        path = Path(listed_here(invoke))
        if command[0] in ("pull", "run"):
            path.unlink()
        else:
            damage(path)
        assert "checkpoint-500" in clean_error(invoke(*(word.replace("{}", str(inner)) for word in command)))
        assert not (tmp_path / "x.gguf").exists()

    @pytest.mark.parametrize("left", [(), ("training.log",), ("model.safetensors",)], ids=str)
    def test_of_which_only_the_folder_is_left_counts_as_gone(
        self, left: tuple[str, ...], mine: Path, invoke: Run
    ) -> None:
        (mine / "training.log").write_text("x")
        clean(invoke("pull", str(mine)), 0)
        for path in mine.iterdir():
            if path.name not in left:
                path.unlink()
        assert strictly(invoke("show", str(mine), "--json").stdout or "{}").get("type") == "q4_k_m"
        clean(invoke("rm", str(mine)), 0)
        assert listed(invoke) == {}

    def test_that_is_gone_is_known_by_a_link_that_led_to_it(self, mine: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(mine)
        clean(invoke("pull", "./link"), 0)
        shutil.rmtree(mine)
        assert "is still here" in clean(invoke("pull", "./link"), 0)
        clean(invoke("rm", "./link"), 0)

    def test_that_is_one_file_of_a_folder_and_gone_still_counts(self, mine: Path, invoke: Run) -> None:
        (mine / "model.safetensors").rename(mine / "other.safetensors")
        file = mine / "other.safetensors"
        clean(invoke("pull", str(file)), 0)
        file.unlink()
        assert "is still here" in clean(invoke("pull", str(file)), 0)
        clean(invoke("rm", str(file)), 0)
        assert listed(invoke) == {}

    @pytest.mark.parametrize(
        ("file", "content", "key", "value"),
        [
            ("README.md", "---\nlicense: mit\n---\n", "general.license", "mit"),
            ("additional_chat_templates/x.jinja", "{{ 1 }}", "tokenizer.chat_template.x", "{{ 1 }}"),
            ("chat_template.jinja", "{{ 2 }}", "tokenizer.chat_template", "{{ 2 }}"),
        ],
    )
    def test_to_which_a_file_was_added_is_converted_anew(
        self, file: str, content: str, key: str, value: str, mine: Path, invoke: Run
    ) -> None:
        clean(invoke("pull", str(mine)), 0)
        (mine / file).parent.mkdir(exist_ok=True)
        (mine / file).write_text(content)
        assert "Converting it once" in clean(invoke("pull", str(mine)), 0)
        assert read_header(Path(listed_here(invoke))).metadata[key] == value
        assert "Converting it once" not in clean(invoke("pull", str(mine)), 0)

    @pytest.mark.parametrize("file", ["README.md", "additional_chat_templates/x.jinja"])
    def test_of_which_a_file_was_changed_or_taken_away_is_converted_anew(
        self, file: str, mine: Path, invoke: Run
    ) -> None:
        (mine / file).parent.mkdir(exist_ok=True)
        (mine / file).write_text("before")
        clean(invoke("pull", str(mine)), 0)
        (mine / file).write_text("and after")
        assert "Converting it once" in clean(invoke("pull", str(mine)), 0)
        (mine / file).unlink()
        assert "Converting it once" in clean(invoke("pull", str(mine)), 0)

    @pytest.mark.parametrize("file", ["training.log", "optimizer.pt", "runs/events.out"])
    def test_beside_which_other_files_come_and_go_is_not(self, file: str, mine: Path, invoke: Run) -> None:
        clean(invoke("pull", str(mine)), 0)
        (mine / file).parent.mkdir(exist_ok=True)
        (mine / file).write_text("x")
        assert "Converting it once" not in clean(invoke("pull", str(mine)), 0)

    def test_is_converted_anew_by_a_program_that_does_it_otherwise(
        self, mine: Path, invoke: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clean(invoke("pull", str(mine)), 0)
        monkeypatch.setattr("qwenlocal.weights.edition.EDITION", EDITION + 1)
        assert "Converting it once" in clean(invoke("pull", str(mine)), 0)
        assert "Converting it once" not in clean(invoke("pull", str(mine)), 0)

    def test_of_a_hub_is_said_to_be_of_an_earlier_edition_then(
        self, on_hub: str, invoke: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clean(invoke("pull", on_hub), 0)
        assert "another version" not in clean(invoke("pull", on_hub), 0)
        monkeypatch.setattr("qwenlocal.weights.edition.EDITION", EDITION + 1)
        said = clean(invoke("pull", on_hub), 0)
        assert "converted by another version of this program" in " ".join(said.split())
        clean(invoke("rm", on_hub), 0)
        clean(invoke("pull", on_hub), 0)
        assert "another version" not in clean(invoke("pull", on_hub), 0)


def clean_error(result: subprocess.CompletedProcess[str]) -> str:
    """The error output of a run that must have failed, whatever its code."""
    assert result.returncode in (2, 3, 5), result.stderr
    return clean(result, result.returncode)


# --- chat templates


class TestTemplates:
    CRLF = b"{% if x %}\r\na\r\n{% endif %}\r\nb\rc\n"

    @pytest.mark.parametrize("file", ["chat_template.jinja", "additional_chat_templates/tool-use.jinja"])
    def test_are_kept_byte_for_byte(self, file: str, mine: Path, invoke: Run, tmp_path: Path) -> None:
        (mine / file).parent.mkdir(exist_ok=True)
        (mine / file).write_bytes(self.CRLF)
        clean(invoke("convert", str(mine), "-o", "x.gguf", "--type", "q8_0"), 0)
        key = "tokenizer.chat_template" + (".tool_use" if "/" in file else "")
        kind, length = struct.unpack_from("<IQ", read_pairs(tmp_path / "x.gguf")[key])
        assert (kind, length) == (8, len(self.CRLF))
        assert read_pairs(tmp_path / "x.gguf")[key][12:] == self.CRLF

    def test_of_a_checkpoint_on_a_hub_are_too_and_go_with_it(
        self, mine: Path, hub: HubServer, invoke: Run, environment: dict[str, str], tmp_path: Path
    ) -> None:
        (mine / "additional_chat_templates").mkdir()
        (mine / "additional_chat_templates" / "tool_use.jinja").write_bytes(self.CRLF)
        (mine / "additional_chat_templates" / "rag.jinja").write_bytes(self.CRLF)
        publish(hub, mine)
        clean(invoke("convert", NAME, "-o", "x.gguf", "--type", "q8_0"), 0)
        pairs = read_pairs(tmp_path / "x.gguf")
        assert gguf.decode(pairs["tokenizer.chat_templates"]) == ["rag", "tool_use"]
        for name in ("rag", "tool_use"):
            assert pairs[f"tokenizer.chat_template.{name}"][12:] == self.CRLF
        assert "are free again" in clean(invoke("rm", NAME + KEPT), 0)
        assert everything_in(Path(environment["HF_HUB_CACHE"])) == {}

    @pytest.mark.parametrize("file", ["chat_template.jinja", "additional_chat_templates/x.jinja"])
    def test_that_are_no_text_are_refused(self, file: str, mine: Path, invoke: Run, tmp_path: Path) -> None:
        (mine / file).parent.mkdir(exist_ok=True)
        (mine / file).write_bytes(b"a\xff\xfe")
        for command in (("convert", str(mine), "-o", "x.gguf"), ("pull", str(mine))):
            assert f"{Path(file).name}: it cannot be read" in clean(invoke(*command), 5)
        assert not (tmp_path / "x.gguf").exists()
        assert listed(invoke) == {}

    def test_that_are_no_text_are_refused_before_weights_are_fetched(
        self, mine: Path, hub: HubServer, watch: Watch, invoke: Run
    ) -> None:
        (mine / "additional_chat_templates").mkdir()
        (mine / "additional_chat_templates" / "x.jinja").write_bytes(b"\xff")
        publish(hub, mine)
        assert "x.jinja: it cannot be read" in clean(invoke("pull", NAME), 5)
        assert watch.saw_headers_only


# --- verify --against


def with_tensors(source: Path, target: Path, *, without: str = "", **more: numpy.ndarray) -> Path:
    """A copy of a file of f32 with a tensor less, or with others in it as well ("." is written "__" in names)."""
    header, data = read_header(source), data_of(source)
    kind = ggml.tensor_type("f32")
    shapes = {tensor.name: tensor.shape for tensor in header.tensors if tensor.name != without}
    contents = {name: data[name][1] for name in shapes}
    for name, numbers in more.items():
        shapes[name.replace("__", ".")] = tuple(reversed(numbers.shape))
        contents[name.replace("__", ".")] = numbers.astype(numpy.float32).tobytes()
    layout = gguf.lay_out(read_pairs(source), [gguf.Described(name, shape, kind) for name, shape in shapes.items()])
    with target.open("wb") as file:
        file.write(layout.header)
        for name, content in contents.items():
            file.seek(layout.offsets[name])
            file.write(content)
        file.truncate(layout.size)
    return target


def other_entry(file: Path, key: str, at: int, value: Any) -> bytes:
    """A list of a file's header with one entry changed."""
    values = gguf.decode(read_pairs(file)[f"tokenizer.ggml.{key}"])
    values[at] = value
    return gguf.i32s(values) if isinstance(value, int) else gguf.strings(values)


def against(invoke: Run, file: Path, checkpoint: Path, code: int) -> list[str]:
    """What verify --against finds wrong; it says the same for people and for programs."""
    shown, data = (invoke("verify", str(file), "--against", str(checkpoint), *more) for more in ((), ("--json",)))
    clean(shown, code)
    clean(data, code)
    found: list[str] = strictly(data.stdout)["problems"]
    assert re.findall(r"^wrong    (.*)$", shown.stdout, re.MULTILINE) == found
    return found


def measured(checkpoint: Path, file: Path, memory: int = 0) -> Fidelity:
    pairs = read_pairs(file)
    texts = known_texts(*(gguf.decode(pairs[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type")))
    return measure(Checkpoint.open(checkpoint), file, texts, threads=1, memory=memory)


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no memory for weights; and no time is spent on running them."""

    def without(*arguments: Any, **options: Any) -> Fidelity:
        return measure(*arguments, **{**options, "memory": 0})

    monkeypatch.setattr("qwenlocal.measure.fidelity.measure", without)


class TestAgainst:
    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("qwen2.rope.freq_base", gguf.f32(10000), "is 10,000; the checkpoint says 1,000,000"),
            ("qwen2.rope.freq_base", None, "is missing; the checkpoint says 1,000,000"),
            ("qwen2.attention.layer_norm_rms_epsilon", gguf.f32(1e-5), "; the checkpoint says 9.99999997"),
            ("qwen2.context_length", gguf.u32(1024), "is 1024; the checkpoint says 2048"),
            ("qwen2.attention.head_count_kv", gguf.u32(4), "is 4; the checkpoint says 2"),
            ("tokenizer.chat_template", gguf.string("{{ 1 }}"), "is '{{ 1 }}'; the checkpoint says"),
            ("tokenizer.ggml.eos_token_id", gguf.u32(258), "is 258; the checkpoint says 260"),
            ("tokenizer.ggml.pre", gguf.string("llama-bpe"), "is 'llama-bpe'; the checkpoint says 'qwen2'"),
            ("tokenizer.ggml.merges", gguf.strings(["t h"]), "has 1 entries; the checkpoint has 2"),
            ("tokenizer.ggml.add_bos_token", gguf.boolean(True), "is True; the checkpoint says False"),
        ],
        ids=lambda value: value if isinstance(value, str) and " " not in value else "",
    )
    def test_a_key_that_says_something_else_is_named(
        self, key: str, value: bytes | None, message: str, source: Path, good: Path, tmp_path: Path
    ) -> None:
        found = measured(source, changed_pairs(good, tmp_path / "x.gguf", {key: value})).problems
        assert [problem for problem in found if f"“{key}”" in problem and message in problem], found

    @pytest.mark.parametrize("text", ["{{ 1 }}", "x" * 10_000, "a\x1b[2J\nb"], ids=["short", "long", "strange"])
    def test_that_is_said_for_people_and_for_programs(
        self, text: str, source: Path, good: Path, invoke: Run, tmp_path: Path
    ) -> None:
        pairs = {"qwen2.rope.freq_base": gguf.f32(10000), "tokenizer.chat_template": gguf.string(text)}
        found = against(invoke, changed_pairs(good, tmp_path / "x.gguf", pairs), source, 5)
        assert "“qwen2.rope.freq_base” is 10,000; the checkpoint says 1,000,000" in found
        assert [len(problem) < 200 for problem in found if "“tokenizer.chat_template”" in problem] == [True]

    @pytest.mark.parametrize(
        ("key", "at", "value", "message"),
        [
            ("token_type", 65, 4, "“tokenizer.ggml.token_type” has 4 at 65; the checkpoint has 1"),
            ("token_type", 270, 4, "“tokenizer.ggml.token_type” has 4 at 270; the checkpoint has 5"),
            ("tokens", 270, "[PAD]", "“tokenizer.ggml.tokens” has '[PAD]' at 270; the checkpoint has '[PAD270]'"),
            ("merges", 0, "h t", "“tokenizer.ggml.merges” has 'h t' at 0; the checkpoint has 't h'"),
        ],
    )
    def test_an_entry_of_the_vocabulary_that_is_another_is_named_with_its_place(
        self, key: str, at: int, value: Any, message: str, source: Path, good: Path, tmp_path: Path
    ) -> None:
        file = changed_pairs(good, tmp_path / "x.gguf", {f"tokenizer.ggml.{key}": other_entry(good, key, at, value)})
        assert message in measured(source, file).problems

    def test_what_older_converters_did_not_say_is_not_missed(self, source: Path, good: Path, tmp_path: Path) -> None:
        unsaid = ("eot_token_id", "padding_token_id", "bos_token_id", "add_bos_token", "suppress_tokens")
        pairs = {"tokenizer.chat_template": None, **{f"tokenizer.ggml.{key}": None for key in unsaid}}
        assert set(pairs) <= set(read_pairs(good)) | {"tokenizer.ggml.bos_token_id"}
        assert measured(source, changed_pairs(good, tmp_path / "x.gguf", pairs)).problems == []

    def test_other_names_and_licences_do_not_matter(self, source: Path, good: Path, tmp_path: Path) -> None:
        pairs = {"general.name": gguf.string("other"), "general.license": gguf.string("mit"), "my.key": gguf.u32(5)}
        assert measured(source, changed_pairs(good, tmp_path / "x.gguf", pairs)).problems == []

    @pytest.mark.parametrize(
        "pairs",
        [
            {"qwen2.rope.scaling.type": gguf.string("linear"), "qwen2.rope.scaling.factor": gguf.f32(4)},
            {"qwen2.rope.scaling.type": gguf.string("yarn"), "qwen2.rope.scaling.factor": gguf.f32(4),
             "qwen2.rope.scaling.original_context_length": gguf.u32(2048)},
        ],
        ids=["linear", "yarn"],
    )  # fmt: skip
    @pytest.mark.parametrize("memory", [0, ENOUGH], ids=["header", "logits"])
    def test_a_scaling_that_the_checkpoint_does_not_have_is_found(
        self, pairs: dict[str, bytes], memory: int, source: Path, good: Path, tmp_path: Path
    ) -> None:
        assert measured(source, changed_pairs(good, tmp_path / "x.gguf", pairs), memory).problems

    def test_a_tensor_too_many_is_named(self, source: Path, good: Path, invoke: Run, tmp_path: Path) -> None:
        file = with_tensors(good, tmp_path / "x.gguf", blk__0__extra__weight=numpy.ones((64, 64)))
        assert against(invoke, file, source, 5) == ["“blk.0.extra.weight” is in it, and not in the checkpoint"]

    @pytest.mark.parametrize(
        "name", ["blk.0.ffn_up.weight", "output_norm.weight", "output.weight", "blk.0.attn_q.bias"]
    )
    def test_a_tensor_too_few_is_named(self, name: str, source: Path, good: Path, invoke: Run, tmp_path: Path) -> None:
        file = with_tensors(good, tmp_path / "x.gguf", without=name)
        (found,) = against(invoke, file, source, 5)
        assert found.startswith(f"“{name}” is missing in it, or of another shape")

    @pytest.fixture
    def tied(self, tmp_path: Path) -> Path:
        config = {**SIZES, "tie_word_embeddings": True}
        return write_checkpoint(tmp_path / "tied", config=config, store_tied_head=True)

    @pytest.mark.parametrize("kind", ["f32", "q8_0"])
    def test_a_head_that_is_tied_and_stored_all_the_same_is_fine(self, kind: str, tied: Path, tmp_path: Path) -> None:
        file = written(tied, tmp_path / "x.gguf", kind, like_llama_cpp=True)
        assert "output.weight" in data_of(file)
        found = measured(tied, file, ENOUGH)
        assert found.logits
        assert found.problems == []

    def test_a_head_that_is_tied_and_stored_as_another_is_not(self, tied: Path, tmp_path: Path) -> None:
        file = written(tied, tmp_path / "x.gguf", "f32", like_llama_cpp=True)
        other = with_numbers(file, tmp_path / "y.gguf", "output.weight", 5.0, 5.0)
        assert any("“output.weight” (f32) is off by" in problem for problem in measured(tied, other).problems)

    @pytest.mark.parametrize("kind", ["q8_0", "q4_k_m", "q4_0", "q2_k"])
    def test_a_true_file_of_any_type_is_true_however_small_its_model_is(
        self, kind: str, source: Path, tmp_path: Path
    ) -> None:
        assert measured(source, written(source, tmp_path / "x.gguf", kind), ENOUGH).problems == []

    def test_weights_that_are_not_numbers_are_zero_in_a_true_file_and_counted(
        self, mine: Path, invoke: Run, scarce: None, tmp_path: Path
    ) -> None:
        poke(mine, UP, 40, numpy.nan, numpy.inf)
        poke(mine, "model.norm.weight", 3, numpy.nan)
        clean(invoke("convert", str(mine), "--type", "f32,q8_0", "-o", "{type}.gguf", "--allow-nan"), 0)
        for kind in ("f32", "q8_0"):
            found = measured(mine, tmp_path / f"{kind}.gguf", ENOUGH)
            assert (found.problems, found.not_finite) == ([], 3)
            assert found.logits
        result = invoke("verify", "./q8_0.gguf", "--against", str(mine))
        assert "q8_0.gguf is true to" in clean(result, 0)
        assert "note     3 weights are NaN or infinite in the checkpoint, zero here" in result.stdout

    def test_weights_that_are_not_numbers_and_were_written_as_such_are_wrong(
        self, mine: Path, good: Path, tmp_path: Path
    ) -> None:
        poke(mine, UP, 0, numpy.nan)
        file = with_numbers(good, tmp_path / "x.gguf", "blk.0.ffn_up.weight", numpy.nan)
        assert any("“blk.0.ffn_up.weight”" in problem for problem in measured(mine, file).problems)

    @pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
    def test_without_memory_for_weights_the_vocabulary_is_compared_all_the_same(
        self, kind: str, source: Path, tmp_path: Path
    ) -> None:
        found = measured(source, written(source, tmp_path / "x.gguf", kind))
        assert found.texts > 10
        assert (found.logits, found.problems) == (None, [])

    @pytest.mark.parametrize("at", [65, 97, 256])
    def test_without_memory_for_weights_another_vocabulary_is_found(
        self, at: int, source: Path, good: Path, tmp_path: Path
    ) -> None:
        tokens = gguf.decode(read_pairs(good)["tokenizer.ggml.tokens"])
        tokens[at], tokens[at + 1] = tokens[at + 1], tokens[at]
        found = measured(
            source, changed_pairs(good, tmp_path / "x.gguf", {"tokenizer.ggml.tokens": gguf.strings(tokens)})
        )
        assert found.logits is None
        assert found.wrong_texts
        assert any("other token ids" in problem for problem in found.problems)

    def test_without_memory_for_weights_it_is_said_that_they_were_not_run(
        self, source: Path, good: Path, invoke: Run, scarce: None
    ) -> None:
        result = invoke("verify", str(good), "--against", str(source))
        clean(result, 0)
        assert "logits   not compared: both models together do not fit into memory" in result.stdout

    def test_mends_nothing_so_it_cannot_be_told_not_to(self, source: Path, good: Path, invoke: Run) -> None:
        said = clean(invoke("verify", str(good), "--against", str(source), "--no-repair"), 2)
        assert "--no-repair and --against do not go together" in " ".join(said.split())

    def test_of_a_checkpoint_on_a_hub_fetches_it(self, on_hub: str, good: Path, invoke: Run, scarce: None) -> None:
        result = invoke("verify", str(good), "--against", on_hub)
        assert "good.gguf is true to Tiny-Qwen-0.1B" in clean(result, 0)


class TestVerifyAsJson:
    def test_says_that_a_file_is_whole(self, good: Path, invoke: Run) -> None:
        result = invoke("verify", str(good), "--json")
        clean(result, 0)
        found = strictly(result.stdout)
        assert (found["path"], found["whole"], found["damage"]) == (str(good), True, [])

    def test_says_which_bytes_are_damaged_and_ends_with_five(self, mine: Path, invoke: Run) -> None:
        clean(invoke("pull", str(mine)), 0)
        path = Path(listed_here(invoke))
        before = damage(path)
        result = invoke("verify", str(mine), "--json", "--no-repair")
        clean(result, 5)
        found = strictly(result.stdout)
        assert (found["whole"], found["damage"]) == (False, [{"file": str(path), "blocks": [0]}])
        assert path.read_bytes() != before

    def test_prints_nothing_but_json_while_it_mends(self, mine: Path, invoke: Run) -> None:
        clean(invoke("pull", str(mine)), 0)
        path = Path(listed_here(invoke))
        before = damage(path)
        result = invoke("verify", str(mine), "--json")
        clean(result, 0)
        assert strictly(result.stdout)["whole"] is True
        assert path.read_bytes() == before

    def test_works_for_the_original_weights_too(self, on_hub: str, invoke: Run) -> None:
        clean(invoke("pull", on_hub), 0)
        result = invoke("verify", on_hub + KEPT, "--json")
        clean(result, 0)
        assert (strictly(result.stdout)["state"], strictly(result.stdout)["whole"]) == ("checkpoint", True)


# --- tokenizers that llama.cpp cannot follow


def steps(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """How a checkpoint's tokenizer.json cuts text: by an expression, then into bytes."""
    split, level = json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    return split, level


def cut_by(folder: Path, *cutting: dict[str, Any]) -> Path:
    return change(folder, "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": list(cutting)})


class TestByteLevelTokenizers:
    @pytest.mark.parametrize(
        "normalizer",
        [
            {"type": "Lowercase"}, {"type": "NFKC"}, {"type": "NFD"}, {"type": "Strip", "strip_left": True},
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
            {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
            {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [{"type": "NFKC"}]}]},
        ],
        ids=str,
    )  # fmt: skip
    def test_that_change_text_otherwise_are_refused(self, normalizer: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(CannotExpress, match="it changes text before cutting it") as caught:
            vocabulary(change(small(tmp_path), "tokenizer.json", normalizer=normalizer))
        assert "tokenizer.json" in str(caught.value)

    @pytest.mark.parametrize(
        "normalizer",
        [None, {"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
         {"type": "Sequence", "normalizers": []}, ...],
        ids=str,
    )  # fmt: skip
    def test_that_do_not_are_taken(self, normalizer: Any, tmp_path: Path) -> None:
        assert vocabulary(change(small(tmp_path), "tokenizer.json", normalizer=normalizer)).pre == "qwen2"

    @pytest.mark.parametrize(
        ("step", "key", "value"),
        [
            (0, "behavior", "Removed"), (0, "behavior", "MergedWithNext"), (0, "invert", True),
            (1, "add_prefix_space", True), (1, "use_regex", True),
        ],
    )  # fmt: skip
    def test_that_cut_text_otherwise_are_refused(self, step: int, key: str, value: Any, tmp_path: Path) -> None:
        folder = small(tmp_path)
        cutting = steps(folder)
        cutting[step][key] = value
        with pytest.raises(CannotExpress, match=rf"not Qwen1\.5's .{key} is {value!r}") as caught:
            vocabulary(cut_by(folder, *cutting))
        assert "--pre NAME" in caught.value.hint

    @pytest.mark.parametrize(
        "more",
        [{"type": "Digits", "individual_digits": True}, {"type": "Whitespace"}, {"type": "Punctuation"}],
        ids=str,
    )
    def test_that_cut_once_more_are_refused(self, more: dict[str, Any], tmp_path: Path) -> None:
        folder = small(tmp_path)
        with pytest.raises(CannotExpress, match=r"not Qwen1\.5's"):
            vocabulary(cut_by(folder, *steps(folder), more))

    def test_that_do_not_say_whether_they_cut_by_gpt_2s_expression_do(self, tmp_path: Path) -> None:
        """Hugging Face's tokenizers, byte_level.rs: `use_regex` is true where it is not said."""
        folder = small(tmp_path)
        split, level = steps(folder)
        del level["use_regex"]
        with pytest.raises(CannotExpress, match="use_regex"):
            vocabulary(cut_by(folder, split, level))

    @pytest.mark.parametrize("order", [(0,), (1, 0), (0, 1, 1)], ids=str)
    def test_whose_steps_are_others_are_refused(self, order: tuple[int, ...], tmp_path: Path) -> None:
        """Without ByteLevel, bytes are no letters; before Split, it would have no spaces to cut at."""
        folder = small(tmp_path)
        cutting = steps(folder)
        with pytest.raises(CannotExpress):
            vocabulary(cut_by(folder, *(cutting[number] for number in order)))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("ignore_merges", True),
            ("dropout", 0.1),
            ("continuing_subword_prefix", "##"),
            ("end_of_word_suffix", "</w>"),
        ],
    )
    def test_that_merge_otherwise_are_refused(self, key: str, value: Any, tmp_path: Path) -> None:
        with pytest.raises(CannotExpress, match=f"its tokenizer has {key} = "):
            vocabulary(change_model(small(tmp_path), **{key: value}))

    @pytest.mark.parametrize(
        "model", [{"ignore_merges": False}, {"dropout": 0.0}, {"dropout": None}, {"continuing_subword_prefix": None}],
        ids=str,
    )  # fmt: skip
    def test_that_only_mention_it_are_taken(self, model: dict[str, Any], tmp_path: Path) -> None:
        assert vocabulary(change_model(small(tmp_path), **model)).pre == "qwen2"

    @pytest.mark.parametrize("command", ["convert", "pull"])
    def test_that_are_refused_end_a_command_with_five(
        self, command: str, mine: Path, invoke: Run, tmp_path: Path
    ) -> None:
        change(mine, "tokenizer.json", normalizer={"type": "NFKC"})
        assert "“NFKC”" in clean(invoke(command, str(mine)), 5).replace("'", "“", 1).replace("'", "”", 1)
        assert listed(invoke) == {}
        assert inside(tmp_path) - {"person"} == {mine.name}

    def test_on_a_hub_are_refused_before_weights_are_fetched(
        self, mine: Path, hub: HubServer, watch: Watch, invoke: Run
    ) -> None:
        publish(hub, change_model(mine, ignore_merges=True))
        assert "ignore_merges" in clean(invoke("pull", NAME), 5)
        assert watch.saw_headers_only


class TestByteFallbackTokenizers:
    def fallback(self, folder: Path, *normalizers: dict[str, Any]) -> Path:
        """A SentencePiece vocabulary in the form of tokenizer.json."""
        made = small(folder, {"vocab_size": 12})
        vocab = {"<unk>": 0, "<0x0A>": 1, "▁": 2, "t": 3, "h": 4, "th": 5, "▁th": 6}
        model = {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": ["t h", "▁ th"]}
        added = [{"id": 0, "content": "<unk>", "special": True}, {"id": 7, "content": "<|im_end|>", "special": True}]
        change(made, "tokenizer.json", model=model, added_tokens=added, pre_tokenizer=...,
               normalizer={"type": "Sequence", "normalizers": list(normalizers)})  # fmt: skip
        (made / "tokenizer_config.json").write_text("{}")
        (made / "generation_config.json").unlink()
        return made

    @pytest.mark.parametrize(
        "step",
        [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
            {"type": "Replace", "pattern": {"String": "\n"}, "content": "▁"},
            {"type": "Replace", "pattern": {"Regex": " +"}, "content": "▁"},
            {"type": "Prepend", "prepend": "_"}, {"type": "Metaspace", "replacement": "_"}, {"type": "NFC"},
        ],
        ids=str,
    )  # fmt: skip
    def test_that_replace_anything_but_spaces_are_refused(self, step: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(CannotExpress, match="it changes text before cutting it"):
            vocabulary(self.fallback(tmp_path, step), 12)

    def test_that_replace_spaces_and_put_one_in_front_are_taken(self, tmp_path: Path) -> None:
        prepend = {"type": "Prepend", "prepend": "▁"}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        assert dict(vocabulary(self.fallback(tmp_path, prepend, replace), 12).adds)["space"] is True

    def test_that_only_replace_spaces_are_taken(self, tmp_path: Path) -> None:
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        assert dict(vocabulary(self.fallback(tmp_path, replace), 12).adds)["space"] is False


# --- GGUF files that say something twice, or nothing


class TestHeaders:
    def twice(self, good: Path, target: Path, what: str) -> Path:
        """A file in which a key, or a tensor, stands twice."""
        if what == "key":
            changed_pairs(good, target, {"my.key1": gguf.u32(1), "my.key2": gguf.u32(2)})
            target.write_bytes(target.read_bytes().replace(b"my.key2", b"my.key1"))
        elif what == "long key":
            words = gguf.strings(["x"] * 2000)
            changed_pairs(good, target, {"my.key1": words, "my.key2": words})
            target.write_bytes(target.read_bytes().replace(b"my.key2", b"my.key1"))
        else:
            target.write_bytes(good.read_bytes().replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"))
        return target

    @pytest.mark.parametrize(
        ("what", "message"),
        [("key", "the key “my.key1” stands there twice"), ("long key", "the key “my.key1” stands there twice"),
         ("tensor", "the tensor “blk.0.attn_q.weight” stands there twice")],
    )  # fmt: skip
    def test_that_say_something_twice_are_refused(
        self, what: str, message: str, good: Path, source: Path, invoke: Run, tmp_path: Path
    ) -> None:
        file = self.twice(good, tmp_path / "x.gguf", what)
        with pytest.raises(BadWeights, match=message):
            read_header(file)
        for command in (("inspect", "./x.gguf"), ("inspect", "./x.gguf", "--fix", "-o", "y.gguf"),
                        ("diff", "./x.gguf", str(good)), ("diff", str(good), "./x.gguf"),
                        ("quantize", "./x.gguf", "y.gguf", "q8_0"), ("show", "./x.gguf"), ("verify", "./x.gguf"),
                        ("verify", "./x.gguf", "--against", str(source)), ("run", "./x.gguf", "Hi")):  # fmt: skip
            assert "x.gguf" in clean(invoke(*command), 5), command
        assert not (tmp_path / "y.gguf").exists()

    @pytest.mark.parametrize("what", ["key", "long key"])
    def test_that_say_something_twice_have_no_pairs_either(self, what: str, good: Path, tmp_path: Path) -> None:
        with pytest.raises(BadWeights, match="stands there twice"):
            read_pairs(self.twice(good, tmp_path / "x.gguf", what))

    @pytest.mark.parametrize("text", [".", "./folder", "folder", "./folder/", "./folder.gguf", "folder.gguf", "/"])
    def test_of_a_directory_are_none(self, text: str, good: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder.gguf").mkdir()
        for command in (("inspect", text), ("inspect", text, "--json"), ("diff", text, str(good)),
                        ("diff", str(good), text), ("quantize", text, "y.gguf", "q8_0"), ("run", text, "Hi"),
                        ("verify", text), ("show", text)):  # fmt: skip
            assert "this is a directory" in clean(invoke(*command), 5), command

    @pytest.fixture
    def unreadable(self, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        """A file of somebody else's; to root, too."""
        shutil.copy(good, tmp_path / "x.gguf")
        open_ = Path.open

        def denied(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == "x.gguf":
                raise PermissionError(13, "Permission denied", str(path))
            return open_(path, *arguments, **options)

        monkeypatch.setattr(Path, "open", denied)
        return "./x.gguf"

    def test_that_may_not_be_read_say_so(self, unreadable: str, good: Path, invoke: Run) -> None:
        for command in (("inspect", unreadable), ("diff", unreadable, str(good)), ("diff", str(good), unreadable),
                        ("quantize", unreadable, "y.gguf", "q8_0"), ("show", unreadable),
                        ("run", unreadable, "Hi")):  # fmt: skip
            assert "x.gguf: it cannot be read (Permission denied)" in clean(invoke(*command), 5), command

    @pytest.mark.parametrize("options", [(), ("--json",), ("--no-repair",)], ids=str)
    def test_that_may_not_be_read_say_so_when_they_are_verified(
        self, options: tuple[str, ...], unreadable: str, invoke: Run
    ) -> None:
        assert "x.gguf: it cannot be read (Permission denied)" in clean(invoke("verify", unreadable, *options), 5)

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
    def test_that_may_really_not_be_read_say_so(self, good: Path, qwenlocal: Run, tmp_path: Path) -> None:
        shutil.copy(good, tmp_path / "x.gguf")
        (tmp_path / "x.gguf").chmod(0)
        for command in (("inspect", "./x.gguf"), ("diff", "./x.gguf", str(good))):
            assert "cannot be read (Permission denied)" in clean(qwenlocal(*command), 5)

    @pytest.mark.skipif(not Path("/dev/null").exists(), reason="there is none")
    def test_of_a_device_are_none(self, invoke: Run) -> None:
        clean(invoke("inspect", "/dev/null"), 5)
