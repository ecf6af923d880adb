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
        **options: object,
    ) -> DownloadedFile:
        sources = [
            HttpSource(path, client, [UrlSegment(hub.url + path, len(CONTENT))], etag=etag or "") for path in paths
        ]
        artifact = Artifact("x.bin", len(CONTENT), sha256, sources, etag=etag)
        return download_artifact(
            artifact, tmp_path / "out" / "x.bin", client=client, locks=tmp_path / "locks", policy=policy, **options
        )  # type: ignore[arg-type]

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


def test_empty_file(hub: HubServer, client: HttpClient, tmp_path: Path) -> None:
    artifact = Artifact("empty", 0, hashlib.sha256(b"").hexdigest(), [])
    assert download_artifact(artifact, tmp_path / "empty", client=client, locks=tmp_path / "l").path.read_bytes() == b""


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

    def after_three(response: object) -> None:
        nonlocal delivered
        delivered += 1
        if delivered > 3:
            only_on("/a/", fault)(response)  # type: ignore[arg-type]

    hub.always = [after_three]  # type: ignore[list-item]
    assert (
        download(["/a/x.bin", "/b/x.bin"], policy=DownloadPolicy(block_size=BLOCK, connections=1, patience=20)).sha256
        == DIGEST
    )
    blocks_of_a = [
        start // BLOCK for path, (start, _) in zip(_file_requests(hub), hub.ranges, strict=True) if "/a/" in path
    ]
    blocks_of_b = [
        start // BLOCK for path, (start, _) in zip(_file_requests(hub), hub.ranges, strict=True) if "/b/" in path
    ]
    assert blocks_of_a[:3] == [0, 1, 2]
    assert set(blocks_of_b) >= set(range(4, 11))
    assert not {0, 1, 2} & set(blocks_of_b)


def _file_requests(hub: HubServer) -> list[str]:
    return [path for path in hub.requests if path.endswith("x.bin")]


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


def test_a_server_without_ranges_keeps_finished_blocks(download: Download, hub: HubServer, tmp_path: Path) -> None:
    half = create_partial(tmp_path / "out" / "x.bin", range(0, 11, 2))
    hub.always = [whole_file(CONTENT)]
    assert download().path.read_bytes() == CONTENT
    assert half


def create_partial(
    target: Path, numbers: Sequence[int], *, content: bytes = CONTENT, sha256: str | None = DIGEST
) -> Path:
    """Create the partial file of an earlier download that finished the given blocks."""
    import zlib

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = PartialFile(target, FileIdentity("x.bin", len(CONTENT), sha256), block_size=BLOCK)
    for number in numbers:
        start, end = partial.span(number)
        partial.write(start, content[start:end])
        partial.complete(number, zlib.crc32(content[start:end]))
    partial.close()
    return target


def test_a_download_resumes(download: Download, hub: HubServer, tmp_path: Path) -> None:
    create_partial(tmp_path / "out" / "x.bin", [0, 1, 2, 7])
    assert download().path.read_bytes() == CONTENT
    assert sorted(start // BLOCK for start, _ in hub.ranges) == [3, 4, 5, 6, 8, 9, 10]


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


def test_without_a_digest_a_changed_etag_is_an_error(download: Download, hub: HubServer) -> None:
    with pytest.raises(DownloadFailed, match="has changed during the download"):
        download(sha256=None, etag='"another"')


def test_without_a_digest_the_file_is_still_hashed(download: Download) -> None:
    assert download(sha256=None).sha256 == DIGEST


def test_an_unreachable_server_fails_quickly(client: HttpClient, tmp_path: Path) -> None:
    source = HttpSource("nobody", client, [UrlSegment("http://127.0.0.1:9/x", 100)])
    started = time.monotonic()
    with pytest.raises(SourceUnreachable, match="Connection refused"):
        download_artifact(
            Artifact("x", 100, None, [source]), tmp_path / "x", client=client, locks=tmp_path / "l", policy=POLICY
        )
    assert time.monotonic() - started < 10


def test_a_network_outage_is_waited_out(download: Download, hub: HubServer) -> None:
    away = time.monotonic() + 2

    def gone(response: object) -> None:
        if time.monotonic() < away and hub.sent > 3 * BLOCK:
            cut(0)(response)  # type: ignore[arg-type]

    hub.always = [gone]  # type: ignore[list-item]
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
def test_a_disk_that_fills_up_keeps_finished_blocks(tmp_path: Path, hub: HubServer) -> None:
    """A file-size limit stands in for the full disk: both raise an OSError."""
    hub.files["/x.bin"] = CONTENT
    code = _FETCH_SCRIPT.replace(
        "download_artifact(", "resource.setrlimit(resource.RLIMIT_FSIZE, (5 * BLOCK, 5 * BLOCK)); download_artifact("
    )
    result = _process(code, hub, tmp_path, wait=True)
    assert str(result).startswith("NotWritable")
    journal = read_download_journal(journal_path(tmp_path / "x.bin"))
    assert journal
    assert len(journal[2]) <= 5
    assert _process(_FETCH_SCRIPT, hub, tmp_path, wait=True) == "done\n"


def test_the_rate_can_be_limited(hub: HubServer, tmp_path: Path) -> None:
    hub.files["/x"] = CONTENT
    client = HttpClient(limit_rate=len(CONTENT))
    source = HttpSource("hub", client, [UrlSegment(f"{hub.url}/x", len(CONTENT))])
    started = time.monotonic()
    download_artifact(
        Artifact("x", len(CONTENT), DIGEST, [source]), tmp_path / "x", client=client, locks=tmp_path / "l"
    )
    assert time.monotonic() - started > 0.7


def test_progress_never_decreases(download: Download, hub: HubServer) -> None:
    hub.always = [pace(4e5)]
    seen: list[TaskProgress] = []
    download(report=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert len({p.done for p in seen}) > 2
    assert all(p.total == len(CONTENT) for p in seen)


def test_an_interruption_keeps_finished_blocks(download: Download, hub: HubServer, tmp_path: Path) -> None:
    hub.always = [pace(1e5)]
    stop = threading.Event()
    threading.Timer(1.5, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        download(stop=stop)
    assert time.monotonic() - started < 5
    assert "is kept. To continue, run the same command again." in caught.value.hint
    journal = read_download_journal(journal_path(tmp_path / "out" / "x.bin"))
    assert journal
    hub.always, hub.ranges = [], []
    assert download().sha256 == DIGEST
    assert len(hub.ranges) == 11 - len(journal[2]) < 11


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
    result = download_artifact(artifact, tmp_path / "x.gguf", client=client, locks=tmp_path / "l", policy=POLICY)
    assert result.path.read_bytes() == CONTENT
    assert result.sha256 == DIGEST


# --- processes

_FETCH_SCRIPT = """
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
    download_artifact(artifact, folder / "x.bin", client=client, locks=folder / "locks", policy=policy)
    print("done")
except Exception as error:
    print(type(error).__name__, error)
"""


def _process(code: str, hub: HubServer, folder: Path, *, wait: bool) -> object:
    code = code.replace("{block}", str(BLOCK)).replace("{size}", str(len(CONTENT))).replace("{digest}", DIGEST)
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), hub.url], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return child.communicate(timeout=60)[0] if wait else child


@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9")
@pytest.mark.parametrize("seed", range(4))
def test_kill_9_loses_at_most_the_blocks_in_flight(hub: HubServer, tmp_path: Path, seed: int) -> None:
    hub.files["/x.bin"] = CONTENT
    hub.always = [pace(1e5)]
    child = _process(_FETCH_SCRIPT, hub, tmp_path, wait=False)
    assert isinstance(child, subprocess.Popen)
    time.sleep(0.6 + random.Random(seed).random())
    child.kill()
    child.communicate()
    assert not (tmp_path / "x.bin").exists()
    journal = read_download_journal(journal_path(tmp_path / "x.bin"))
    finished = len(journal[2]) if journal else 0
    hub.always, hub.ranges = [], []
    assert _process(_FETCH_SCRIPT, hub, tmp_path, wait=True) == "done\n"
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    assert len(hub.ranges) == 11 - finished


def test_two_processes_share_one_download(hub: HubServer, tmp_path: Path) -> None:
    hub.files["/x.bin"] = CONTENT
    hub.always = [pace(3e5)]
    children = [_process(_FETCH_SCRIPT, hub, tmp_path, wait=False) for _ in range(2)]
    outputs = [child.communicate(timeout=60)[0] for child in children]  # type: ignore[attr-defined]
    assert outputs == ["done\n", "done\n"]
    assert len(hub.ranges) == 11


# --- the journal


@given(st.binary(max_size=300))
def test_an_invalid_journal_is_ignored(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("journals") / "x.part.journal"
    path.write_bytes(content)
    assert read_download_journal(path) is None


@given(st.dictionaries(st.integers(0, 50), st.integers(0, 2**32 - 1)), st.integers(0, 400))
def test_a_torn_journal_counts_up_to_its_last_complete_line(
    tmp_path_factory: pytest.TempPathFactory, blocks: dict[int, int], torn: int
) -> None:
    base = tmp_path_factory.mktemp("journals") / "x"
    identity = FileIdentity("x", 1 << 30, DIGEST, None, "model")
    write_download_journal(base, identity, 1 << 20, blocks)
    content = journal_path(base).read_bytes()
    journal_path(base).write_bytes(content[: len(content) - min(torn, len(content))])
    read = read_download_journal(journal_path(base))
    if read is not None:
        assert read[:2] == (identity, 1 << 20)
        assert read[2].items() <= blocks.items()
        assert torn or read[2] == blocks


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

        def redirect(response) -> None:  # type: ignore[no-untyped-def]
            response.status, response.body = 302, b""
            response.headers = {"Location": f"{other.url}/x".replace("127.0.0.1", "localhost")}

        hub.files["/go"] = b"two"
        hub.always = [redirect]
        response = client.open(f"{hub.url}/go", headers={"Authorization": "Bearer secret"})
        assert b"".join(client.read(response)) == b"here"
        assert other.authorizations == [None]


def test_a_redirect_loop_is_an_error(hub: HubServer, client: HttpClient) -> None:
    def redirect(response) -> None:  # type: ignore[no-untyped-def]
        response.status, response.body, response.headers = 302, b"", {"Location": "/go"}

    hub.files["/go"] = b"two"
    hub.always = [redirect]
    with pytest.raises(TransferError, match="too many redirects"):
        client.open(f"{hub.url}/go")
