"""Huge pages for model files and buffers, on the real kernel where it has them."""

from __future__ import annotations

import mmap
import os
import platform
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenlocal.huge_pages import (
    HUGE_PAGE,
    HugePageUsage,
    PageCacheReservation,
    huge_page_mode,
    measure_huge_pages,
    read_ahead,
)

SETTING = "sys/kernel/mm/transparent_hugepage/enabled"


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("always [madvise] never\n", "madvise"),
        ("[always] madvise never\n", "always"),
        ("always madvise [never]\n", "never"),
        ("", ""),
    ],
)
def test_the_mode_is_the_word_in_brackets(text: str, mode: str, tmp_path: Path) -> None:
    write(tmp_path, SETTING, text)
    assert huge_page_mode(tmp_path) == mode


def test_a_system_without_huge_pages_has_no_mode(tmp_path: Path) -> None:
    assert huge_page_mode(tmp_path) == ""
    assert measure_huge_pages(tmp_path) is None


def test_pages_of_files_and_of_buffers_count(tmp_path: Path) -> None:
    lines = (
        "5-7 ---p 00000000 00:00 0 [rollup]",
        "Rss:  1000 kB",
        "AnonHugePages: 300 kB",
        "FilePmdMapped: 200 kB",
        "",
    )
    write(tmp_path, "proc/self/smaps_rollup", "\n".join(lines))
    assert measure_huge_pages(tmp_path) == HugePageUsage(huge=500 * 1024, resident=1000 * 1024)


# --- the real page cache


def has_large_folios(path: Path) -> bool:
    """Return whether the kernel keeps files of this folder in huge pages: XFS, or ext4 since Linux 6.16."""
    if huge_page_mode() not in ("always", "madvise"):
        return False
    release = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    _, file_system = max((point, kind) for point, kind in mounts if path.resolve().is_relative_to(point))
    return release >= (6, 16) and file_system in ("ext4", "xfs")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    if sys.platform != "linux" or not has_large_folios(tmp_path):
        pytest.skip("needs transparent huge pages and a file system with large folios: XFS, or ext4 since Linux 6.16")
    return tmp_path


def huge_bytes(path: Path) -> int:
    """Map a file as llama.cpp does, and return how much of it is in huge pages."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapping:
        assert sum(mapping[::4096]) >= 0
        is_ours, size = False, 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                is_ours = line.endswith(str(path))
            elif is_ours and line.startswith("FilePmdMapped:"):
                size += int(line.split()[1]) * 1024
        return size


def write_small_pieces(path: Path, data: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), 65536):
            file.write(data[start : start + 65536])
        os.fsync(file.fileno())


def drop_from_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_file_that_is_not_cached_is_read_into_huge_pages(disk: Path) -> None:
    path = disk / "x.gguf"
    write_small_pieces(path, random.Random(1).randbytes(5 * HUGE_PAGE + 1000))
    assert huge_bytes(path) == 0
    drop_from_cache(path)
    fractions: list[float] = []
    read_ahead(path, fractions.append)
    assert fractions[-1] == 1.0
    assert huge_bytes(path) == 5 * HUGE_PAGE


def test_a_file_that_is_cached_is_left_alone(disk: Path) -> None:
    path = disk / "x.gguf"
    write_small_pieces(path, bytes(3 * HUGE_PAGE))
    read_ahead(path, lambda fraction: pytest.fail("it was read again"))


def test_an_exception_ends_the_reading(disk: Path) -> None:
    path = disk / "x.gguf"
    write_small_pieces(path, bytes(HUGE_PAGE))
    drop_from_cache(path)

    def cancel(_fraction: float) -> None:
        raise KeyError("cancelled")

    with pytest.raises(KeyError):
        read_ahead(path, cancel)


@pytest.mark.parametrize("name", ["missing.gguf", "empty.gguf", "folder"])
def test_files_that_cannot_be_mapped_are_left_to_the_reader(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "folder").mkdir()
    read_ahead(tmp_path / name)


def test_data_written_in_small_pieces_ends_up_in_huge_pages(disk: Path) -> None:
    data = random.Random(2).randbytes(9 * HUGE_PAGE + 500)
    path = disk / "x.gguf"
    with path.open("wb+", buffering=0) as file:
        file.truncate(len(data))
        reservation = PageCacheReservation(file.fileno())
        for start in range(0, len(data), 65536):
            piece = data[start : start + 65536]
            reservation.reserve(start, len(piece))
            os.pwrite(file.fileno(), piece, start)
        reservation.close()
    assert path.read_bytes() == data
    assert huge_bytes(path) == 9 * HUGE_PAGE


def test_reserving_costs_no_memory_of_the_process(disk: Path) -> None:
    before = measure_huge_pages()
    with (disk / "x.gguf").open("wb+") as file:
        file.truncate(64 << 20)
        reservation = PageCacheReservation(file.fileno())
        reservation.reserve(0, 64 << 20)
        after = measure_huge_pages()
        reservation.close()
    assert before and after
    assert after.resident - before.resident < 8 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("reserved")


@given(
    st.lists(st.tuples(st.integers(0, 40_000), st.binary(min_size=1, max_size=9000)), max_size=12),
    st.integers(1, 50_000),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="needs pwrite")
def test_reserving_never_changes_the_contents_of_a_file(
    folder: Path, writes: list[tuple[int, bytes]], size: int
) -> None:
    expected = bytearray(size)
    with (folder / "x.bin").open("wb+", buffering=0) as file:
        file.truncate(size)
        reservation = PageCacheReservation(file.fileno())
        for offset, data in writes:
            data = data[: max(0, size - offset)]
            reservation.reserve(offset, len(data))
            os.pwrite(file.fileno(), data, offset)
            expected[offset : offset + len(data)] = data
        reservation.close()
    assert (folder / "x.bin").read_bytes() == expected


# --- whole processes

_LOAD = """
import sys
from pathlib import Path
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.huge_pages import collapse_buffers, disable_huge_pages, measure_huge_pages
if "off" in sys.argv:
    disable_huge_pages()
before = measure_huge_pages()
context = Context(Model(Path(sys.argv[1])), ContextOptions(100_000))
limit = 8 << 20 if "limited" in sys.argv else sys.maxsize
busy = [True, True] if "busy" in sys.argv else []
collapse_buffers(limit, lambda: bool(busy and busy.pop()))
assert not busy
print(measure_huge_pages().huge - before.huge, measure_huge_pages().resident - before.resident)
"""


def load_in_process(model: Path, *options: str) -> tuple[int, int]:
    """Load a model with a large KV cache; return the additional bytes in huge pages, and in all."""
    command = [sys.executable, "-c", _LOAD, str(model), *options]
    huge, resident = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(huge), int(resident)


@pytest.mark.skipif(huge_page_mode() != "madvise", reason="needs transparent huge pages on request")
def test_the_kv_cache_moves_to_huge_pages_unless_they_are_turned_off(random_model: Path) -> None:
    huge, resident = load_in_process(random_model)
    assert resident > 16 << 20
    assert huge > 0.7 * resident
    assert load_in_process(random_model, "busy")[0] > 0.7 * resident
    assert 0 < load_in_process(random_model, "limited")[0] <= 8 << 20
    huge, resident_without = load_in_process(random_model, "off")
    assert huge == 0
    assert resident < 1.05 * resident_without + 3 * HUGE_PAGE
