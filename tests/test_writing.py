"""Writing GGUF files: kill -9, Ctrl-C, full disks, damaged leftovers, and weights that must not be written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy
import pytest
from conftest import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import data_of

from qwenlocal.errors import BadWeights, CannotWrite, DiskFull, Interrupted, NotFinite, OutputExists, QwenlocalError
from qwenlocal.fileio import start_writeback
from qwenlocal.testing import MOE_CONFIG, as_dtype, write_checkpoint
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.convert import Options, plan_conversion
from qwenlocal.weights.edition import EDITION
from qwenlocal.weights.header import read_header, tensor_bytes
from qwenlocal.weights.mix import file_type
from qwenlocal.weights.writing import Job, Written, carry_out, journal_of, memory_needed, part_of

on_posix = pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
quickly = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

# About two seconds of work for one thread, in 30 slabs: time enough to be interrupted in the middle.
LARGE = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 3072}
SLOW = "iq3_s"
# Rows of 36 numbers, so that there are gaps between the tensors.
SMALL = {"hidden_size": 36, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}

CONVERT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_writing import job_of
from qwenlocal.weights.writing import carry_out
source, targets, replace = Path(sys.argv[2]), [Path(text) for text in sys.argv[3].split(",")], sys.argv[4] == "replace"
print(carry_out(job_of(source, *targets), threads=1, replace=replace).resumed)
"""


def job_of(source: Path, *targets: Path) -> Job:
    """Write `source` to files that are named after their types: "x.q8_0.gguf"."""
    wanted = [(target, file_type(target.suffixes[-2][1:])) for target in targets]
    return plan_conversion(Checkpoint.open(source), wanted, Options(name="tiny")).job


def stop() -> None:
    raise KeyboardInterrupt


def done(target: Path) -> int:
    """Slabs that the journal speaks of."""
    try:
        return journal_of(target).read_text().count("\n") - 1
    except OSError:
        return 0


def started(source: Path, *targets: Path, replace: str = "") -> subprocess.Popen[str]:
    """Another process that writes."""
    arguments = [str(Path(__file__).parent), str(source), ",".join(map(str, targets)), replace]
    return subprocess.Popen(
        [sys.executable, "-c", CONVERT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stopped(child: subprocess.Popen[str], target: Path, after: int, how: int = signal.SIGKILL) -> str:
    """Wait until so many slabs are done, and send a signal; returns what it said on stderr."""
    while done(target) < after and child.poll() is None:
        time.sleep(0.002)
    assert child.poll() is None, "it was done before it could be stopped"
    child.send_signal(how)
    return child.communicate(timeout=60)[1]


def interrupted(job: Job, **options: Any) -> None:
    """Ctrl-C at the first report: at least one slab is done by then, of a small job all."""

    def stop(_done: int, _all: int) -> None:
        raise KeyboardInterrupt

    with contextlib.suppress(Interrupted, KeyboardInterrupt):
        carry_out(job, threads=1, report=stop, **options)
    assert part_of(job.outputs[0].path).exists()


@contextlib.contextmanager
def ctrl_c() -> Iterator[None]:
    """What is interrupted in here says that what was done is kept."""
    try:
        yield
    except Interrupted as stop:
        assert "kept" in stop.hint
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C was not caught")
    else:
        pytest.fail("Ctrl-C was swallowed")


def inside(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("large") / "tiny", config=LARGE)


@pytest.fixture(scope="module")
def whole(large: Path) -> bytes:
    """What comes of it without an interruption."""
    target = large.parent / f"whole.{SLOW}.gguf"
    carry_out(job_of(large, target), threads=2)
    return target.read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("small") / "tiny", config=SMALL)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / f"x.{SLOW}.gguf"


# --- killed


@on_posix
class TestKilled:
    @pytest.mark.parametrize("after", [1, 6, 15])
    def test_in_the_middle_there_is_no_file_yet_and_the_next_attempt_finishes_the_same_one(
        self, after: int, large: Path, whole: bytes, target: Path
    ) -> None:
        stopped(started(large, target), target, after)
        assert not target.exists()
        assert {part_of(target).name, journal_of(target).name} <= inside(target.parent)
        job = job_of(large, target)
        assert 0 < carry_out(job, threads=2).resumed < job.read_bytes
        assert target.read_bytes() == whole
        assert inside(target.parent) == {target.name}, "nothing is left behind"

    def test_again_and_again_it_still_gets_there(self, large: Path, whole: bytes, target: Path) -> None:
        for after in (2, 5, 9):
            stopped(started(large, target), target, after)
            assert not target.exists()
        carry_out(job_of(large, target), threads=2)
        assert target.read_bytes() == whole

    def test_while_two_files_are_written_both_come_out_the_same(
        self, large: Path, whole: bytes, target: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "x.q8_0.gguf"
        stopped(started(large, target, other), target, 6)
        assert not target.exists()
        assert not other.exists()
        assert carry_out(job_of(large, target, other), threads=2).resumed
        alone = tmp_path / "alone.q8_0.gguf"
        carry_out(job_of(large, alone), threads=2)
        assert target.read_bytes() == whole
        assert other.read_bytes() == alone.read_bytes()
        assert inside(tmp_path) == {target.name, other.name, alone.name}

    def test_while_a_file_is_replaced_the_old_one_is_still_there(self, large: Path, whole: bytes, target: Path) -> None:
        target.write_bytes(b"old")
        stopped(started(large, target, replace="replace"), target, 3)
        assert target.read_bytes() == b"old"
        carry_out(job_of(large, target), threads=2, replace=True)
        assert target.read_bytes() == whole


# --- Ctrl-C


@on_posix
class TestCtrlC:
    def test_ends_the_command_and_the_same_command_goes_on_from_there(
        self, large: Path, environment: dict[str, str], tmp_path: Path, qwenlocal: Run
    ) -> None:
        target = tmp_path / "x.gguf"
        command = ("convert", str(large), "-o", str(target), "--type", SLOW, "-t", "1")
        child = subprocess.Popen(
            [sys.executable, "-m", "qwenlocal", *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        said = stopped(child, target, 3, signal.SIGINT)
        assert child.returncode == 130
        assert "Traceback" not in said
        assert "What was done is kept" in said
        assert not target.exists()
        again = qwenlocal(*command)
        assert again.returncode == 0, again.stderr
        assert "An earlier attempt had done" in again.stderr
        carry_out(plan_conversion(Checkpoint.open(large), [(tmp_path / "y.gguf", file_type(SLOW))]).job, threads=2)
        assert target.read_bytes() == (tmp_path / "y.gguf").read_bytes()

    def test_keeps_all_that_was_done(self, large: Path, whole: bytes, target: Path) -> None:
        def stop(_done: int, _all: int) -> None:
            raise KeyboardInterrupt

        job = job_of(large, target)
        with ctrl_c():
            carry_out(job, threads=1, report=stop)
        assert 0 < carry_out(job, threads=2).resumed < job.read_bytes
        assert target.read_bytes() == whole

    @pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="the wait for the disk has another name there")
    def test_while_the_disk_is_waited_for_keeps_all_of_it(
        self, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(_file: int) -> None:
            raise KeyboardInterrupt

        job = job_of(small, tmp_path / "x.q8_0.gguf")
        with monkeypatch.context() as patched, ctrl_c():
            patched.setattr(os, "fdatasync", stop)
            carry_out(job, threads=1)
        assert not job.outputs[0].path.exists()
        assert carry_out(job, threads=1) == Written(0, job.read_bytes)


# --- what an earlier attempt left


class Leftover(NamedTuple):
    """A small file that was interrupted just before it got its name, and what it should be."""

    job: Job
    folder: Path
    part: bytes
    journal: bytes
    good: bytes

    @property
    def target(self) -> Path:
        return self.job.outputs[0].path

    def put(self) -> None:
        """As it was after the interruption."""
        self.target.unlink(missing_ok=True)
        part_of(self.target).write_bytes(self.part)
        journal_of(self.target).write_bytes(self.journal)

    def finish(self) -> Written:
        """Go on; the result must be what it always is, whatever was left."""
        written = carry_out(self.job, threads=1)
        assert self.target.read_bytes() == self.good
        assert inside(self.folder) == {self.target.name}
        return written


@pytest.fixture(scope="module")
def leftover(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Leftover:
    folder = tmp_path_factory.mktemp("leftover")
    job = job_of(small, folder / "x.q8_0.gguf")
    target = job.outputs[0].path
    interrupted(job)
    part, journal = part_of(target).read_bytes(), journal_of(target).read_bytes()
    carry_out(job, threads=1)
    return Leftover(job, folder, part, journal, target.read_bytes())


class TestLeftovers:
    def test_of_another_edition_are_not_gone_on_with(
        self, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "x.q8_0.gguf"
        with monkeypatch.context() as patched:
            patched.setattr("qwenlocal.weights.writing._Run._publish", lambda *_: stop())
            with pytest.raises(Interrupted):
                carry_out(job_of(small, target), threads=1)
        assert done(target)
        monkeypatch.setattr("qwenlocal.weights.edition.EDITION", EDITION + 1)
        assert carry_out(job_of(small, target), threads=1).resumed == 0

    def test_what_is_whole_is_not_made_again(self, leftover: Leftover) -> None:
        leftover.put()
        assert leftover.finish().resumed == leftover.job.read_bytes

    def test_every_damaged_tensor_is_noticed_and_made_again(self, leftover: Leftover) -> None:
        header = read_header(leftover.target)
        for tensor in header.tensors:
            leftover.put()
            with part_of(leftover.target).open("r+b") as file:
                file.seek(header.data_offset + tensor.offset)
                file.write(b"\xa5\x5a")
            assert leftover.finish().resumed < leftover.job.read_bytes

    def test_damage_between_the_tensors_is_made_good(self, leftover: Leftover) -> None:
        header = read_header(leftover.target)
        begin = header.data_offset
        damaged = bytearray(leftover.part[:begin] + b"\xa5" * (len(leftover.part) - begin))
        for tensor in header.tensors:
            at, size = begin + tensor.offset, tensor_bytes(tensor) or 0
            damaged[at : at + size] = leftover.part[at : at + size]
        assert bytes(damaged) != leftover.part, "there are such bytes"
        leftover.put()
        part_of(leftover.target).write_bytes(damaged)
        leftover.finish()

    @quickly
    @given(where=st.floats(0, 1, exclude_max=True), value=st.binary(min_size=1, max_size=64))
    def test_whichever_bytes_are_damaged_the_result_is_the_same(
        self, where: float, value: bytes, leftover: Leftover
    ) -> None:
        at = int(where * len(leftover.part))
        damaged = bytearray(leftover.part)
        damaged[at : at + len(value)] = value
        leftover.put()
        part_of(leftover.target).write_bytes(damaged)
        leftover.finish()

    @pytest.mark.parametrize("size", [0, 1, 1000, -1000, -1])
    def test_a_part_that_was_cut_is_made_whole(self, size: int, leftover: Leftover) -> None:
        leftover.put()
        part_of(leftover.target).write_bytes(leftover.part[:size])
        leftover.finish()

    def test_a_part_that_is_longer_than_it_should_be_is_cut(self, leftover: Leftover) -> None:
        leftover.put()
        part_of(leftover.target).write_bytes(leftover.part + b"more")
        assert leftover.finish().resumed == leftover.job.read_bytes

    def test_a_part_without_a_journal_is_begun_anew_and_so_is_a_journal_without_a_part(
        self, leftover: Leftover
    ) -> None:
        for gone in (journal_of, part_of):
            leftover.put()
            gone(leftover.target).unlink()
            assert leftover.finish().resumed == 0

    @pytest.mark.parametrize("cut", [1, 2, 5, 9, 20])
    def test_a_torn_last_line_of_the_journal_counts_as_not_there(self, cut: int, leftover: Leftover) -> None:
        leftover.put()
        journal_of(leftover.target).write_bytes(leftover.journal[:-cut])
        assert 0 < leftover.finish().resumed < leftover.job.read_bytes

    @pytest.mark.parametrize(
        "line",
        [
            b"",
            b" ",
            b"0",
            b"0 1",
            b"0 1 0 5",
            b"-1 5 0",
            b"0 1.5 0",
            b"a b c",
            b"\xff\xfe\x00 1 2",
            b"999999 5 0",
            b"0 5 0",
            b"0 99999999999999999999 0",
            b"9" * 5000 + b" 5 0",
        ],
        ids=range(13),
    )
    def test_a_damaged_line_of_the_journal_does_no_harm(self, line: bytes, leftover: Leftover) -> None:
        leftover.put()
        journal_of(leftover.target).write_bytes(leftover.journal + line + b"\n")
        leftover.finish()

    @pytest.mark.parametrize(
        "first", [b"", b"{", b"[]", b"5", b"null", b"{}", b'{"version": 1}', b'{"version": 1, "identity": 5}', b"\xff"]
    )
    def test_a_journal_of_something_else_is_begun_anew(self, first: bytes, leftover: Leftover) -> None:
        leftover.put()
        journal_of(leftover.target).write_bytes(first + b"\n" + leftover.journal.partition(b"\n")[2])
        assert leftover.finish().resumed == 0

    @quickly
    @given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), min_size=1, max_size=4))
    def test_whatever_happens_to_the_journal_the_result_is_the_same(
        self, edits: list[tuple[float, bytes]], leftover: Leftover
    ) -> None:
        journal = bytearray(leftover.journal)
        for where, data in edits:
            at = int(where * len(journal))
            journal[at : at + len(data) + 1] = data
        leftover.put()
        journal_of(leftover.target).write_bytes(journal)
        leftover.finish()

    def test_a_source_that_was_changed_since_is_converted_from_the_beginning(self, tmp_path: Path) -> None:
        source, target = write_checkpoint(tmp_path / "a", config=SMALL), tmp_path / "out" / "x.q8_0.gguf"
        interrupted(job_of(source, target))
        write_checkpoint(source, config=SMALL, seed=1)
        os.utime(source / "model.safetensors", ns=(10**18, 10**18))
        assert carry_out(job_of(source, target), threads=1).resumed == 0
        carry_out(job_of(source, target.with_name("y.q8_0.gguf")), threads=1)
        assert target.read_bytes() == target.with_name("y.q8_0.gguf").read_bytes()

    @pytest.mark.parametrize("change", ["another type", "another name of the model"])
    def test_another_wish_is_begun_anew(self, change: str, small: Path, tmp_path: Path) -> None:
        target = tmp_path / "x.q8_0.gguf"
        interrupted(job_of(small, target))
        kind = file_type("q4_0" if change == "another type" else "q8_0")
        options = Options(name="tiny" if change == "another type" else "other")
        job = plan_conversion(Checkpoint.open(small), [(target, kind)], options).job
        assert carry_out(job, threads=1).resumed == 0

    def test_zeros_that_were_allowed_in_an_earlier_attempt_are_not_allowed_in_this_one(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "model", config=SMALL)
        poke(source, "lm_head.weight", 5, numpy.nan)
        job = job_of(source, tmp_path / "x.q8_0.gguf")
        interrupted(job, allow_nan=True)
        with pytest.raises(BadWeights, match="NaN or infinite"):
            carry_out(job, threads=1)

    def test_zeros_that_an_earlier_attempt_wrote_are_counted(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "model", config=SMALL)
        poke(source, "lm_head.weight", 5, numpy.nan)
        job = job_of(source, tmp_path / "x.q8_0.gguf")
        interrupted(job, allow_nan=True)
        assert carry_out(job, threads=1, allow_nan=True) == Written(1, job.read_bytes)


# --- files that are there


class TestFilesThatAreThere:
    def test_are_not_replaced_unless_that_is_said(self, small: Path, tmp_path: Path) -> None:
        target = tmp_path / "x.q8_0.gguf"
        target.write_bytes(b"old")
        job = job_of(small, target)
        with pytest.raises(OutputExists) as caught:
            carry_out(job, threads=1)
        assert str(target) in str(caught.value)
        assert "--force" in caught.value.hint
        assert (target.read_bytes(), inside(tmp_path)) == (b"old", {target.name})
        carry_out(job, threads=1, replace=True)
        assert read_header(target).architecture == "qwen2"
        assert inside(tmp_path) == {target.name}

    def test_of_several_files_one_is_enough_to_refuse_them_all(self, small: Path, tmp_path: Path) -> None:
        targets = tmp_path / "x.f16.gguf", tmp_path / "x.q8_0.gguf"
        targets[1].write_bytes(b"old")
        with pytest.raises(OutputExists):
            carry_out(job_of(small, *targets), threads=1)
        assert inside(tmp_path) == {targets[1].name}

    @pytest.mark.parametrize("kind", ["folder", "link into nothing"])
    def test_may_be_folders_and_links_too(self, kind: str, small: Path, tmp_path: Path) -> None:
        target = tmp_path / "x.q8_0.gguf"
        target.mkdir() if kind == "folder" else target.symlink_to(tmp_path / "nowhere")
        with pytest.raises(OutputExists):
            carry_out(job_of(small, target), threads=1)
        assert inside(tmp_path) == {target.name}

    def test_stay_if_the_new_one_fails(self, tmp_path: Path) -> None:
        source, target = write_checkpoint(tmp_path / "model", config=SMALL), tmp_path / "x.q8_0.gguf"
        poke(source, "lm_head.weight", 5, numpy.nan)
        target.write_bytes(b"old")
        with pytest.raises(BadWeights):
            carry_out(job_of(source, target), threads=1, replace=True)
        assert target.read_bytes() == b"old"

    def test_can_be_the_source_itself(self, small: Path, tmp_path: Path) -> None:
        """As in: quantize x.gguf x.gguf q8_0 --force."""
        from qwenlocal.weights.quantize import plan_quantization

        path = tmp_path / "x.f16.gguf"
        carry_out(job_of(small, path), threads=1)
        carry_out(plan_quantization(path, [(tmp_path / "other.gguf", file_type("q8_0"))]).job, threads=1)
        carry_out(plan_quantization(path, [(path, file_type("q8_0"))]).job, threads=1, replace=True)
        assert path.read_bytes() == (tmp_path / "other.gguf").read_bytes()

    @on_posix
    def test_written_by_another_process_while_the_lock_is_waited_for_are_not_replaced(
        self, small: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "x.q8_0.gguf"
        lock = filelock.FileLock(f"{part_of(target)}.lock", thread_local=False)
        lock.acquire()

        def finish() -> None:
            target.write_bytes(b"theirs")
            lock.release()

        timer = threading.Timer(0.2, finish)
        timer.start()
        with pytest.raises(OutputExists):
            carry_out(job_of(small, target), threads=1)
        timer.join()
        assert target.read_bytes() == b"theirs"

    def test_while_another_process_writes_one_nobody_else_does(self, large: Path, whole: bytes, target: Path) -> None:
        child = started(large, target)
        while not done(target) and child.poll() is None:
            time.sleep(0.002)
        with pytest.raises(QwenlocalError, match="Another qwenlocal is writing"):
            carry_out(job_of(large, target), threads=1)
        assert child.poll() is None, "the other one was still at it"
        assert child.communicate(timeout=60)[0] == "0\n"
        assert target.read_bytes() == whole
        assert inside(target.parent) == {target.name}


# --- no room, no permission

LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_writing import job_of
from qwenlocal.errors import QwenlocalError
from qwenlocal.weights.writing import carry_out
job = job_of(Path(sys.argv[2]), Path(sys.argv[3]))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    carry_out(job, threads=1)
except QwenlocalError as error:
    print(type(error).__name__, error)
"""
FULL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_writing import job_of
from qwenlocal.errors import DiskFull
from qwenlocal.weights.writing import carry_out
target = Path(sys.argv[3])
filler = target.with_name("filler")
job = job_of(Path(sys.argv[2]), target)

def fill(done, all):
    if not done:
        return
    with filler.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass

try:
    carry_out(job, threads=1, report=fill)
except DiskFull as full:
    print("full", full.needed > 0, full.free < 4096, target.exists())
filler.unlink()
print("resumed", carry_out(job, threads=2).resumed > 0)
Path(sys.argv[4]).write_bytes(target.read_bytes())
"""


def has_small_disks() -> bool:
    """Whether this user may mount a file system in memory, in a name space of its own."""
    try:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/tmp"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


class TestNoRoom:
    @pytest.mark.slow
    @pytest.mark.skipif(not has_small_disks(), reason="needs a small disk that may be filled")
    def test_a_disk_that_fills_up_meanwhile_is_said_and_what_was_done_is_kept(
        self, large: Path, whole: bytes, tmp_path: Path
    ) -> None:
        (tmp_path / "disk").mkdir()
        mount = f'mount -t tmpfs -o size={len(whole) + (1 << 20)} none {tmp_path}/disk && exec "$@"'
        code = [sys.executable, "-c", FULL, str(Path(__file__).parent), str(large), f"{tmp_path}/disk/x.{SLOW}.gguf"]
        command = ["unshare", "-rm", "sh", "-c", mount, "sh", *code, str(tmp_path / "result")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.stdout == "full True True False\nresumed True\n", result.stderr
        assert (tmp_path / "result").read_bytes() == whole

    @pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on file sizes")
    def test_a_limit_on_the_size_of_files_is_said(self, small: Path, tmp_path: Path) -> None:
        target = tmp_path / "x.f16.gguf"
        code = [sys.executable, "-c", LIMITED, str(Path(__file__).parent), str(small), str(target)]
        result = subprocess.run(code, capture_output=True, text=True, timeout=60)
        assert result.stdout.startswith("CannotWrite"), result.stderr
        assert "files of this size are not allowed there" in result.stdout
        assert not target.exists()
        carry_out(job_of(small, target), threads=1)
        assert target.exists()

    def test_too_little_room_is_said_before_anything_is_written(
        self, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = job_of(small, tmp_path / "x.f16.gguf")
        pretend_free(monkeypatch, job.outputs[0].size - 1)
        with pytest.raises(DiskFull) as caught:
            carry_out(job, threads=1)
        assert (caught.value.needed, caught.value.free) == (job.outputs[0].size, job.outputs[0].size - 1)
        assert str(tmp_path) in str(caught.value)
        pretend_free(monkeypatch, job.outputs[0].size)
        carry_out(job, threads=1)

    def test_then_nothing_is_left_behind(self, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_free(monkeypatch, 5)
        with pytest.raises(DiskFull):
            carry_out(job_of(small, tmp_path / "x.f16.gguf"), threads=1)
        assert inside(tmp_path) == set()

    def test_several_files_need_room_together(
        self, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = job_of(small, tmp_path / "x.f16.gguf", tmp_path / "x.q8_0.gguf")
        pretend_free(monkeypatch, max(output.size for output in job.outputs))
        with pytest.raises(DiskFull):
            carry_out(job, threads=1)

    def test_going_on_needs_room_only_for_what_is_missing(
        self, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = job_of(small, tmp_path / "x.f16.gguf")
        interrupted(job)
        missing = job.outputs[0].size - part_of(job.outputs[0].path).stat().st_blocks * 512
        pretend_free(monkeypatch, max(0, missing))
        assert carry_out(job, threads=1).resumed

    @pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="fsync is called there")
    def test_a_disk_that_fails_in_the_end_is_said_and_what_was_done_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = write_checkpoint(tmp_path / "model", config=LARGE)
        target = tmp_path / f"x.{SLOW}.gguf"

        def fails(file: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", fails)
            with pytest.raises(CannotWrite, match="Input/output error"):
                carry_out(job_of(source, target), threads=1)
        assert not target.exists()
        assert carry_out(job_of(source, target), threads=2).resumed == job_of(source, target).read_bytes

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no such request elsewhere")
    def test_the_disk_is_asked_to_begin_while_there_is_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = write_checkpoint(tmp_path / "model", config=LARGE)
        accepted: list[bool] = []
        monkeypatch.setattr("qwenlocal.weights.writing._TO_DISK", 1)
        monkeypatch.setattr(
            "qwenlocal.weights.writing.start_writeback", lambda file: accepted.append(start_writeback(file))
        )
        carry_out(job_of(source, tmp_path / f"x.{SLOW}.gguf"), threads=1)
        assert accepted
        assert all(accepted)
        assert not start_writeback(-1)


def pretend_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage._replace(free=free))


class TestPlaces:
    def test_a_folder_that_is_not_there_yet_is_made(self, small: Path, tmp_path: Path) -> None:
        target = tmp_path / "some" / "where" / "x.q8_0.gguf"
        carry_out(job_of(small, target), threads=1)
        assert inside(target.parent) == {target.name}

    def test_a_file_in_a_folders_place_is_refused(self, small: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(CannotWrite):
            carry_out(job_of(small, tmp_path / "file" / "x.q8_0.gguf"), threads=1)

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_may_not_be_written_is_refused(self, small: Path, tmp_path: Path) -> None:
        folder = tmp_path / "mine"
        folder.mkdir(mode=0o500)
        with pytest.raises(CannotWrite, match="permission denied"):
            carry_out(job_of(small, folder / "x.q8_0.gguf"), threads=1)
        assert inside(folder) == set()

    @pytest.mark.skipif(not has_small_disks(), reason="needs a disk that may not be written")
    def test_a_disk_that_may_not_be_written_is_refused(self, small: Path, tmp_path: Path) -> None:
        mount = f'mount -t tmpfs -o ro none {tmp_path} && exec "$@"'
        code = [sys.executable, "-c", CONVERT, str(Path(__file__).parent), str(small), f"{tmp_path}/x.q8_0.gguf", ""]
        command = ["unshare", "-rm", "sh", "-c", mount, "sh", *code]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert f"CannotWrite: {tmp_path} cannot be written" in result.stderr

    @pytest.mark.parametrize("name", [".part", ".part.journal", ".part.lock"])
    def test_folders_with_the_names_that_are_needed_meanwhile_are_said(
        self, name: str, small: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "x.q8_0.gguf"
        target.with_name(target.name + name).mkdir()
        with pytest.raises(CannotWrite, match="Is a directory"):
            carry_out(job_of(small, target), threads=1)

    def test_a_name_that_is_too_long_while_the_file_grows_is_said(self, small: Path, tmp_path: Path) -> None:
        with pytest.raises(CannotWrite, match="too long"):
            carry_out(job_of(small, tmp_path / ("x" * 240 + ".q8_0.gguf")), threads=1)


# --- the source


class TestSource:
    def test_a_file_that_became_shorter_since_it_was_planned_is_refused(self, tmp_path: Path) -> None:
        source, target = write_checkpoint(tmp_path / "model", config=SMALL), tmp_path / "x.q8_0.gguf"
        job = job_of(source, target)
        os.truncate(source / "model.safetensors", 1000 + (source / "model.safetensors").stat().st_size // 2)
        with pytest.raises(BadWeights, match="became shorter"):
            carry_out(job, threads=2)
        assert not target.exists()

    def test_a_file_that_is_gone_since_it_was_planned_is_named(self, tmp_path: Path) -> None:
        source, target = write_checkpoint(tmp_path / "model", config=SMALL), tmp_path / "x.q8_0.gguf"
        job = job_of(source, target)
        (source / "model.safetensors").unlink()
        with pytest.raises(BadWeights, match=r"model.safetensors"):
            carry_out(job, threads=2)

    def test_progress_never_goes_back_and_ends_at_the_end(self, large: Path, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        job = job_of(large, tmp_path / "x.q4_k_m.gguf")
        carry_out(job, threads=2, report=lambda count, total: seen.append((count, total)))
        assert seen == sorted(seen)
        assert seen[-1] == (job.read_bytes, job.read_bytes)
        assert {total for _, total in seen} == {job.read_bytes}

    def test_memory_is_needed_for_slabs_not_for_models(self, large: Path, tmp_path: Path) -> None:
        needed = {count: memory_needed(job_of(large, tmp_path / "x.q8_0.gguf"), count) for count in (1, 2, 3)}
        assert needed[3] - needed[2] == needed[2] - needed[1] < 6e6
        assert needed[1] < 120e6


# --- weights that must not be written


def poke(folder: Path, name: str, row: int, *values: float, dtype: str = "BF16") -> None:
    """Set numbers at the beginning of a row."""
    stored = Checkpoint.open(folder).tensors[name]
    columns = stored.shape[-1] if len(stored.shape) > 1 else 1
    with numpy.errstate(over="ignore"):
        data = as_dtype(numpy.array(values, numpy.float32), dtype)
    with stored.file.open("r+b") as file:
        file.seek(stored.offset + row * columns * stored.size // stored.elements)
        file.write(data)


MATRIX = "model.layers.0.mlp.up_proj.weight"


class TestNotNumbers:
    @pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
    @pytest.mark.parametrize("value", [numpy.nan, numpy.inf, -numpy.inf])
    @pytest.mark.parametrize("kind", ["same", "q8_0"])
    def test_are_refused_with_tensor_and_row(self, dtype: str, value: float, kind: str, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "model", config=SMALL, dtype=dtype)
        poke(source, MATRIX, 17, value, dtype=dtype)
        target = tmp_path / f"x.{dtype.lower() if kind == 'same' else kind}.gguf"
        with pytest.raises(NotFinite, match=r"“blk.0.ffn_up.weight” has weights.*NaN or infinite.*row 17$") as caught:
            carry_out(job_of(source, target), threads=2)
        assert "model.safetensors" in str(caught.value)
        assert (caught.value.tensor, caught.value.row) == ("blk.0.ffn_up.weight", 17)
        assert not list(tmp_path.glob("x.*"))  # nor what was begun: it would be met again

    def test_are_refused_in_vectors_too(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "model", config=SMALL)
        poke(source, "model.norm.weight", 0, numpy.nan)
        with pytest.raises(BadWeights, match=r"“output_norm.weight”"):
            carry_out(job_of(source, tmp_path / "x.q8_0.gguf"), threads=1)

    def test_far_down_in_a_matrix_are_refused_with_the_right_row(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "model", config={**SMALL, "hidden_size": 32, "vocab_size": 20_000})
        poke(source, "lm_head.weight", 18_765, numpy.nan)
        with pytest.raises(BadWeights, match=r"“output.weight”.* row 18,765"):
            carry_out(job_of(source, tmp_path / "x.q8_0.gguf"), threads=1)

    @pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
    def test_become_zeros_where_that_is_allowed_and_are_counted(self, dtype: str, tmp_path: Path) -> None:
        source, target = write_checkpoint(tmp_path / "model", config=SMALL, dtype=dtype), tmp_path / "x.f32.gguf"
        good = tmp_path / "good.f32.gguf"
        carry_out(job_of(source, good), threads=1)
        poke(source, MATRIX, 3, numpy.nan, 1.0, numpy.inf, dtype=dtype)
        poke(source, "model.norm.weight", 0, -numpy.inf, dtype=dtype)
        assert carry_out(job_of(source, target), threads=2, allow_nan=True).not_finite == 3
        before, after = (
            {name: numpy.frombuffer(data, numpy.float32).copy() for name, (_, data) in data_of(path).items()}
            for path in (good, target)
        )
        before["blk.0.ffn_up.weight"][3 * 36 : 3 * 36 + 3] = 0, 1, 0
        before["output_norm.weight"][0] = 0
        assert all(numpy.array_equal(before[name], after[name]) for name in before)

    def test_are_counted_once_however_many_files_they_go_into(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "model", config=SMALL)
        poke(source, MATRIX, 3, numpy.nan)
        targets = [tmp_path / f"x.{kind}.gguf" for kind in ("f32", "f16", "q8_0", "q4_0")]
        assert carry_out(job_of(source, *targets), threads=2, allow_nan=True).not_finite == 1

    def test_of_an_expert_are_refused_with_its_tensor(self, tmp_path: Path) -> None:
        config = {**MOE_CONFIG, **SMALL, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
        source = write_checkpoint(tmp_path / "model", config=config)
        poke(source, "model.layers.0.mlp.experts.2.up_proj.weight", 7, numpy.nan)
        with pytest.raises(BadWeights, match=r"“blk.0.ffn_up_exps.weight, expert 2”"):
            carry_out(job_of(source, tmp_path / "x.q8_0.gguf"), threads=2)


class TestTooLarge:
    @pytest.mark.parametrize(
        ("value", "dtype", "kind"),
        [
            (65520.0, "F32", "f16"),
            (1e6, "BF16", "f16"),
            (-1e30, "BF16", "f16"),
            (3.4e38, "F32", "bf16"),
            (1e30, "BF16", "q8_0"),
            (1e9, "BF16", "q4_0"),
        ],
    )
    def test_weights_are_refused_rather_than_made_infinite(
        self, value: float, dtype: str, kind: str, tmp_path: Path
    ) -> None:
        source, target = write_checkpoint(tmp_path / "model", config=SMALL, dtype=dtype), tmp_path / f"x.{kind}.gguf"
        name = "model.layers.0.mlp.down_proj.weight"  # rows of 64: a multiple of 32
        poke(source, name, 17, value, dtype=dtype)
        with pytest.raises(BadWeights, match=f"“blk.0.ffn_down.weight” has weights.*too large for {kind}") as caught:
            carry_out(job_of(source, target), threads=2)
        assert "bf16 or f32" in caught.value.hint
        assert not target.exists()

    @pytest.mark.parametrize(("value", "kind"), [(1e30, "bf16"), (1e30, "f32"), (65504.0, "f16"), (65000.0, "q8_0")])
    def test_weights_that_just_fit_are_written(self, value: float, kind: str, tmp_path: Path) -> None:
        source, target = write_checkpoint(tmp_path / "model", config=SMALL, dtype="F32"), tmp_path / f"x.{kind}.gguf"
        poke(source, "model.layers.0.mlp.down_proj.weight", 17, value, dtype="F32")
        assert carry_out(job_of(source, target), threads=2).not_finite == 0


def test_a_file_that_could_not_be_written_for_its_weights_is_not_begun_from_nothing_next_time(tmp_path: Path) -> None:
    """--allow-nan, which the refusal suggests, goes on from there."""
    source = write_checkpoint(tmp_path / "model", config=SMALL)
    poke(source, "lm_head.weight", 5, numpy.nan)
    job = job_of(source, tmp_path / "x.q8_0.gguf")
    with pytest.raises(BadWeights):
        carry_out(job, threads=1)
    assert carry_out(job, threads=1, allow_nan=True).not_finite == 1
    assert inside(tmp_path) == {"model", "x.q8_0.gguf"}
