"""`convert --stream`: a checkpoint on a hub is converted while it is downloaded, and nothing else is kept."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
from checkpoint_files import LARGE, SMALL, file_names, set_weights
from commands import expect_exit, list_models, parse_plan
from conftest import Run
from fuzzing import fuzz
from hub import HubServer, Response, cut, only_on, pace, refuse, whole_file
from hub_checkpoints import HF_NAME, REPO, publish
from hypothesis import given, settings
from hypothesis import strategies as st
from interruptions import on_posix
from packing import Tensors, change_tensor, rewrite_tensors, write_packed_checkpoint

from qwenlocal.library.plan_execution import describe_proof
from qwenlocal.library.streaming import resumable_hash
from qwenlocal.library.streaming.resumable_hash import ResumableSha256
from qwenlocal.library.streaming.stream_layout import build_units, plan_requests
from qwenlocal.paths import Folders
from qwenlocal.resumable import JournalAppender
from qwenlocal.testing import MOE_CONFIG, write_checkpoint, write_safetensors
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import ConversionOptions, plan_conversion
from qwenlocal.weights.file_types import file_type
from qwenlocal.weights.packed_proof import StreamedProofs
from qwenlocal.weights.safetensors import read_tensors
from qwenlocal.weights.write_job import split_into_chunks

PACKED = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
PACKED_WEIGHTS = 1_179_648
WEIGHTS = "model.safetensors"


def sort_by_type(folder: Path) -> None:
    """Store integers before floats, as the library safetensors does: scales lie far behind the codes."""

    def sort(tensors: Tensors) -> None:
        entries = sorted(tensors.items(), key=lambda entry: (entry[1][0] != "I32", entry[0]))
        tensors.clear()
        tensors.update(entries)

    rewrite_tensors(folder, sort)


def split_file(folder: Path, is_first: Callable[[str], bool]) -> None:
    """Divide the tensors of a checkpoint into two files."""
    path = folder / WEIGHTS
    data, stored = path.read_bytes(), read_tensors(path)
    names, index = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), {}
    for number, name in enumerate(names):
        group = [tensor for tensor in stored if is_first(tensor.name) == (number == 0)]
        content = {t.name: (t.dtype, t.shape, data[t.offset : t.offset + t.size]) for t in group}
        write_safetensors(folder / name, content)
        index |= dict.fromkeys(content, name)
    path.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_dense(folder: Path) -> None:
    write_checkpoint(folder, config=SMALL, shards=3)


def write_moe(folder: Path) -> None:
    write_checkpoint(folder, config={**MOE_CONFIG, "num_hidden_layers": 1}, fused_experts=True)


def write_tied(folder: Path) -> None:
    write_checkpoint(folder, config={**SMALL, "tie_word_embeddings": True}, store_tied_head=True)


def write_gptq(folder: Path) -> None:
    write_packed_checkpoint(folder, config=PACKED, zero_biases=True)
    sort_by_type(folder)


def write_gptq_in_two_files(folder: Path) -> None:
    write_packed_checkpoint(folder, config=PACKED, symmetric=False)
    split_file(folder, lambda name: not name.endswith("scales"))


def write_gptq_with_orders_in_a_file(folder: Path) -> None:
    write_packed_checkpoint(folder, config=PACKED)
    split_file(folder, lambda name: not name.endswith("g_idx"))


def write_shuffled(folder: Path) -> None:
    write_packed_checkpoint(folder, config=PACKED, shuffled=True, group_size=64)
    sort_by_type(folder)


def write_gemm(folder: Path) -> None:
    write_packed_checkpoint(folder, "gemm", config=PACKED, symmetric=False)
    sort_by_type(folder)


def write_gemv(folder: Path) -> None:
    write_packed_checkpoint(folder, "gemv", config=PACKED, symmetric=False)


def write_packed_moe(folder: Path) -> None:
    write_packed_checkpoint(folder, config={**MOE_CONFIG, "num_hidden_layers": 1}, group_size=32)
    sort_by_type(folder)


class StreamedCommand:
    """The command `convert hf:… --stream`, and the file that the same command writes from the local directory."""

    def __init__(self, hub: HubServer, invoke: Run, folder: Path) -> None:
        self.hub, self.invoke, self.source = hub, invoke, folder / "source" / "Tiny-Qwen-0.1B"
        self.target = folder / "out" / "x.gguf"

    def publish(self, write: Callable[[Path], object], *options: str) -> None:
        """Write a checkpoint, and convert it locally."""
        self.source.parent.mkdir()
        write(self.source)
        publish(self.hub, self.source)
        self.options = options

    def run(self) -> subprocess.CompletedProcess[str]:
        return self.invoke("convert", HF_NAME, "--stream", "-o", str(self.target), *self.options)

    def expect_the_same_file(self) -> str:
        """Run the command; it must write the bytes of a local conversion, and leave no other file."""
        message = expect_exit(self.run(), 0)
        assert file_names(self.target.parent) == {self.target.name}
        streamed = self.target.read_bytes()
        expect_exit(self.invoke("convert", HF_NAME, "--force", "-o", str(self.target), *self.options), 0)
        assert streamed == self.target.read_bytes()
        return message

    def weight_bytes(self) -> int:
        files = self.hub.repository(REPO).files
        return sum(len(content) for name, content in files.items() if name.endswith(".safetensors"))


@pytest.fixture
def streamed(hub: HubServer, invoke: Run, tmp_path: Path) -> StreamedCommand:
    return StreamedCommand(hub, invoke, tmp_path)


class TestSameBytes:
    @pytest.mark.parametrize(
        "write",
        [write_dense, write_moe, write_tied, write_gptq, write_gptq_in_two_files, write_gptq_with_orders_in_a_file,
         write_shuffled, write_gemm, write_gemv, write_packed_moe],
        ids=lambda write: write.__name__.removeprefix("write_"),
    )  # fmt: skip
    def test_as_a_local_conversion(self, write: Callable[[Path], object], streamed: StreamedCommand) -> None:
        streamed.publish(write)
        streamed.expect_the_same_file()

    def test_of_several_types_in_one_pass(self, streamed: StreamedCommand, tmp_path: Path) -> None:
        streamed.publish(write_dense, "--type", "q8_0,f16", "-t", "1")
        streamed.target = tmp_path / "{type}.gguf"
        expect_exit(streamed.run(), 0)
        names = ("q8_0.gguf", "f16.gguf")
        written = [(tmp_path / name).read_bytes() for name in names]
        expect_exit(streamed.invoke("convert", HF_NAME, "-o", str(streamed.target), "--force", *streamed.options), 0)
        assert written == [(tmp_path / name).read_bytes() for name in names]

    def test_the_proof_of_packed_weights_is_printed(self, streamed: StreamedCommand) -> None:
        streamed.publish(write_gptq)
        assert "packed weights with the checkpoint: largest difference 0" in streamed.expect_the_same_file()

    def test_the_proof_names_rounded_weights_of_an_interrupted_attempt(self, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "source", config=PACKED, symmetric=False)
        targets = [(tmp_path / f"{name}.gguf", file_type(name)) for name in ("q5_0", "q4_1")]
        plan = plan_conversion(Checkpoint.open(tmp_path / "source"), targets, ConversionOptions("Tiny", ""))
        exact, rounded = StreamedProofs(plan).results().values()  # all chunks were written earlier
        assert describe_proof(exact).startswith(f"Compared {PACKED_WEIGHTS:,} packed weights with the checkpoint: ")
        assert f"An interrupted attempt compared {PACKED_WEIGHTS:,} more." in describe_proof(rounded)

    def test_files_are_downloaded_once(self, streamed: StreamedCommand) -> None:
        streamed.publish(write_dense)
        expect_exit(streamed.run(), 0)
        assert streamed.hub.sent < streamed.weight_bytes() + 64_000


class TestSideParts:
    @pytest.mark.parametrize("write", [write_gptq, write_gptq_with_orders_in_a_file, write_packed_moe])
    def test_are_requested_once(self, write: Callable[[Path], object], tmp_path: Path) -> None:
        write(tmp_path / "source")
        plan = plan_conversion(
            Checkpoint.open(tmp_path / "source"), [(tmp_path / "x.gguf", file_type("q4_0"))], ConversionOptions()
        )
        units = build_units(list(split_into_chunks(plan.job)), plan.assumptions)
        requested = [entry for _number, request in plan_requests(units) for entry in request]
        needed = [(unit, part) for unit in units for part in unit.side_parts.values()]
        assert sorted(requested, key=str) == sorted(needed, key=str)


class TestDisk:
    def test_only_the_result_is_on_the_disk(self, streamed: StreamedCommand, folders: Folders, hub: HubServer) -> None:
        streamed.publish(lambda folder: write_checkpoint(folder, config=LARGE), "--type", "q8_0")
        most = 0

        def measure(_response: Response) -> None:
            nonlocal most
            paths = [path for root in (folders.user, streamed.target.parent) for path in root.rglob("*")]
            most = max(most, sum(state.st_blocks * 512 for path in paths if (state := stat_file(path))))

        hub.always.append(measure)
        expect_exit(streamed.run(), 0)
        assert most < streamed.target.stat().st_size + 200_000

    def test_nothing_is_listed_afterwards(self, streamed: StreamedCommand, folders: Folders) -> None:
        streamed.publish(write_dense)
        expect_exit(streamed.run(), 0)
        assert list_models(streamed.invoke) == {}
        assert not [path for path in folders.hub_cache.rglob("*") if path.is_file()]

    def test_weights_that_are_here_are_not_downloaded(self, streamed: StreamedCommand, hub: HubServer) -> None:
        streamed.publish(write_dense)
        expect_exit(streamed.invoke("pull", HF_NAME), 0)
        before = hub.sent
        streamed.expect_the_same_file()
        assert hub.sent == before


def stat_file(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:  # it was renamed or deleted meanwhile
        return None


class TestFaults:
    @pytest.mark.parametrize(
        ("write", "faults"),
        [
            (write_dense, [cut(0), cut(20_000), refuse(503, "0.1")]),
            pytest.param(write_gptq, [cut(70_000), refuse(429, "0.1")], marks=pytest.mark.slow),
        ],
        ids=["dense", "gptq"],
    )
    def test_a_failing_hub_is_asked_again(
        self, write: Callable[[Path], object], faults: list[Any], streamed: StreamedCommand, hub: HubServer
    ) -> None:
        streamed.publish(write)
        hub.faults = [only_on(".safetensors", fault) for fault in faults]
        hub.faults[:0] = [lambda _response: None] * (len(hub.repository(REPO).files) + 2)  # documents and headers
        streamed.expect_the_same_file()

    def test_wrong_bytes_are_noticed_and_nothing_made_of_them_is_kept(
        self, streamed: StreamedCommand, hub: HubServer
    ) -> None:
        streamed.publish(write_dense)
        hub.always.append(corrupt_middle)
        message = expect_exit(streamed.run(), 4)
        assert "is not the published file" in message
        assert "The work on this file is discarded" in message
        assert not streamed.target.exists()
        hub.always.clear()
        streamed.expect_the_same_file()

    def test_a_part_that_differs_when_it_is_requested_again_is_noticed(
        self, streamed: StreamedCommand, hub: HubServer
    ) -> None:
        streamed.publish(write_gptq)
        floats = min(t.offset for t in read_tensors(streamed.source / WEIGHTS) if t.dtype == "F16")

        def corrupt_scales(response: Response) -> None:
            if response.path.endswith(WEIGHTS) and response.start >= floats:
                response.body = bytes(len(response.body))

        hub.always.append(corrupt_scales)
        message = expect_exit(streamed.run(), 4)
        assert "were different when they were downloaded a second time" in message
        hub.always.clear()
        streamed.expect_the_same_file()

    def test_a_journal_that_cannot_be_written_ends_the_command(
        self, streamed: StreamedCommand, hub: HubServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_arguments: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        streamed.publish(write_gptq)
        monkeypatch.setattr(JournalAppender, "append", fail)
        assert "disk" in expect_exit(streamed.run(), 6).lower()

    def test_a_hub_without_ranges_is_refused(self, streamed: StreamedCommand, hub: HubServer) -> None:
        streamed.publish(lambda folder: write_checkpoint(folder, config=SMALL))
        hub.always.append(only_on(WEIGHTS, whole_file(hub.repository(REPO).files[WEIGHTS])))
        assert "sends whole files only" in expect_exit(streamed.run(), 4)

    def test_a_hub_that_stops_sending_ranges_is_refused(self, streamed: StreamedCommand, hub: HubServer) -> None:
        streamed.publish(lambda folder: write_checkpoint(folder, config=LARGE))
        content = hub.repository(REPO).files[WEIGHTS]

        def send_all(response: Response) -> None:
            if len(response.body) > 1 << 20:
                whole_file(content)(response)

        hub.always.append(only_on(WEIGHTS, send_all))
        assert "it only sends whole files" in expect_exit(streamed.run(), 4)

    def test_a_full_disk_is_noticed_before_the_first_weight(
        self, streamed: StreamedCommand, hub: HubServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        streamed.publish(write_dense)
        usage = shutil.disk_usage(streamed.source)._replace(free=100_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
        assert "disk" in expect_exit(streamed.run(), 6).lower()
        assert hub.sent < streamed.weight_bytes() // 2


def corrupt_middle(response: Response) -> None:
    if response.path.endswith(".safetensors") and len(response.body) > 20_000:
        middle = len(response.body) // 2
        response.body = response.body[:middle] + b"\x01" + response.body[middle + 1 :]


class TestAssumptions:
    def expect_contradiction(self, streamed: StreamedCommand, text: str) -> None:
        result = streamed.run()
        message = expect_exit(result, 5)
        assert text in message
        assert not streamed.target.parent.exists() or file_names(streamed.target.parent) == set()

    def test_a_bias_that_is_not_zero(self, streamed: StreamedCommand) -> None:
        def write(folder: Path) -> None:
            write_packed_checkpoint(folder, config=PACKED, zero_biases=True)
            change_tensor(folder, "model.layers.1.mlp.up_proj.bias", lambda values: values + 1, numpy.float16)

        streamed.publish(write)
        self.expect_contradiction(streamed, "is not zero")

    def test_an_output_matrix_that_differs_from_the_embeddings_between_the_samples(
        self, streamed: StreamedCommand
    ) -> None:
        def write(folder: Path) -> None:
            config = {**LARGE, "num_hidden_layers": 1, "tie_word_embeddings": True}
            write_checkpoint(folder, config=config, store_tied_head=True)
            set_weights(folder, "lm_head.weight", 700, 0.5)

        streamed.publish(write)
        self.expect_contradiction(streamed, "Convert it without --stream")

    def test_an_output_matrix_in_a_file_of_its_own(self, streamed: StreamedCommand) -> None:
        def write(folder: Path) -> None:
            config = {**LARGE, "num_hidden_layers": 1, "tie_word_embeddings": True}
            write_checkpoint(folder, config=config, store_tied_head=True)
            set_weights(folder, "lm_head.weight", 700, 0.5)
            split_file(folder, lambda name: name != "lm_head.weight")

        streamed.publish(write)
        self.expect_contradiction(streamed, "Convert it without --stream")

    def test_an_output_matrix_that_differs_from_the_embeddings_in_a_sample(self, streamed: StreamedCommand) -> None:
        def write(folder: Path) -> None:
            write_tied(folder)
            set_weights(folder, "lm_head.weight", 0, 0.5)

        streamed.publish(write)
        assert "differs from them and is used" in streamed.expect_the_same_file()

    @pytest.mark.parametrize(
        ("tensor", "change", "text"),
        [
            ("qzeros", lambda values: values ^ 0x00000110, "does not have the zero points"),
            ("g_idx", lambda values: values[::-1], "is not in the order"),
        ],
    )
    def test_a_matrix_that_is_packed_unlike_the_first(
        self, tensor: str, change: Any, text: str, streamed: StreamedCommand
    ) -> None:
        def write(folder: Path) -> None:
            write_packed_checkpoint(folder, config=PACKED)
            change_tensor(folder, f"model.layers.1.mlp.down_proj.{tensor}", change)
            sort_by_type(folder)

        streamed.publish(write)
        self.expect_contradiction(streamed, text)

    def test_zero_points_unlike_those_in_config_json_are_found_in_the_first_matrix(
        self, streamed: StreamedCommand
    ) -> None:
        def write(folder: Path) -> None:
            write_packed_checkpoint(folder, config=PACKED, symmetric=False, settings={"sym": True})

        streamed.publish(write)
        streamed.expect_the_same_file()

    def test_nan_is_refused_and_nothing_is_kept(self, streamed: StreamedCommand) -> None:
        def write(folder: Path) -> None:
            write_checkpoint(folder, config=SMALL)
            set_weights(folder, "model.norm.weight", 0, numpy.nan)

        streamed.publish(write)
        self.expect_contradiction(streamed, "NaN or infinite")

    def test_packed_weights_with_nan_are_refused_and_nothing_is_kept(self, streamed: StreamedCommand) -> None:
        def write(folder: Path) -> None:
            write_packed_checkpoint(folder, config=PACKED)
            set_weights(folder, "model.layers.0.mlp.up_proj.scales", 0, numpy.nan)

        streamed.publish(write)
        self.expect_contradiction(streamed, "NaN or infinite")


@on_posix
class TestInterrupted:
    def start(self, streamed: StreamedCommand, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        command = ("convert", HF_NAME, "--stream", "-o", str(streamed.target), *streamed.options)
        return subprocess.Popen(
            [sys.executable, "-m", "qwenlocal", *command],
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def interrupt(self, streamed: StreamedCommand, environment: Mapping[str, str], how: int, lines: int = 2) -> str:
        """Stop the command once its journal has so many lines, one of which is the state of a digest."""
        journal = streamed.target.with_name("x.gguf.part.stream")
        child = self.start(streamed, environment)
        deadline = time.monotonic() + 30
        while child.poll() is None and time.monotonic() < deadline:
            states = [line for line in read_lines(journal)[1:] if line.count(" ") == 29]
            if len(states) >= lines - 1:
                break
            time.sleep(0.01)
        assert child.poll() is None, child.communicate()
        child.send_signal(how)
        try:
            return child.communicate(timeout=60)[1]
        finally:
            child.kill()

    @pytest.mark.parametrize(
        ("how", "write"),
        [(signal.SIGKILL, write_gptq), (signal.SIGINT, lambda folder: write_checkpoint(folder, config=LARGE))],
        ids=["kill", "ctrl-c"],
    )
    def test_the_same_command_continues(
        self,
        how: int,
        write: Callable[[Path], object],
        streamed: StreamedCommand,
        environment: dict[str, str],
        hub: HubServer,
    ) -> None:
        streamed.publish(write)
        size = streamed.weight_bytes()
        hub.always.append(only_on(".safetensors", pace(size / 4)))
        message = self.interrupt(streamed, environment, how)
        assert "Traceback" not in message
        hub.always.clear()
        hub.ranges.clear()
        message = expect_exit(streamed.run(), 0)
        assert "An earlier attempt had already processed" in message
        assert write is not write_gptq or f"Compared {PACKED_WEIGHTS:,} packed weights" in message
        starts = [start for start, end in hub.ranges if end - start > size // 8]
        assert starts
        assert min(starts) > size // 20
        streamed.options = ("--force", *streamed.options)
        streamed.expect_the_same_file()


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().split("\n")[:-1]
    except OSError:
        return []


@on_posix
class TestUnusableJournal:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda _text: "",
            pytest.param(lambda text: text.replace('"version": 1', '"version": 0'), marks=pytest.mark.slow),
            pytest.param(
                lambda text: text + "0 5\n9 9\n0 -1 " + "7 " * 27 + "7\n0 64 " + "9999 " * 27 + "9\n",
                marks=pytest.mark.slow,
            ),
            lambda text: text + "0 64 " + "7 " * 8 + "512 0 " + "7 " * 16 + "0 32\n",
            pytest.param(
                lambda text: "\n".join(line for line in text.split("\n") if line.count(" ") != 7),
                marks=pytest.mark.slow,
            ),
        ],
        ids=["empty", "another version", "impossible numbers", "a wrong state", "no digests of parts"],
    )
    def test_gives_the_same_file(self, damage: Callable[[str], str], streamed: StreamedCommand, hub: HubServer) -> None:
        streamed.publish(write_gptq)
        content = hub.repository(REPO).files[WEIGHTS]
        hub.always.append(only_on(WEIGHTS, cut_from(len(content) - 50_000)))
        expect_exit(streamed.run(), 4)
        hub.always.clear()
        journal = streamed.target.with_name("x.gguf.part.stream")
        journal.write_text(damage(journal.read_text()))
        assert streamed.run().returncode in (0, 4), "4 if the state was wrong; the next attempt starts again"
        streamed.options = ("--force", *streamed.options)
        streamed.expect_the_same_file()

    def test_without_openssl_only_whole_files_are_kept(
        self, streamed: StreamedCommand, hub: HubServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(resumable_hash, "_load_openssl", lambda: None)
        streamed.publish(write_dense)
        hub.always.append(only_on("00003-of", lambda response: len(response.body) > 5000 and refuse(404)(response)))
        expect_exit(streamed.run(), 4)
        hub.always.clear()
        assert "An earlier attempt had already processed" in streamed.expect_the_same_file()


def cut_from(offset: int) -> Callable[[Response], None]:
    """Refuse everything behind `offset`, but not the parts that are requested on their own."""

    def fault(response: Response) -> None:
        if response.start <= offset < response.start + len(response.body) and len(response.body) > 400_000:
            response.cut = offset - response.start
        elif response.start == offset:
            response.status, response.body = 404, b"no"

    return fault


class TestUsage:
    def test_a_checkpoint_on_this_disk_is_refused(self, tiny_checkpoint: Path, invoke: Run) -> None:
        message = expect_exit(invoke("convert", str(tiny_checkpoint), "--stream"), 2)
        assert "is on this disk" in message

    @pytest.mark.parametrize("options", [("--mix", "best"), ("--merge", "adapter")])
    def test_options_that_need_all_weights_are_refused(
        self, options: tuple[str, str], hub_checkpoint: str, invoke: Run
    ) -> None:
        message = expect_exit(invoke("convert", hub_checkpoint, "--stream", *options), 2)
        assert "--stream cannot be used with" in message

    def test_a_preview_is_that_of_the_local_checkpoint(self, streamed: StreamedCommand) -> None:
        streamed.publish(write_gptq)
        streamed.options = ("--dry-run", "--json")
        preview = streamed.run()
        expect_exit(preview, 0)
        expect_exit(streamed.invoke("pull", HF_NAME), 0)
        local = streamed.invoke("convert", HF_NAME, *streamed.options, "-o", str(streamed.target))
        assert parse_plan(preview.stdout)["files"] == parse_plan(local.stdout)["files"]


class TestResumableSha256:
    @settings(fuzz, max_examples=30)
    @given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=4))
    def test_is_that_of_hashlib(self, data: bytes, cuts: list[int]) -> None:
        digest, begin = ResumableSha256(), 0
        for end in (*sorted(cuts), len(data)):
            digest.update(memoryview(bytearray(data[begin:end])))
            digest, begin = ResumableSha256(digest.state), max(begin, min(end, len(data)))
        assert digest.hexdigest() == hashlib.sha256(data).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_matrices_of_a_7b_take_less_than_300_mb_of_memory(
    streamed: StreamedCommand, environment: dict[str, str]
) -> None:
    config = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1}
    streamed.publish(lambda folder: write_packed_checkpoint(folder, config=config))
    command = ("convert", HF_NAME, "--stream", "-o", str(streamed.target), "-t", "2")
    child = subprocess.Popen([sys.executable, "-m", "qwenlocal", *command], env=environment)
    most, deadline = 0, time.monotonic() + 120
    while child.poll() is None:
        if time.monotonic() > deadline:
            child.kill()
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            most = max(most, int(next(line for line in lines if line.startswith("VmHWM")).split()[1]))
        time.sleep(0.01)
    assert child.returncode == 0
    assert 0 < most * 1024 < 300e6
