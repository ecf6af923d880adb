"""Interrupted conversions: kill -9, Ctrl-C, and resuming from a part file and a journal."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
from checkpoint_files import UNALIGNED, file_names, plan_job, set_weights
from conftest import Run
from fuzzing import fuzz
from hypothesis import given, settings
from hypothesis import strategies as st
from interruptions import (
    SLOW_TYPE,
    count_chunks,
    expect_interrupted,
    interrupt_conversion,
    on_posix,
    signal_after,
    start_conversion,
    stop_before_rename,
)

from qwenlocal.errors import BadWeights, Interrupted
from qwenlocal.resumable import journal_path, part_path
from qwenlocal.testing import write_checkpoint
from qwenlocal.weights import CONVERTER_VERSION
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import ConversionOptions, plan_conversion
from qwenlocal.weights.file_types import file_type
from qwenlocal.weights.gguf_reader import read_header
from qwenlocal.weights.source_files import SourceFiles
from qwenlocal.weights.write_job import WriteJob
from qwenlocal.weights.write_workers import WriteResult, run_job


@on_posix
class TestKilled:
    @pytest.mark.parametrize("after", [1, 6, 15])
    def test_the_next_attempt_finishes_the_same_file(
        self, after: int, large_checkpoint: Path, large_gguf: bytes, slow_output: Path
    ) -> None:
        signal_after(start_conversion(large_checkpoint, slow_output), slow_output, after)
        assert not slow_output.exists()
        assert {part_path(slow_output).name, journal_path(slow_output).name} <= file_names(slow_output.parent)
        job = plan_job(large_checkpoint, slow_output)
        assert 0 < run_job(job, threads=2).resumed < job.read_bytes
        assert slow_output.read_bytes() == large_gguf
        assert file_names(slow_output.parent) == {slow_output.name}, "nothing is left behind"

    def test_several_kills_in_a_row_still_give_the_same_file(
        self, large_checkpoint: Path, large_gguf: bytes, slow_output: Path
    ) -> None:
        for after in (2, 5, 9):
            signal_after(start_conversion(large_checkpoint, slow_output), slow_output, after)
            assert not slow_output.exists()
        run_job(plan_job(large_checkpoint, slow_output), threads=2)
        assert slow_output.read_bytes() == large_gguf

    def test_two_outputs_of_one_conversion_are_both_finished(
        self, large_checkpoint: Path, large_gguf: bytes, slow_output: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "x.q8_0.gguf"
        signal_after(start_conversion(large_checkpoint, slow_output, other), slow_output, 6)
        assert not slow_output.exists()
        assert not other.exists()
        assert run_job(plan_job(large_checkpoint, slow_output, other), threads=2).resumed
        alone = tmp_path / "alone.q8_0.gguf"
        run_job(plan_job(large_checkpoint, alone), threads=2)
        assert slow_output.read_bytes() == large_gguf
        assert other.read_bytes() == alone.read_bytes()
        assert file_names(tmp_path) == {slow_output.name, other.name, alone.name}

    def test_a_file_to_be_replaced_stays_until_the_new_one_is_complete(
        self, large_checkpoint: Path, large_gguf: bytes, slow_output: Path
    ) -> None:
        slow_output.write_bytes(b"old")
        signal_after(start_conversion(large_checkpoint, slow_output, replace="replace"), slow_output, 3)
        assert slow_output.read_bytes() == b"old"
        run_job(plan_job(large_checkpoint, slow_output), threads=2, replace=True)
        assert slow_output.read_bytes() == large_gguf


class StalledFiles(SourceFiles):
    """Files whose first bytes cannot be read, while other threads wait for bytes that do not come until `stop`."""

    def __init__(self, job: WriteJob) -> None:
        super().__init__(path for rows in job.ranges for path in rows.source.files)
        self._numbers, self._is_stopped = itertools.count(), threading.Event()
        self.was_stopped = True

    def read(self, path: Path, buffer: memoryview, offset: int) -> None:
        if next(self._numbers):
            self.was_stopped = self._is_stopped.wait(5) and self.was_stopped
        raise BadWeights(path, "it cannot be read")

    def stop(self) -> None:
        self._is_stopped.set()


def test_a_failure_ends_the_wait_of_other_threads(large_checkpoint: Path, tmp_path: Path) -> None:
    job = plan_job(large_checkpoint, tmp_path / "x.q8_0.gguf")
    files = StalledFiles(job)
    with pytest.raises(BadWeights, match="it cannot be read"):
        run_job(job, threads=3, sources=files)
    assert files.was_stopped


@on_posix
class TestCtrlC:
    def test_the_same_command_continues_the_conversion(
        self, large_checkpoint: Path, environment: dict[str, str], tmp_path: Path, qwenlocal: Run
    ) -> None:
        target = tmp_path / "x.gguf"
        command = ("convert", str(large_checkpoint), "-o", str(target), "--type", SLOW_TYPE, "-t", "1")
        child = subprocess.Popen(
            [sys.executable, "-m", "qwenlocal", *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        message = signal_after(child, target, 3, signal.SIGINT)
        assert child.returncode == 130
        assert "Traceback" not in message
        assert "Finished work is kept" in message
        assert not target.exists()
        second = qwenlocal(*command)
        assert second.returncode == 0, second.stderr
        assert "An earlier attempt had already processed" in second.stderr
        run_job(
            plan_conversion(Checkpoint.open(large_checkpoint), [(tmp_path / "y.gguf", file_type(SLOW_TYPE))]).job,
            threads=2,
        )
        assert target.read_bytes() == (tmp_path / "y.gguf").read_bytes()

    def test_finished_chunks_are_kept(self, large_checkpoint: Path, large_gguf: bytes, slow_output: Path) -> None:
        def stop(_done: int, _all: int) -> None:
            raise KeyboardInterrupt

        job = plan_job(large_checkpoint, slow_output)
        with expect_interrupted():
            run_job(job, threads=1, report=stop)
        assert 0 < run_job(job, threads=2).resumed < job.read_bytes
        assert slow_output.read_bytes() == large_gguf

    @pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="the wait for the disk has another name there")
    def test_an_interrupt_during_fdatasync_keeps_all_chunks(
        self, unaligned_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(_file: int) -> None:
            raise KeyboardInterrupt

        job = plan_job(unaligned_checkpoint, tmp_path / "x.q8_0.gguf")
        with monkeypatch.context() as patched, expect_interrupted():
            patched.setattr(os, "fdatasync", stop)
            run_job(job, threads=1)
        assert not job.outputs[0].path.exists()
        assert run_job(job, threads=1) == WriteResult(0, job.read_bytes)


class Leftover(NamedTuple):
    """A conversion that was interrupted just before the file got its name, and the complete file."""

    job: WriteJob
    folder: Path
    part: bytes
    journal: bytes
    good: bytes

    @property
    def target(self) -> Path:
        return self.job.outputs[0].path

    def put(self) -> None:
        """Restore the part file and the journal of the interruption."""
        self.target.unlink(missing_ok=True)
        part_path(self.target).write_bytes(self.part)
        journal_path(self.target).write_bytes(self.journal)

    def finish(self) -> WriteResult:
        """Continue the conversion; the result must be the complete file."""
        written = run_job(self.job, threads=1)
        assert self.target.read_bytes() == self.good
        assert file_names(self.folder) == {self.target.name}
        return written


@pytest.fixture(scope="module")
def leftover(unaligned_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Leftover:
    folder = tmp_path_factory.mktemp("leftover")
    job = plan_job(unaligned_checkpoint, folder / "x.q8_0.gguf")
    target = job.outputs[0].path
    interrupt_conversion(job)
    part, journal = part_path(target).read_bytes(), journal_path(target).read_bytes()
    run_job(job, threads=1)
    return Leftover(job, folder, part, journal, target.read_bytes())


class TestPartFiles:
    def test_a_complete_part_file_is_not_computed_again(self, leftover: Leftover) -> None:
        leftover.put()
        assert leftover.finish().resumed == leftover.job.read_bytes

    def test_a_damaged_tensor_is_computed_again(self, leftover: Leftover) -> None:
        header = read_header(leftover.target)
        for tensor in header.tensors:
            leftover.put()
            with part_path(leftover.target).open("r+b") as file:
                file.seek(tensor.offset)
                file.write(b"\xa5\x5a")
            assert leftover.finish().resumed < leftover.job.read_bytes

    def test_damaged_padding_is_repaired(self, leftover: Leftover) -> None:
        header = read_header(leftover.target)
        begin = header.data_offset
        damaged = bytearray(leftover.part[:begin] + b"\xa5" * (len(leftover.part) - begin))
        for tensor in header.tensors:
            at, end = tensor.offset, tensor.offset + tensor.size
            damaged[at:end] = leftover.part[at:end]
        assert bytes(damaged) != leftover.part, "the file has padding"
        leftover.put()
        part_path(leftover.target).write_bytes(damaged)
        leftover.finish()

    @settings(fuzz, max_examples=40)
    @given(where=st.floats(0, 1, exclude_max=True), value=st.binary(min_size=1, max_size=64))
    def test_any_damaged_bytes_are_repaired(self, where: float, value: bytes, leftover: Leftover) -> None:
        at = int(where * len(leftover.part))
        damaged = bytearray(leftover.part)
        damaged[at : at + len(value)] = value
        leftover.put()
        part_path(leftover.target).write_bytes(damaged)
        leftover.finish()

    @pytest.mark.parametrize("size", [0, 1, 1000, -1000, -1])
    def test_a_truncated_part_file_is_completed(self, size: int, leftover: Leftover) -> None:
        leftover.put()
        part_path(leftover.target).write_bytes(leftover.part[:size])
        leftover.finish()

    def test_a_part_file_that_is_too_long_is_truncated(self, leftover: Leftover) -> None:
        leftover.put()
        part_path(leftover.target).write_bytes(leftover.part + b"more")
        assert leftover.finish().resumed == leftover.job.read_bytes

    def test_a_part_file_without_journal_or_a_journal_without_part_file_starts_again(self, leftover: Leftover) -> None:
        for gone in (journal_path, part_path):
            leftover.put()
            gone(leftover.target).unlink()
            assert leftover.finish().resumed == 0


class TestJournal:
    @pytest.mark.parametrize("cut", [1, 2, 5, 9, 20])
    def test_a_truncated_last_line_is_ignored(self, cut: int, leftover: Leftover) -> None:
        leftover.put()
        journal_path(leftover.target).write_bytes(leftover.journal[:-cut])
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
    def test_a_damaged_line_is_ignored(self, line: bytes, leftover: Leftover) -> None:
        leftover.put()
        journal_path(leftover.target).write_bytes(leftover.journal + line + b"\n")
        leftover.finish()

    @pytest.mark.parametrize(
        "first", [b"", b"{", b"[]", b"5", b"null", b"{}", b'{"version": 1}', b'{"version": 1, "identity": 5}', b"\xff"]
    )
    def test_a_journal_of_another_conversion_starts_again(self, first: bytes, leftover: Leftover) -> None:
        leftover.put()
        journal_path(leftover.target).write_bytes(first + b"\n" + leftover.journal.partition(b"\n")[2])
        assert leftover.finish().resumed == 0

    @settings(fuzz, max_examples=40)
    @given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), min_size=1, max_size=4))
    def test_any_damaged_journal_gives_the_same_file(
        self, edits: list[tuple[float, bytes]], leftover: Leftover
    ) -> None:
        journal = bytearray(leftover.journal)
        for where, data in edits:
            at = int(where * len(journal))
            journal[at : at + len(data) + 1] = data
        leftover.put()
        journal_path(leftover.target).write_bytes(journal)
        leftover.finish()


class TestChangedConversions:
    def test_another_converter_version_starts_again(
        self, unaligned_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "x.q8_0.gguf"
        with monkeypatch.context() as patched:
            stop_before_rename(patched)
            with pytest.raises(Interrupted):
                run_job(plan_job(unaligned_checkpoint, target), threads=1)
        assert count_chunks(target)
        monkeypatch.setattr("qwenlocal.weights.CONVERTER_VERSION", CONVERTER_VERSION + 1)
        assert run_job(plan_job(unaligned_checkpoint, target), threads=1).resumed == 0

    def test_a_changed_source_starts_again(self, tmp_path: Path) -> None:
        source, target = write_checkpoint(tmp_path / "a", config=UNALIGNED), tmp_path / "out" / "x.q8_0.gguf"
        interrupt_conversion(plan_job(source, target))
        write_checkpoint(source, config=UNALIGNED, seed=1)
        os.utime(source / "model.safetensors", ns=(10**18, 10**18))
        assert run_job(plan_job(source, target), threads=1).resumed == 0
        run_job(plan_job(source, target.with_name("y.q8_0.gguf")), threads=1)
        assert target.read_bytes() == target.with_name("y.q8_0.gguf").read_bytes()

    @pytest.mark.parametrize("how", ["overwritten", "replaced", "one tensor overwritten"])
    def test_a_changed_source_of_the_same_size_and_time_starts_again(self, how: str, tmp_path: Path) -> None:
        source, target = write_checkpoint(tmp_path / "a", config=UNALIGNED), tmp_path / "out" / "x.q8_0.gguf"
        path = source / "model.safetensors"
        interrupt_conversion(plan_job(source, target))
        state = path.stat()
        other = write_checkpoint(tmp_path / "b", config=UNALIGNED, seed=1) / "model.safetensors"
        if how == "replaced":
            other.replace(path)
        elif how == "overwritten":
            path.write_bytes(other.read_bytes())
        else:
            set_weights(source, "model.norm.weight", 0, 3.0)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
        assert run_job(plan_job(source, target), threads=1).resumed == 0
        run_job(plan_job(source, target.with_name("y.q8_0.gguf")), threads=1)
        assert target.read_bytes() == target.with_name("y.q8_0.gguf").read_bytes()

    def test_a_source_that_is_overwritten_during_the_conversion_is_refused(self, tmp_path: Path) -> None:
        source, target = write_checkpoint(tmp_path / "a", config=UNALIGNED), tmp_path / "x.q8_0.gguf"

        def overwrite(_done: int, _all: int) -> None:
            set_weights(source, "model.norm.weight", 0, 3.0)

        with pytest.raises(BadWeights, match="it was changed while it was read") as caught:
            run_job(plan_job(source, target), threads=1, report=overwrite)
        assert "same command again" in caught.value.hint
        assert not target.exists()
        assert run_job(plan_job(source, target), threads=1).resumed == 0

    @on_posix
    @pytest.mark.parametrize("how", ["deleted", "replaced"])
    def test_a_source_that_is_deleted_or_replaced_during_the_conversion_is_read_to_its_end(
        self, how: str, tmp_path: Path
    ) -> None:
        source, target = write_checkpoint(tmp_path / "a", config=UNALIGNED), tmp_path / "x.q8_0.gguf"
        job, path = plan_job(source, target), source / "model.safetensors"
        run_job(plan_job(source, tmp_path / "y.q8_0.gguf"), threads=1)

        def change(_done: int, _all: int) -> None:
            path.unlink(missing_ok=True)
            if how == "replaced":
                path.write_bytes(b"other")

        run_job(job, threads=1, report=change)
        assert target.read_bytes() == (tmp_path / "y.q8_0.gguf").read_bytes()

    @pytest.mark.parametrize("change", ["another type", "another name of the model"])
    def test_another_type_or_name_starts_again(self, change: str, unaligned_checkpoint: Path, tmp_path: Path) -> None:
        target = tmp_path / "x.q8_0.gguf"
        interrupt_conversion(plan_job(unaligned_checkpoint, target))
        kind = file_type("q4_0" if change == "another type" else "q8_0")
        options = ConversionOptions(name="tiny" if change == "another type" else "other")
        job = plan_conversion(Checkpoint.open(unaligned_checkpoint), [(target, kind)], options).job
        assert run_job(job, threads=1).resumed == 0

    def test_nan_allowed_in_an_earlier_attempt_is_refused_without_the_option(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "model", config=UNALIGNED)
        set_weights(source, "lm_head.weight", 5, numpy.nan)
        job = plan_job(source, tmp_path / "x.q8_0.gguf")
        interrupt_conversion(job, allow_nan=True)
        with pytest.raises(BadWeights, match="NaN or infinite"):
            run_job(job, threads=1)

    def test_nan_zeroed_by_an_earlier_attempt_is_counted(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "model", config=UNALIGNED)
        set_weights(source, "lm_head.weight", 5, numpy.nan)
        job = plan_job(source, tmp_path / "x.q8_0.gguf")
        interrupt_conversion(job, allow_nan=True)
        assert run_job(job, threads=1, allow_nan=True) == WriteResult(1, job.read_bytes)
