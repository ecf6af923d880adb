"""Writing GGUF files: existing outputs, full disks, permissions, other writers, and sources that change."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import numpy
import pytest
from checkpoint_files import LARGE, UNALIGNED, file_names, plan_job, set_weights
from interruptions import CONVERT, SLOW_TYPE, count_chunks, interrupt_conversion, on_posix, start_conversion

from qwenlocal.errors import BadWeights, DiskFull, NotWritable, OutputExists, QwenlocalError
from qwenlocal.fileio import start_writeback
from qwenlocal.resumable import part_path
from qwenlocal.testing import write_checkpoint
from qwenlocal.weights.file_types import file_type
from qwenlocal.weights.gguf_reader import read_header
from qwenlocal.weights.write_job import memory_needed
from qwenlocal.weights.write_workers import run_job


class TestExistingOutputs:
    def test_an_existing_file_is_kept_without_replace(self, unaligned_checkpoint: Path, tmp_path: Path) -> None:
        target = tmp_path / "x.q8_0.gguf"
        target.write_bytes(b"old")
        job = plan_job(unaligned_checkpoint, target)
        with pytest.raises(OutputExists) as caught:
            run_job(job, threads=1)
        assert str(target) in str(caught.value)
        assert "--force" in caught.value.hint
        assert (target.read_bytes(), file_names(tmp_path)) == (b"old", {target.name})
        run_job(job, threads=1, replace=True)
        assert read_header(target).architecture == "qwen2"
        assert file_names(tmp_path) == {target.name}

    def test_one_existing_file_of_several_outputs_refuses_them_all(
        self, unaligned_checkpoint: Path, tmp_path: Path
    ) -> None:
        targets = tmp_path / "x.f16.gguf", tmp_path / "x.q8_0.gguf"
        targets[1].write_bytes(b"old")
        with pytest.raises(OutputExists):
            run_job(plan_job(unaligned_checkpoint, *targets), threads=1)
        assert file_names(tmp_path) == {targets[1].name}

    @pytest.mark.parametrize("kind", ["folder", "link into nothing"])
    def test_an_existing_folder_or_broken_link_is_kept(
        self, kind: str, unaligned_checkpoint: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "x.q8_0.gguf"
        target.mkdir() if kind == "folder" else target.symlink_to(tmp_path / "nowhere")
        with pytest.raises(OutputExists):
            run_job(plan_job(unaligned_checkpoint, target), threads=1)
        assert file_names(tmp_path) == {target.name}

    def test_an_existing_file_stays_if_the_new_one_fails(self, tmp_path: Path) -> None:
        source, target = write_checkpoint(tmp_path / "model", config=UNALIGNED), tmp_path / "x.q8_0.gguf"
        set_weights(source, "lm_head.weight", 5, numpy.nan)
        target.write_bytes(b"old")
        with pytest.raises(BadWeights):
            run_job(plan_job(source, target), threads=1, replace=True)
        assert target.read_bytes() == b"old"

    def test_the_output_may_replace_its_source(self, unaligned_checkpoint: Path, tmp_path: Path) -> None:
        """quantize x.gguf x.gguf q8_0 --force."""
        from qwenlocal.weights.quantization import plan_quantization

        path = tmp_path / "x.f16.gguf"
        run_job(plan_job(unaligned_checkpoint, path), threads=1)
        run_job(plan_quantization(path, [(tmp_path / "other.gguf", file_type("q8_0"))]).job, threads=1)
        run_job(plan_quantization(path, [(path, file_type("q8_0"))]).job, threads=1, replace=True)
        assert path.read_bytes() == (tmp_path / "other.gguf").read_bytes()

    @on_posix
    def test_a_file_written_by_another_process_during_the_wait_is_kept(
        self, unaligned_checkpoint: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "x.q8_0.gguf"
        lock = filelock.FileLock(f"{part_path(target)}.lock", thread_local=False)
        lock.acquire()

        def finish() -> None:
            target.write_bytes(b"theirs")
            lock.release()

        timer = threading.Timer(0.2, finish)
        timer.start()
        with pytest.raises(OutputExists):
            run_job(plan_job(unaligned_checkpoint, target), threads=1)
        timer.join()
        assert target.read_bytes() == b"theirs"

    def test_only_one_process_writes_an_output(
        self, large_checkpoint: Path, large_gguf: bytes, slow_output: Path
    ) -> None:
        child = start_conversion(large_checkpoint, slow_output)
        while not count_chunks(slow_output) and child.poll() is None:
            time.sleep(0.002)
        with pytest.raises(QwenlocalError, match="Another qwenlocal is writing"):
            run_job(plan_job(large_checkpoint, slow_output), threads=1)
        assert child.poll() is None, "the other process was still writing"
        assert child.communicate(timeout=60)[0] == "0\n"
        assert slow_output.read_bytes() == large_gguf
        assert file_names(slow_output.parent) == {slow_output.name}


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from checkpoint_files import plan_job
from qwenlocal.errors import QwenlocalError
from qwenlocal.weights.write_workers import run_job
job = plan_job(Path(sys.argv[2]), Path(sys.argv[3]))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    run_job(job, threads=1)
except QwenlocalError as error:
    print(type(error).__name__, error)
"""


FULL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from checkpoint_files import plan_job
from qwenlocal.errors import DiskFull
from qwenlocal.weights.write_workers import run_job
target = Path(sys.argv[3])
filler = target.with_name("filler")
job = plan_job(Path(sys.argv[2]), target)

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
    run_job(job, threads=1, report=fill)
except DiskFull as full:
    print("full", full.needed > 0, full.free < 4096, target.exists())
filler.unlink()
print("resumed", run_job(job, threads=2).resumed > 0)
Path(sys.argv[4]).write_bytes(target.read_bytes())
"""


def can_mount_tmpfs() -> bool:
    """Return True if this user may mount a tmpfs in a namespace of its own."""
    try:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/tmp"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def fake_free_space(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage._replace(free=free))


class TestFullDisks:
    @pytest.mark.slow
    @pytest.mark.skipif(not can_mount_tmpfs(), reason="needs a small disk that may be filled")
    def test_a_disk_that_fills_up_is_reported_and_finished_chunks_are_kept(
        self, large_checkpoint: Path, large_gguf: bytes, tmp_path: Path
    ) -> None:
        (tmp_path / "disk").mkdir()
        mount = f'mount -t tmpfs -o size={len(large_gguf) + (1 << 20)} none {tmp_path}/disk && exec "$@"'
        code = [
            sys.executable,
            "-c",
            FULL,
            str(Path(__file__).parent),
            str(large_checkpoint),
            f"{tmp_path}/disk/x.{SLOW_TYPE}.gguf",
        ]
        command = ["unshare", "-rm", "sh", "-c", mount, "sh", *code, str(tmp_path / "result")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.stdout == "full True True False\nresumed True\n", result.stderr
        assert (tmp_path / "result").read_bytes() == large_gguf

    @pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on file sizes")
    def test_a_limit_on_file_size_is_reported(self, unaligned_checkpoint: Path, tmp_path: Path) -> None:
        target = tmp_path / "x.f16.gguf"
        code = [sys.executable, "-c", LIMITED, str(Path(__file__).parent), str(unaligned_checkpoint), str(target)]
        result = subprocess.run(code, capture_output=True, text=True, timeout=60)
        assert result.stdout.startswith("NotWritable"), result.stderr
        assert "it does not allow files of this size" in result.stdout
        assert not target.exists()
        run_job(plan_job(unaligned_checkpoint, target), threads=1)
        assert target.exists()

    def test_too_little_space_is_reported_before_writing(
        self, unaligned_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = plan_job(unaligned_checkpoint, tmp_path / "x.f16.gguf")
        fake_free_space(monkeypatch, job.outputs[0].size - 1)
        with pytest.raises(DiskFull) as caught:
            run_job(job, threads=1)
        assert (caught.value.needed, caught.value.free) == (job.outputs[0].size, job.outputs[0].size - 1)
        assert str(tmp_path) in str(caught.value)
        fake_free_space(monkeypatch, job.outputs[0].size)
        run_job(job, threads=1)

    def test_too_little_space_leaves_no_file(
        self, unaligned_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake_free_space(monkeypatch, 5)
        with pytest.raises(DiskFull):
            run_job(plan_job(unaligned_checkpoint, tmp_path / "x.f16.gguf"), threads=1)
        assert file_names(tmp_path) == set()

    def test_the_space_of_several_outputs_is_added(
        self, unaligned_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = plan_job(unaligned_checkpoint, tmp_path / "x.f16.gguf", tmp_path / "x.q8_0.gguf")
        fake_free_space(monkeypatch, max(output.size for output in job.outputs))
        with pytest.raises(DiskFull):
            run_job(job, threads=1)

    def test_continuing_needs_space_only_for_the_rest(
        self, unaligned_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = plan_job(unaligned_checkpoint, tmp_path / "x.f16.gguf")
        interrupt_conversion(job)
        missing = job.outputs[0].size - part_path(job.outputs[0].path).stat().st_blocks * 512
        fake_free_space(monkeypatch, max(0, missing))
        assert run_job(job, threads=1).resumed

    @pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="fsync is called there")
    def test_an_error_of_fdatasync_is_reported_and_finished_chunks_are_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = write_checkpoint(tmp_path / "model", config=LARGE)
        target = tmp_path / f"x.{SLOW_TYPE}.gguf"

        def fails(file: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", fails)
            with pytest.raises(NotWritable, match="Input/output error"):
                run_job(plan_job(source, target), threads=1)
        assert not target.exists()
        assert run_job(plan_job(source, target), threads=2).resumed == plan_job(source, target).read_bytes

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no such request elsewhere")
    def test_writeback_starts_during_the_conversion(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = write_checkpoint(tmp_path / "model", config=LARGE)
        accepted: list[bool] = []
        monkeypatch.setattr("qwenlocal.weights.write_workers._WRITEBACK_SIZE", 1)
        monkeypatch.setattr(
            "qwenlocal.weights.write_workers.start_writeback", lambda file: accepted.append(start_writeback(file))
        )
        run_job(plan_job(source, tmp_path / f"x.{SLOW_TYPE}.gguf"), threads=1)
        assert accepted
        assert all(accepted)
        assert not start_writeback(-1)


class TestFolders:
    def test_a_missing_folder_is_created(self, unaligned_checkpoint: Path, tmp_path: Path) -> None:
        target = tmp_path / "some" / "where" / "x.q8_0.gguf"
        run_job(plan_job(unaligned_checkpoint, target), threads=1)
        assert file_names(target.parent) == {target.name}

    def test_a_file_in_place_of_the_folder_is_refused(self, unaligned_checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(NotWritable):
            run_job(plan_job(unaligned_checkpoint, tmp_path / "file" / "x.q8_0.gguf"), threads=1)

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_without_write_permission_is_refused(self, unaligned_checkpoint: Path, tmp_path: Path) -> None:
        folder = tmp_path / "mine"
        folder.mkdir(mode=0o500)
        with pytest.raises(NotWritable, match="permission denied"):
            run_job(plan_job(unaligned_checkpoint, folder / "x.q8_0.gguf"), threads=1)
        assert file_names(folder) == set()

    @pytest.mark.skipif(not can_mount_tmpfs(), reason="needs a disk that may not be written")
    def test_a_read_only_disk_is_refused(self, unaligned_checkpoint: Path, tmp_path: Path) -> None:
        mount = f'mount -t tmpfs -o ro none {tmp_path} && exec "$@"'
        code = [
            sys.executable,
            "-c",
            CONVERT,
            str(Path(__file__).parent),
            str(unaligned_checkpoint),
            f"{tmp_path}/x.q8_0.gguf",
            "",
        ]
        command = ["unshare", "-rm", "sh", "-c", mount, "sh", *code]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert f"NotWritable: Cannot write to {tmp_path}" in result.stderr

    @pytest.mark.parametrize("name", [".part", ".part.journal", ".part.lock"])
    def test_a_folder_with_the_name_of_a_temporary_file_is_reported(
        self, name: str, unaligned_checkpoint: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "x.q8_0.gguf"
        target.with_name(target.name + name).mkdir()
        with pytest.raises(NotWritable, match="Is a directory"):
            run_job(plan_job(unaligned_checkpoint, target), threads=1)

    def test_a_name_too_long_for_the_part_file_is_reported(self, unaligned_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(NotWritable, match="too long"):
            run_job(plan_job(unaligned_checkpoint, tmp_path / ("x" * 240 + ".q8_0.gguf")), threads=1)


class TestSource:
    def test_a_source_truncated_after_planning_is_refused(self, tmp_path: Path) -> None:
        source, target = write_checkpoint(tmp_path / "model", config=UNALIGNED), tmp_path / "x.q8_0.gguf"
        job = plan_job(source, target)
        os.truncate(source / "model.safetensors", 1000 + (source / "model.safetensors").stat().st_size // 2)
        with pytest.raises(BadWeights, match="became shorter"):
            run_job(job, threads=2)
        assert not target.exists()

    def test_a_source_deleted_after_planning_is_named(self, tmp_path: Path) -> None:
        source, target = write_checkpoint(tmp_path / "model", config=UNALIGNED), tmp_path / "x.q8_0.gguf"
        job = plan_job(source, target)
        (source / "model.safetensors").unlink()
        with pytest.raises(BadWeights, match=r"model.safetensors"):
            run_job(job, threads=2)

    def test_progress_is_monotonic_and_ends_at_the_total(self, large_checkpoint: Path, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        job = plan_job(large_checkpoint, tmp_path / "x.q4_k_m.gguf")
        run_job(job, threads=2, report=lambda count, total: seen.append((count, total)))
        assert seen == sorted(seen)
        assert seen[-1] == (job.read_bytes, job.read_bytes)
        assert {total for _, total in seen} == {job.read_bytes}

    def test_memory_depends_on_chunks_and_not_on_the_model(self, large_checkpoint: Path, tmp_path: Path) -> None:
        needed = {
            count: memory_needed(plan_job(large_checkpoint, tmp_path / "x.q8_0.gguf"), count) for count in (1, 2, 3)
        }
        assert needed[3] - needed[2] == needed[2] - needed[1] < 6e6
        assert needed[1] < 120e6
