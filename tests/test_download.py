"""Downloads from misbehaving servers."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hub import Fault, HubServer, Response, corrupt_bytes, cut, only_on, pace, refuse, stall, whole_file
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.errors import DigestMismatch, DiskFull, DownloadFailed, Interrupted, SourceUnreachable
from qwenlocal.library.artifact import Artifact, DownloadedFile, DownloadPolicy, Section
from qwenlocal.library.byte_source import HttpSource, UrlSegment
from qwenlocal.library.download import download_artifact
from qwenlocal.library.http import HttpClient, Timeouts, TransferError, parse_retry_after
from qwenlocal.library.partial_file import FileIdentity, PartialFile, read_download_journal, write_download_journal
from qwenlocal.progress import TaskProgress
from qwenlocal.resumable import journal_path, part_path

BLOCK = 1 << 16
CONTENT = random.Random(1).randbytes(10 * BLOCK + 777)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
POLICY = DownloadPolicy(block_size=BLOCK, connections=4, patience=8, first_patience=1)

Download = Callable[..., DownloadedFile]


@pytest.fixture
def client() -> HttpClient:
    return HttpClient(Timeouts(connect=2, stall=0.7))


@pytest.fixture
def download(hub: HubServer, client: HttpClient, tmp_path: Path) -> Download:
    """Download CONTENT from the given paths of the hub."""
    for path in ("/a/x.bin", "/b/x.bin"):
        hub.files[path] = CONTENT

    def run(
        paths: Sequence[str] = ("/a/x.bin",),
        *,
        sha256: str | None = DIGEST,
        policy: DownloadPolicy = POLICY,
        etag: str | None = None,
        **options: Any,
    ) -> DownloadedFile:
        sources = [
            HttpSource(path, client, [UrlSegment(hub.url + path, len(CONTENT))], etag=etag or "") for path in paths
        ]
        artifact = Artifact("x.bin", len(CONTENT), sha256, sources, etag=etag)
        return download_artifact(
            artifact, tmp_path / "out" / "x.bin", locks=tmp_path / "locks", policy=policy, **options
        )

    return run


def test_download_returns_the_digest_and_leaves_no_temporary_files(download: Download, tmp_path: Path) -> None:
    result = download()
    assert result.path.read_bytes() == CONTENT
    assert result.sha256 == DIGEST
    assert len(result.checksums) == 11
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.bin"]


def test_each_block_is_requested_once(download: Download, hub: HubServer) -> None:
    download()
    assert sorted(hub.ranges) == [(n * BLOCK, min((n + 1) * BLOCK, len(CONTENT))) for n in range(11)]


def test_an_empty_file_is_created_without_a_request(tmp_path: Path) -> None:
    artifact = Artifact("empty", 0, hashlib.sha256(b"").hexdigest(), [])
    assert download_artifact(artifact, tmp_path / "empty", locks=tmp_path / "l").path.read_bytes() == b""


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([cut(1000), cut(0), cut(30_000)], id="connections that break"),
        pytest.param([stall(1000)], id="a stall"),
        pytest.param([refuse(503, "1"), refuse(429)], id="a busy server"),
        pytest.param([refuse(500), refuse(502)], id="a failing server"),
    ],
)
def test_temporary_failures_are_retried(download: Download, hub: HubServer, faults: list[Fault]) -> None:
    hub.faults = list(faults)
    assert download().path.read_bytes() == CONTENT


@pytest.mark.parametrize("fault", [cut(50_000), stall(200_000)], ids=["breaks", "stalls"])
def test_no_byte_is_requested_twice_on_a_line_that_fails(download: Download, hub: HubServer, fault: Fault) -> None:
    hub.always = [fault]
    assert download().path.read_bytes() == CONTENT
    assert hub.sent == len(CONTENT)


def test_a_line_that_breaks_every_connection_is_not_given_up_as_long_as_bytes_arrive(
    download: Download, hub: HubServer
) -> None:
    hub.always = [cut(140_000)]
    policy = DownloadPolicy(block_size=1 << 20, connections=1, patience=1.2)
    assert download(policy=policy).path.read_bytes() == CONTENT
    assert [start for start, _ in hub.ranges] == [0, 140_000, 280_000, 420_000, 560_000]


def test_a_line_that_delivers_next_to_nothing_is_given_up(download: Download, hub: HubServer) -> None:
    hub.always = [cut(10)]
    with pytest.raises(DownloadFailed, match="ended early"):
        download(policy=DownloadPolicy(block_size=BLOCK, connections=1, patience=1))


def test_the_next_source_continues_at_the_byte_where_the_first_one_failed(download: Download, hub: HubServer) -> None:
    hub.always = [only_on("/a/", cut(30_000))]
    download(["/a/x.bin", "/b/x.bin"], policy=DownloadPolicy(block_size=1 << 20, connections=1, patience=8))
    assert hub.ranges == [(0, len(CONTENT)), (30_000, len(CONTENT))]


def test_retry_after_is_respected(download: Download, hub: HubServer) -> None:
    hub.faults = [refuse(503, "2")] * 4
    started = time.monotonic()
    download()
    assert time.monotonic() - started >= 2


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(stall(100), id="stalls"),
        pytest.param(cut(100), id="breaks"),
        pytest.param(refuse(404), id="has no such file"),
        pytest.param(refuse(403), id="refuses"),
        pytest.param(refuse(503, "3600"), id="asks for a long pause"),
    ],
)
def test_the_next_source_continues_when_one_fails_midway(download: Download, hub: HubServer, fault: Fault) -> None:
    """Blocks that the first source delivered are not requested again."""
    delivered = 0

    def after_three(response: Response) -> None:
        nonlocal delivered
        delivered += 1
        if delivered > 3:
            only_on("/a/", fault)(response)

    hub.always = [after_three]
    policy = DownloadPolicy(block_size=BLOCK, connections=1, patience=20)
    assert download(["/a/x.bin", "/b/x.bin"], policy=policy).sha256 == DIGEST
    requests = [path for path in hub.requests if path.endswith("x.bin")]
    blocks: dict[str, list[int]] = {"a": [], "b": []}
    for path, (start, _) in zip(requests, hub.ranges, strict=True):
        blocks[path.split("/")[1]].append(start // BLOCK)
    assert blocks["a"][:3] == [0, 1, 2]
    assert set(blocks["b"]) >= set(range(4, 11))
    assert not {0, 1, 2} & set(blocks["b"])


def test_wrong_bytes_are_detected_and_the_next_source_is_used(download: Download, hub: HubServer) -> None:
    hub.always = [only_on("/a/", corrupt_bytes)]
    assert download(["/a/x.bin", "/b/x.bin"]).path.read_bytes() == CONTENT


@pytest.mark.parametrize("corrupt", ["/a/", "/b/"])
def test_one_corrupt_source_of_two_does_not_fail_the_download(download: Download, hub: HubServer, corrupt: str) -> None:
    """Both deliver a part, since the first breaks off, so it is unknown which of them sent wrong bytes."""
    responses = 0

    def fault(response: Response) -> None:
        nonlocal responses
        if corrupt in response.path:
            corrupt_bytes(response)
        if "/a/" in response.path:
            responses += 1
            if responses in (4, 5):
                refuse(503, "1")(response)

    hub.always = [fault]
    assert download(["/a/x.bin", "/b/x.bin"]).path.read_bytes() == CONTENT


def test_stop_does_not_wait_for_a_silent_server(download: Download, hub: HubServer, client: HttpClient) -> None:
    client.timeouts = Timeouts(connect=30, stall=30)
    hub.always = [lambda _response: time.sleep(20)]
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Interrupted):
        download(stop=stop)
    assert time.monotonic() - started < 5


def test_wrong_bytes_from_every_source_are_an_error_and_deleted(
    download: Download, hub: HubServer, tmp_path: Path
) -> None:
    hub.always = [corrupt_bytes]
    with pytest.raises(DigestMismatch) as caught:
        download()
    assert caught.value.expected == DIGEST
    assert caught.value.source == "/a/x.bin"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_server_without_ranges_is_read_once_from_the_start(download: Download, hub: HubServer) -> None:
    hub.always = [whole_file(CONTENT)]
    assert download().path.read_bytes() == CONTENT


@pytest.mark.parametrize("length", [1000, BLOCK])
def test_bytes_that_are_there_are_kept_if_a_server_without_ranges_sends_them_again(
    download: Download, hub: HubServer, tmp_path: Path, length: int
) -> None:
    create_partial(tmp_path / "out" / "x.bin", range(0, 11, 2), length=length)
    hub.always = [whole_file(CONTENT)]
    assert download().path.read_bytes() == CONTENT


def test_a_server_without_ranges_completes_the_download_of_another_source(download: Download, hub: HubServer) -> None:
    hub.always = [only_on("/a/", cut(30_000)), only_on("/b/", whole_file(CONTENT))]
    assert download(["/a/x.bin", "/b/x.bin"]).path.read_bytes() == CONTENT


def create_partial(
    target: Path, numbers: Sequence[int], *, content: bytes = CONTENT, sha256: str | None = DIGEST, length: int = BLOCK
) -> Path:
    """Create the partial file of an earlier download that received the first `length` bytes of the given blocks."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = PartialFile(target, FileIdentity("x.bin", len(CONTENT), sha256), block_size=BLOCK)
    for number in numbers:
        start, end = partial.span(number)
        partial.write(start, content[start : min(end, start + length)])
    partial.close()
    return target


def arrived_bytes(target: Path) -> int:
    """Return how many bytes of an unfinished download are kept, as its journal says."""
    journal = read_download_journal(journal_path(target))
    return journal.done if journal else 0


def requested_bytes(hub: HubServer) -> int:
    """Return how many bytes were requested from the hub."""
    return sum(end - start for start, end in hub.ranges)


def test_a_download_resumes(download: Download, hub: HubServer, tmp_path: Path) -> None:
    create_partial(tmp_path / "out" / "x.bin", [0, 1, 2, 7])
    assert download().path.read_bytes() == CONTENT
    assert sorted(start // BLOCK for start, _ in hub.ranges) == [3, 4, 5, 6, 8, 9, 10]


@pytest.mark.parametrize("length", [1, 1000, BLOCK - 2])
def test_a_download_resumes_within_blocks(download: Download, hub: HubServer, tmp_path: Path, length: int) -> None:
    create_partial(tmp_path / "out" / "x.bin", [0, 7], length=length)
    assert download().path.read_bytes() == CONTENT
    assert {length, 7 * BLOCK + length} <= {start for start, _ in hub.ranges}
    assert requested_bytes(hub) == len(CONTENT) - 2 * length


def test_a_begun_block_damaged_on_disk_is_fetched_again(download: Download, hub: HubServer, tmp_path: Path) -> None:
    target = create_partial(tmp_path / "out" / "x.bin", range(11), length=1000)
    with part_path(target).open("r+b") as file:
        file.seek(5 * BLOCK + 9)
        file.write(b"damage")
    assert download().path.read_bytes() == CONTENT
    assert (5 * BLOCK, 6 * BLOCK) in hub.ranges
    assert requested_bytes(hub) == len(CONTENT) - 10 * 1000 - 777 + BLOCK


def test_a_block_damaged_on_disk_is_fetched_again(download: Download, hub: HubServer, tmp_path: Path) -> None:
    target = create_partial(tmp_path / "out" / "x.bin", range(11))
    with part_path(target).open("r+b") as file:
        file.seek(5 * BLOCK + 9)
        file.write(b"damage")
    assert download().path.read_bytes() == CONTENT
    assert [start // BLOCK for start, _ in hub.ranges] == [5]


def test_the_partial_file_of_another_download_is_not_used(download: Download, hub: HubServer, tmp_path: Path) -> None:
    create_partial(tmp_path / "out" / "x.bin", range(11), content=bytes(len(CONTENT)), sha256="0" * 64)
    assert download().path.read_bytes() == CONTENT
    assert len(hub.ranges) == 11


def test_a_file_that_changed_on_the_server_is_refused(download: Download, hub: HubServer) -> None:
    hub.files["/a/x.bin"] = CONTENT + b"more"
    with pytest.raises(DownloadFailed, match="file on the server has changed"):
        download()


def test_without_a_digest_a_changed_etag_is_an_error(download: Download) -> None:
    with pytest.raises(DownloadFailed, match="has changed during the download"):
        download(sha256=None, etag='"another"')


def test_a_file_that_became_shorter_on_the_server_is_refused(download: Download, hub: HubServer) -> None:
    hub.always = [refuse(416)]
    with pytest.raises(DownloadFailed, match="has a shorter file now"):
        download()


def test_a_new_etag_starts_an_unfinished_download_afresh(download: Download, hub: HubServer, tmp_path: Path) -> None:
    hub.always = [pace(1e5)]
    with pytest.raises(Interrupted):
        download(sha256=None, etag=f'"{DIGEST}"', stop=after(0.5))
    other = bytes(len(CONTENT))
    hub.files["/a/x.bin"], hub.always = other, []
    assert arrived_bytes(tmp_path / "out" / "x.bin") > 0
    assert download(sha256=None, etag=f'"{hashlib.sha256(other).hexdigest()}"').path.read_bytes() == other


def test_without_a_digest_the_file_is_still_hashed(download: Download) -> None:
    assert download(sha256=None).sha256 == DIGEST


def test_an_unreachable_server_fails_quickly(client: HttpClient, tmp_path: Path) -> None:
    source = HttpSource("nobody", client, [UrlSegment("http://127.0.0.1:9/x", 100)])
    started = time.monotonic()
    with pytest.raises(SourceUnreachable, match="Connection refused"):
        download_artifact(Artifact("x", 100, None, [source]), tmp_path / "x", locks=tmp_path / "l", policy=POLICY)
    assert time.monotonic() - started < 10


def test_a_network_outage_is_waited_out(download: Download, hub: HubServer) -> None:
    away = time.monotonic() + 2

    def gone(response: Response) -> None:
        if time.monotonic() < away and hub.sent > 3 * BLOCK:
            cut(0)(response)

    hub.always = [gone]
    assert download().sha256 == DIGEST


def test_failure_lists_the_reason_of_every_source(download: Download, hub: HubServer) -> None:
    hub.always = [only_on("/a/", refuse(404)), only_on("/b/", refuse(403))]
    with pytest.raises(DownloadFailed) as caught:
        download(["/a/x.bin", "/b/x.bin"])
    assert "does not have the file (HTTP 404)" in str(caught.value)
    assert "refuses access (HTTP 403)" in str(caught.value)


def test_a_full_disk_is_reported_before_the_first_request(
    download: Download, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("U", (), {"free": 1000})())
    with pytest.raises(DiskFull) as caught:
        download()
    assert caught.value.free == 1000
    assert hub.ranges == []


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on file sizes")
def test_a_full_disk_keeps_the_data_that_has_arrived(tmp_path: Path, hub: HubServer) -> None:
    """A file-size limit stands in for the full disk: both raise an OSError."""
    hub.files["/x.bin"] = CONTENT
    code = FETCH_SCRIPT.replace(
        "download_artifact(", "resource.setrlimit(resource.RLIMIT_FSIZE, (5 * BLOCK, 5 * BLOCK)); download_artifact("
    )
    assert output_of(start_download(hub, tmp_path, code)).startswith("NotWritable")
    assert arrived_bytes(tmp_path / "x.bin") <= 5 * BLOCK
    assert output_of(start_download(hub, tmp_path)) == "done\n"


def test_the_rate_can_be_limited(hub: HubServer, tmp_path: Path) -> None:
    hub.files["/x"] = CONTENT
    client = HttpClient(limit_rate=len(CONTENT))
    source = HttpSource("hub", client, [UrlSegment(f"{hub.url}/x", len(CONTENT))])
    started = time.monotonic()
    download_artifact(Artifact("x", len(CONTENT), DIGEST, [source]), tmp_path / "x", locks=tmp_path / "l")
    assert time.monotonic() - started > 0.7


def test_progress_never_decreases(download: Download, hub: HubServer) -> None:
    hub.always = [pace(4e5)]
    seen: list[TaskProgress] = []
    download(report=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert len({p.done for p in seen}) > 2
    assert all(p.total == len(CONTENT) for p in seen)


def after(seconds: float) -> threading.Event:
    """Return an event that is set after a while."""
    event = threading.Event()
    threading.Timer(seconds, event.set).start()
    return event


def test_an_interruption_keeps_every_byte(download: Download, hub: HubServer, tmp_path: Path) -> None:
    hub.always = [pace(1e5)]
    started = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        download(stop=after(0.5))
    assert time.monotonic() - started < 4
    kept = arrived_bytes(tmp_path / "out" / "x.bin")
    assert caught.value.hint == f"{kept / len(CONTENT):.0%} of x.bin is kept. To continue, run the same command again."
    assert 0 <= hub.sent - kept < 32_000  # on their way
    hub.always, hub.ranges = [], []
    assert download().sha256 == DIGEST
    assert requested_bytes(hub) == len(CONTENT) - kept


def test_segments_are_joined_and_each_is_verified(hub: HubServer, client: HttpClient, tmp_path: Path) -> None:
    parts = [CONTENT[: 3 * BLOCK + 5], CONTENT[3 * BLOCK + 5 :]]
    segments, sections, at = [], [], 0
    for name, part in zip("ab", parts, strict=True):
        hub.files[f"/x.gguf.{name}"] = part
        segments.append(UrlSegment(f"{hub.url}/x.gguf.{name}", len(part)))
        sections.append(Section(at, at + len(part), hashlib.sha256(part).hexdigest()))
        at += len(part)
    hub.faults = [only_on(".b", corrupt_bytes)]  # the first response for the second segment is wrong
    artifact = Artifact(
        "x.gguf", at, None, [HttpSource("hub", client, segments), HttpSource("again", client, segments)], sections
    )
    result = download_artifact(artifact, tmp_path / "x.gguf", locks=tmp_path / "l", policy=POLICY)
    assert result.path.read_bytes() == CONTENT
    assert result.sha256 == DIGEST


# --- processes

FETCH_SCRIPT = """
import resource, sys
from pathlib import Path
from qwenlocal.library.artifact import *
from qwenlocal.library.download import *
from qwenlocal.library.byte_source import *
from qwenlocal.library.http import HttpClient
BLOCK = {block}
folder = Path(sys.argv[1]); client = HttpClient()
source = HttpSource("hub", client, [UrlSegment(sys.argv[2] + "/x.bin", {size})])
try:
    artifact = Artifact("x.bin", {size}, "{digest}", [source])
    policy = DownloadPolicy(block_size=BLOCK, connections=4)
    download_artifact(artifact, folder / "x.bin", locks=folder / "locks", policy=policy)
    print("done")
except Exception as error:
    print(type(error).__name__, error)
"""


def start_download(hub: HubServer, folder: Path, code: str = FETCH_SCRIPT) -> subprocess.Popen[str]:
    """Download CONTENT in another process."""
    code = code.replace("{block}", str(BLOCK)).replace("{size}", str(len(CONTENT))).replace("{digest}", DIGEST)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), hub.url], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def output_of(download: subprocess.Popen[str]) -> str:
    return download.communicate(timeout=60)[0]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9")
@pytest.mark.parametrize("seconds", [1.5, 2.3])
def test_kill_9_loses_at_most_the_last_second(hub: HubServer, tmp_path: Path, seconds: float) -> None:
    hub.files["/x.bin"] = CONTENT
    hub.always = [pace(2e4)]
    child = start_download(hub, tmp_path)
    while not hub.sent:
        time.sleep(0.01)
    time.sleep(seconds)
    child.kill()
    child.communicate()
    assert not (tmp_path / "x.bin").exists()
    kept = arrived_bytes(tmp_path / "x.bin")
    assert kept > hub.sent - 4 * 2e4 * 1.3
    hub.always, hub.ranges = [], []
    assert output_of(start_download(hub, tmp_path)) == "done\n"
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    assert requested_bytes(hub) == len(CONTENT) - kept


def test_two_processes_share_one_download(hub: HubServer, tmp_path: Path) -> None:
    hub.files["/x.bin"] = CONTENT
    hub.always = [pace(3e5)]
    children = [start_download(hub, tmp_path) for _ in range(2)]
    assert [output_of(child) for child in children] == ["done\n", "done\n"]
    assert len(hub.ranges) == 11


# --- the journal


@given(st.binary(max_size=300))
def test_an_invalid_journal_is_ignored(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("journals") / "x.part.journal"
    path.write_bytes(content)
    assert read_download_journal(path) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, BLOCK)), max_size=9), st.integers(0, 99))
def test_a_torn_journal_counts_up_to_its_last_complete_line(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, int]], torn: int
) -> None:
    """Each write adds bytes to a block; what is not recorded counts as missing, what is recorded is intact."""
    base = tmp_path_factory.mktemp("journals") / "x"
    identity = FileIdentity("x", 4 * BLOCK - 7, DIGEST, None, "model")
    partial = PartialFile(base, identity, block_size=BLOCK)
    for number, count in writes:
        start, end = partial.rest(number)
        partial.write(start, CONTENT[start : min(end, start + count)])
        partial.record()
    partial.close()
    content = journal_path(base).read_bytes()
    first = content.index(b"\n") + 1
    journal_path(base).write_bytes(content[: max(first, len(content) - torn)])
    resumed = PartialFile(base, identity, block_size=BLOCK)
    for number in range(resumed.count):
        (start, _), (end, _), (longest, _) = resumed.span(number), resumed.rest(number), partial.rest(number)
        assert start <= end <= longest
        assert torn or end == longest
    for number in resumed.missing():
        start, end = resumed.rest(number)
        resumed.write(start, CONTENT[start:end])
    assert all(resumed.is_intact(number) for number in range(resumed.count))
    resumed.close()


def test_a_journal_of_complete_blocks_without_their_lengths_is_read(tmp_path: Path) -> None:
    identity = FileIdentity("x", 2 * BLOCK + 5, DIGEST, None, "model")
    write_download_journal(tmp_path / "x", identity, BLOCK, {0: 7, 2: 8})
    journal = read_download_journal(journal_path(tmp_path / "x"))
    assert journal == (identity, BLOCK, {0: (BLOCK, 7), 2: (5, 8)})


@pytest.mark.parametrize("line", ["9 1 1", "-1 1 1", "0 1 -1", f"0 1 {BLOCK + 1}", "2 1 6", "0", "0 1 2 3"])
def test_an_impossible_line_of_a_journal_is_ignored(line: str, tmp_path: Path) -> None:
    write_download_journal(tmp_path / "x", FileIdentity("x", 2 * BLOCK + 5, DIGEST), BLOCK, {})
    with journal_path(tmp_path / "x").open("a") as file:
        file.write(line + "\n")
    journal = read_download_journal(journal_path(tmp_path / "x"))
    assert journal
    assert journal.done == 0


def test_bytes_count_only_directly_after_those_of_their_block(tmp_path: Path) -> None:
    partial = PartialFile(tmp_path / "x", FileIdentity("x", 2 * BLOCK, DIGEST), block_size=BLOCK)
    assert partial.write(5, b"abc") == []
    assert partial.write(0, b"0123") == [0]
    assert partial.write(2, b"2345") == [0]
    assert partial.write(1, b"123") == []
    assert partial.write(BLOCK - 2, b"xyz") == [1]
    assert (partial.rest(0)[0], partial.rest(1)[0]) == (6, BLOCK + 1)
    partial.close()
    assert part_path(tmp_path / "x").read_bytes()[:7] == b"012345\0"


# --- small things


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7), ("", 0), ("soon", 0), ("Thu, 01 Jan 1970 00:01:40 GMT", 90), ("-3", 0)]
)
def test_retry_after_is_a_number_or_a_date(monkeypatch: pytest.MonkeyPatch, header: str, seconds: float) -> None:
    monkeypatch.setattr("time.time", lambda: 10.0)
    assert parse_retry_after(header) == seconds


def test_credentials_are_not_sent_to_another_host(hub: HubServer, client: HttpClient) -> None:
    with HubServer() as other:
        other.files["/x"] = b"here"

        def redirect(response: Response) -> None:
            response.status, response.body = 302, b""
            response.headers = {"Location": f"{other.url}/x".replace("127.0.0.1", "localhost")}

        hub.files["/go"] = b"two"
        hub.always = [redirect]
        response = client.open(f"{hub.url}/go", headers={"Authorization": "Bearer secret"})
        assert b"".join(client.read(response)) == b"here"
        assert other.authorizations == [None]


def test_a_redirect_loop_is_an_error(hub: HubServer, client: HttpClient) -> None:
    def redirect(response: Response) -> None:
        response.status, response.body, response.headers = 302, b"", {"Location": "/go"}

    hub.files["/go"] = b"two"
    hub.always = [redirect]
    with pytest.raises(TransferError, match="too many redirects"):
        client.open(f"{hub.url}/go")
