"""
Huge pages: model files and llama.cpp's buffers in pages of 2 MB instead of 4 KB, on Linux.

A token reads every weight once. With pages of 4 KB, up to 7 % of that time goes into translating addresses
(benchmarks/LOG.md). Nothing here needs privileges, and everything works without it:

- A model file stays mapped, shared with other processes and droppable. The page cache keeps it in huge pages if its
  first reader or writer asks for them, and if the file system has large folios: XFS, and ext4 since Linux 6.16
  (mm/filemap.c: do_sync_mmap_readahead, VM_HUGEPAGE). All later mappings of the file use the same pages.
- llama.cpp's own buffers (repacked weights, the KV cache) are moved to huge pages after loading, while nobody waits:
  moving a gigabyte takes a second, and asking for huge pages beforehand can stall the load for as long.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from qwenlocal.cgroups import read_kernel_file

HUGE_PAGE = 2 << 20
_STEP = 64 << 20  # bytes read between two reports
_WINDOW = 16 << 20  # bytes reserved at once
_COLLAPSE_STEP = 8 << 20  # bytes moved at once
_BUSY_SECONDS = 0.1
_MADV_POPULATE_READ = 22  # linux/mman.h, since Linux 5.14
_MADV_COLLAPSE = 25
_PR_SET_THP_DISABLE = 41  # linux/prctl.h
_CACHESTAT = 451  # number of the system call cachestat(2), since Linux 6.5


class HugePageUsage(NamedTuple):
    """Bytes of this process's memory: in huge pages, and in all."""

    huge: int
    resident: int


def huge_page_mode(root: Path = Path("/")) -> str:
    """Return the system's setting: "always", "madvise" (on request) or "never"; "" if there are no huge pages."""
    setting = read_kernel_file(root / "sys/kernel/mm/transparent_hugepage/enabled")
    return setting.partition("[")[2].partition("]")[0]


def measure_huge_pages(root: Path = Path("/")) -> HugePageUsage | None:
    """Measure the memory of this process, in about 10 ms per GB; None if the system cannot tell."""
    fields = dict[str, int]()
    for line in read_kernel_file(root / "proc/self/smaps_rollup").splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value.split()[0]) * 1024
    if "Rss" not in fields:
        return None
    return HugePageUsage(fields.get("AnonHugePages", 0) + fields.get("FilePmdMapped", 0), fields["Rss"])


def disable_huge_pages() -> None:
    """Use none in this process from now on (prctl(2): PR_SET_THP_DISABLE)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def read_ahead(path: Path, report: Callable[[float], object] = lambda fraction: None) -> None:
    """
    Read a file into the page cache, in huge pages if possible; does nothing if it is there, or on other systems.

    `report` gets fractions from 0 to 1; an exception that it raises ends the reading.
    """
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        if huge_page_mode() not in ("always", "madvise") or _is_cached(file.fileno()):
            return
        with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapping:
            mapping.madvise(mmap.MADV_HUGEPAGE)
            for start in range(0, len(mapping), _STEP):
                size = min(_STEP, len(mapping) - start)
                mapping.madvise(_MADV_POPULATE_READ, start, size)
                report((start + size) / len(mapping))


def collapse_in_background(limit: int, is_busy: Callable[[], bool]) -> None:
    """Run `collapse_buffers` in a thread that does not keep the process alive."""
    threading.Thread(target=collapse_buffers, args=(limit, is_busy), daemon=True).start()


def collapse_buffers(limit: int = sys.maxsize, is_busy: Callable[[], bool] = lambda: False) -> None:
    """
    Move large blocks of memory of this process to huge pages (madvise(2): MADV_COLLAPSE, since Linux 6.1).

    Moves at most `limit` bytes, the oldest blocks first: llama.cpp allocates the weights before the KV cache, and
    Linux maps from the top down. A block that is freed meanwhile does no harm. Between pieces of 8 MB,
    it waits while `is_busy`.
    """
    if huge_page_mode() not in ("always", "madvise"):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in reversed([*_anonymous_blocks(read_kernel_file(Path("/proc/self/maps")))]):
        madvise(start, end - start, mmap.MADV_HUGEPAGE)
        for address in range(start, end, _COLLAPSE_STEP):
            while is_busy():
                time.sleep(_BUSY_SECONDS)
            if limit <= 0:
                return
            size = min(_COLLAPSE_STEP, end - address)
            limit -= size if madvise(address, size, _MADV_COLLAPSE) == 0 else 0  # it fails for unused memory


def _anonymous_blocks(maps: str) -> Iterator[tuple[int, int]]:
    """Yield the addresses of writable memory without a file, of at least two whole huge pages (proc_pid_maps(5))."""
    for line in maps.splitlines():
        addresses, permissions, _, _, inode, *name = line.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        start, end = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        if permissions == "rw-p" and inode == "0" and not name and end - start >= 2 * HUGE_PAGE:
            yield start, end


class PageCacheReservation:
    """
    Puts a file that is being written into huge pages of the page cache, so that its first reader finds them there.

    Reading a hole through a mapping fills the page cache with zeros, in pages of the size that the mapping asks for;
    writes then go to these pages. The file must have its final size already. Does nothing where it has no effect.
    """

    def __init__(self, file: int) -> None:
        """Prepare for the open file `file`."""
        self._mapping: mmap.mmap | None = None
        self._reserved: set[int] = set()
        if huge_page_mode() in ("always", "madvise") and _file_system(file) in ("ext4", "xfs"):  # tmpfs would allocate
            with contextlib.suppress(OSError, ValueError):
                self._mapping = mmap.mmap(file, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
                self._mapping.madvise(mmap.MADV_HUGEPAGE)

    def reserve(self, offset: int, size: int) -> None:
        """Prepare the page cache for `size` bytes that will be written at `offset`; callers hold a lock."""
        for window in range(offset // _WINDOW, -(-(offset + size) // _WINDOW)):
            if self._mapping and window not in self._reserved:
                self._reserved.add(window)
                self._populate(self._mapping, window * _WINDOW)

    def _populate(self, mapping: mmap.mmap, start: int) -> None:
        length = min(_WINDOW, len(mapping) - start)
        try:
            mapping.madvise(_MADV_POPULATE_READ, start, length)
            usage = measure_huge_pages() if len(self._reserved) == 1 else None
            mapping.madvise(mmap.MADV_DONTNEED, start, length)  # or it would count as memory of this process
        except OSError:
            self.close()
        else:
            if usage and not usage.huge and length >= HUGE_PAGE:  # a kernel without large folios for it
                self.close()

    def close(self) -> None:
        """Free the mapping; what was reserved stays in the page cache."""
        if self._mapping:
            self._mapping.close()
            self._mapping = None


def _file_system(file: int) -> str:
    """Return the type of the file system of an open file: "ext4"; "" if unknown (proc_pid_mountinfo(5))."""
    device = os.fstat(file).st_dev
    for line in read_kernel_file(Path("/proc/self/mountinfo")).splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return kind.split()[0]
    return ""


def _is_cached(file: int) -> bool:
    """Return whether all of a file is in the page cache; True also if the kernel cannot tell."""
    pages = (ctypes.c_uint64 * 5)()  # linux/mman.h: struct cachestat; the first number is nr_cache
    whole_file = (ctypes.c_uint64 * 2)(0, 0)  # struct cachestat_range; a length of 0 means to the end
    if ctypes.CDLL(None).syscall(_CACHESTAT, file, whole_file, pages, 0):
        return True
    return pages[0] * mmap.PAGESIZE >= os.fstat(file).st_size
