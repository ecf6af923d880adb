"""Fetching files from servers that misbehave."""

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
from hub import Answer, Fault, HubServer, cut, lie, only_on, pace, refuse, stall, whole_file
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.errors import DigestMismatch, DiskFull, DownloadFailed, Interrupted, SourceUnreachable
from qwenlocal.library.byte_source import HttpSource, UrlSegment
from qwenlocal.library.download import Artifact, DownloadPolicy, Fetched, Progress, Section, fetch
from qwenlocal.library.http import HttpClient, Timeouts, TransferError, parse_retry_after
from qwenlocal.library.partial_file import Identity, Partial, journal_of, part_of, read_journal, write_journal

BLOCK = 1 << 16
CONTENT = random.Random(1).randbytes(10 * BLOCK + 777)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
MANNER = DownloadPolicy(block=BLOCK, connections=4, patience=8, first_patience=1)

Fetch = Callable[..., Fetched]


@pytest.fixture
def client() -> HttpClient:
    return HttpClient(Timeouts(connect=2, stall=0.7))


@pytest.fixture
def fetched(hub: HubServer, client: HttpClient, tmp_path: Path) -> Fetch:
    """Fetches CONTENT from the given paths of the hub."""
    for path in ("/a/x.bin", "/b/x.bin"):
        hub.files[path] = CONTENT

    def run(
        paths: Sequence[str] = ("/a/x.bin",),
        *,
        sha256: str | None = DIGEST,
        manner: DownloadPolicy = MANNER,
        etag: str | None = None,
        **more: object,
    ) -> Fetched:
        places = [
            HttpSource(path, client, [UrlSegment(hub.url + path, 0, len(CONTENT))], etag=etag or "") for path in paths
        ]
        artifact = Artifact("x.bin", len(CONTENT), sha256, places, etag=etag)
        return fetch(
            artifact, tmp_path / "out" / "x.bin", client=client, locks=tmp_path / "locks", manner=manner, **more
        )  # type: ignore[arg-type]

    return run


def test_a_file_arrives_whole_with_its_digest_and_nothing_else_is_left(fetched: Fetch, tmp_path: Path) -> None:
    result = fetched()
    assert result.path.read_bytes() == CONTENT
    assert result.sha256 == DIGEST
    assert len(result.checksums) == 11
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.bin"]


def test_several_ranges_are_fetched_and_none_twice(fetched: Fetch, hub: HubServer) -> None:
    fetched()
    assert sorted(hub.ranges) == [(n * BLOCK, min((n + 1) * BLOCK, len(CONTENT))) for n in range(11)]


def test_an_empty_file_arrives(hub: HubServer, client: HttpClient, tmp_path: Path) -> None:
    artifact = Artifact("empty", 0, hashlib.sha256(b"").hexdigest(), [])
    assert fetch(artifact, tmp_path / "empty", client=client, locks=tmp_path / "l").path.read_bytes() == b""


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([cut(1000), cut(0), cut(30_000)], id="connections that break"),
        pytest.param([stall(1000)], id="a stall"),
        pytest.param([refuse(503, "1"), refuse(429)], id="a busy server"),
        pytest.param([refuse(500), refuse(502)], id="a failing server"),
    ],
)
def test_passing_trouble_is_waited_out(fetched: Fetch, hub: HubServer, faults: list[Fault]) -> None:
    hub.faults = list(faults)
    assert fetched().path.read_bytes() == CONTENT


def test_retry_after_is_respected(fetched: Fetch, hub: HubServer) -> None:
    hub.faults = [refuse(503, "2")] * 4
    started = time.monotonic()
    fetched()
    assert time.monotonic() - started >= 2


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(stall(100), id="stalls"),
        pytest.param(cut(100), id="breaks"),
        pytest.param(refuse(404), id="has no such file"),
        pytest.param(refuse(403), id="refuses"),
        pytest.param(refuse(503, "3600"), id="wants to be left alone"),
    ],
)
def test_when_a_place_fails_in_the_middle_the_next_one_goes_on(fetched: Fetch, hub: HubServer, fault: Fault) -> None:
    """What the first place delivered is not fetched again."""
    delivered = 0

    def after_three(answer: object) -> None:
        nonlocal delivered
        delivered += 1
        if delivered > 3:
            only_on("/a/", fault)(answer)  # type: ignore[arg-type]

    hub.always = [after_three]  # type: ignore[list-item]
    assert (
        fetched(["/a/x.bin", "/b/x.bin"], manner=DownloadPolicy(block=BLOCK, connections=1, patience=20)).sha256
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


def test_a_server_that_lies_is_found_out_and_the_next_place_is_asked(fetched: Fetch, hub: HubServer) -> None:
    hub.always = [only_on("/a/", lie)]
    assert fetched(["/a/x.bin", "/b/x.bin"]).path.read_bytes() == CONTENT


@pytest.mark.parametrize("liar", ["/a/", "/b/"])
def test_one_liar_among_two_does_not_spoil_the_download(fetched: Fetch, hub: HubServer, liar: str) -> None:
    """Both deliver a part, since the first breaks off; it is not known which of them lied."""
    answers = 0

    def fault(answer: Answer) -> None:
        nonlocal answers
        if liar in answer.path:
            lie(answer)
        if "/a/" in answer.path:
            answers += 1
            if answers in (4, 5):
                refuse(503, "1")(answer)

    hub.always = [fault]
    assert fetched(["/a/x.bin", "/b/x.bin"]).path.read_bytes() == CONTENT


def test_stopping_does_not_wait_for_a_server_that_says_nothing(
    fetched: Fetch, hub: HubServer, client: HttpClient
) -> None:
    client.timeouts = Timeouts(connect=30, stall=30)
    hub.always = [lambda _answer: time.sleep(20)]
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Interrupted):
        fetched(stop=stop)
    assert time.monotonic() - started < 5


def test_a_lie_that_nobody_corrects_is_an_error_and_nothing_is_kept(
    fetched: Fetch, hub: HubServer, tmp_path: Path
) -> None:
    hub.always = [lie]
    with pytest.raises(DigestMismatch) as caught:
        fetched()
    assert caught.value.expected == DIGEST
    assert caught.value.source == "/a/x.bin"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_server_without_ranges_is_read_once_from_the_start(fetched: Fetch, hub: HubServer) -> None:
    hub.always = [whole_file(CONTENT)]
    assert fetched().path.read_bytes() == CONTENT


def test_a_server_without_ranges_does_not_undo_what_is_here(fetched: Fetch, hub: HubServer, tmp_path: Path) -> None:
    half = fetched_blocks(tmp_path / "out" / "x.bin", range(0, 11, 2))
    hub.always = [whole_file(CONTENT)]
    assert fetched().path.read_bytes() == CONTENT
    assert half


def fetched_blocks(
    target: Path, numbers: Sequence[int], *, content: bytes = CONTENT, sha256: str | None = DIGEST
) -> Path:
    """An earlier download that got as far as the given blocks."""
    import zlib

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Partial(target, Identity("x.bin", len(CONTENT), sha256), block=BLOCK)
    for number in numbers:
        start, end = partial.span(number)
        partial.write(start, content[start:end])
        partial.complete(number, zlib.crc32(content[start:end]))
    partial.close()
    return target


def test_a_download_goes_on_where_it_ended(fetched: Fetch, hub: HubServer, tmp_path: Path) -> None:
    fetched_blocks(tmp_path / "out" / "x.bin", [0, 1, 2, 7])
    assert fetched().path.read_bytes() == CONTENT
    assert sorted(start // BLOCK for start, _ in hub.ranges) == [3, 4, 5, 6, 8, 9, 10]


def test_a_block_damaged_on_this_disk_is_fetched_again(fetched: Fetch, hub: HubServer, tmp_path: Path) -> None:
    target = fetched_blocks(tmp_path / "out" / "x.bin", range(11))
    with part_of(target).open("r+b") as file:
        file.seek(5 * BLOCK + 9)
        file.write(b"damage")
    assert fetched().path.read_bytes() == CONTENT
    assert [start // BLOCK for start, _ in hub.ranges] == [5]


def test_the_remains_of_another_file_are_not_used(fetched: Fetch, hub: HubServer, tmp_path: Path) -> None:
    fetched_blocks(tmp_path / "out" / "x.bin", range(11), content=bytes(len(CONTENT)), sha256="0" * 64)
    assert fetched().path.read_bytes() == CONTENT
    assert len(hub.ranges) == 11


def test_a_file_that_changed_on_the_server_is_refused(fetched: Fetch, hub: HubServer) -> None:
    hub.files["/a/x.bin"] = CONTENT + b"more"
    with pytest.raises(DownloadFailed, match="it was changed"):
        fetched()


def test_without_a_digest_a_change_of_the_entity_tag_is_noticed(fetched: Fetch, hub: HubServer) -> None:
    with pytest.raises(DownloadFailed, match="changed on the server"):
        fetched(sha256=None, etag='"another"')


def test_without_a_digest_the_file_is_hashed_all_the_same(fetched: Fetch) -> None:
    assert fetched(sha256=None).sha256 == DIGEST


def test_nobody_answering_is_said_quickly(client: HttpClient, tmp_path: Path) -> None:
    place = HttpSource("nobody", client, [UrlSegment("http://127.0.0.1:9/x", 0, 100)])
    started = time.monotonic()
    with pytest.raises(SourceUnreachable, match="Connection refused"):
        fetch(Artifact("x", 100, None, [place]), tmp_path / "x", client=client, locks=tmp_path / "l", manner=MANNER)
    assert time.monotonic() - started < 10


def test_a_network_that_goes_away_and_comes_back_is_waited_for(fetched: Fetch, hub: HubServer) -> None:
    away = time.monotonic() + 2

    def gone(answer: object) -> None:
        if time.monotonic() < away and hub.sent > 3 * BLOCK:
            cut(0)(answer)  # type: ignore[arg-type]

    hub.always = [gone]  # type: ignore[list-item]
    assert fetched().sha256 == DIGEST


def test_what_no_place_delivers_is_said_with_every_reason(fetched: Fetch, hub: HubServer) -> None:
    hub.always = [only_on("/a/", refuse(404)), only_on("/b/", refuse(403))]
    with pytest.raises(DownloadFailed) as caught:
        fetched(["/a/x.bin", "/b/x.bin"])
    assert "does not have the file (HTTP 404)" in str(caught.value)
    assert "refuses access (HTTP 403)" in str(caught.value)


def test_a_full_disk_is_said_before_the_first_byte(
    fetched: Fetch, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("U", (), {"free": 1000})())
    with pytest.raises(DiskFull) as caught:
        fetched()
    assert caught.value.free == 1000
    assert hub.ranges == []


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on file sizes")
def test_a_disk_that_fills_up_meanwhile_is_said_and_what_is_here_is_kept(tmp_path: Path, hub: HubServer) -> None:
    """A file-size limit stands in for the full disk; the error is the same kind of OSError."""
    hub.files["/x.bin"] = CONTENT
    code = _FETCH_SCRIPT.replace("fetch(", "resource.setrlimit(resource.RLIMIT_FSIZE, (5 * BLOCK, 5 * BLOCK)); fetch(")
    result = _process(code, hub, tmp_path, wait=True)
    assert str(result).startswith("CannotWrite")
    journal = read_journal(journal_of(tmp_path / "x.bin"))
    assert journal
    assert len(journal[2]) <= 5
    assert _process(_FETCH_SCRIPT, hub, tmp_path, wait=True) == "done\n"


def test_the_rate_can_be_limited(hub: HubServer, tmp_path: Path) -> None:
    hub.files["/x"] = CONTENT
    client = HttpClient(limit_rate=len(CONTENT))
    place = HttpSource("hub", client, [UrlSegment(f"{hub.url}/x", 0, len(CONTENT))])
    started = time.monotonic()
    fetch(Artifact("x", len(CONTENT), DIGEST, [place]), tmp_path / "x", client=client, locks=tmp_path / "l")
    assert time.monotonic() - started > 0.7


def test_progress_grows_to_the_whole(fetched: Fetch, hub: HubServer) -> None:
    hub.always = [pace(4e5)]
    seen: list[Progress] = []
    fetched(report=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert len({p.done for p in seen}) > 2
    assert all(p.total == len(CONTENT) for p in seen)


def test_an_interruption_keeps_what_is_here(fetched: Fetch, hub: HubServer, tmp_path: Path) -> None:
    hub.always = [pace(1e5)]
    stop = threading.Event()
    threading.Timer(1.5, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        fetched(stop=stop)
    assert time.monotonic() - started < 5
    assert "is kept; the same command goes on from there" in caught.value.hint
    journal = read_journal(journal_of(tmp_path / "out" / "x.bin"))
    assert journal
    hub.always, hub.ranges = [], []
    assert fetched().sha256 == DIGEST
    assert len(hub.ranges) == 11 - len(journal[2]) < 11


def test_pieces_are_joined_and_each_is_checked(hub: HubServer, client: HttpClient, tmp_path: Path) -> None:
    parts = [CONTENT[: 3 * BLOCK + 5], CONTENT[3 * BLOCK + 5 :]]
    pieces, sections, at = [], [], 0
    for name, part in zip("ab", parts, strict=True):
        hub.files[f"/x.gguf.{name}"] = part
        pieces.append(UrlSegment(f"{hub.url}/x.gguf.{name}", at, at + len(part)))
        sections.append(Section(at, at + len(part), hashlib.sha256(part).hexdigest()))
        at += len(part)
    hub.faults = [only_on(".b", lie)]  # the first answer from the second piece is wrong
    artifact = Artifact(
        "x.gguf", at, None, [HttpSource("hub", client, pieces), HttpSource("again", client, pieces)], sections
    )
    result = fetch(artifact, tmp_path / "x.gguf", client=client, locks=tmp_path / "l", manner=MANNER)
    assert result.path.read_bytes() == CONTENT
    assert result.sha256 == DIGEST


# --- processes

_FETCH_SCRIPT = """
import resource, sys
from pathlib import Path
from qwenlocal.library.download import *
from qwenlocal.library.byte_source import *
from qwenlocal.library.http import HttpClient
BLOCK = {block}
folder = Path(sys.argv[1]); client = HttpClient()
place = HttpSource("hub", client, [UrlSegment(sys.argv[2] + "/x.bin", 0, {size})])
try:
    fetch(Artifact("x.bin", {size}, "{digest}", [place]), folder / "x.bin", client=client, locks=folder / "locks",
          manner=DownloadPolicy(block=BLOCK, connections=4))
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
def test_kill_9_at_any_moment_loses_no_more_than_the_blocks_under_way(
    hub: HubServer, tmp_path: Path, seed: int
) -> None:
    hub.files["/x.bin"] = CONTENT
    hub.always = [pace(1e5)]
    child = _process(_FETCH_SCRIPT, hub, tmp_path, wait=False)
    assert isinstance(child, subprocess.Popen)
    time.sleep(0.6 + random.Random(seed).random())
    child.kill()
    child.communicate()
    assert not (tmp_path / "x.bin").exists()
    journal = read_journal(journal_of(tmp_path / "x.bin"))
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
def test_any_journal_is_read_or_counts_as_none(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("journals") / "x.part.journal"
    path.write_bytes(content)
    assert read_journal(path) is None


@given(st.dictionaries(st.integers(0, 50), st.integers(0, 2**32 - 1)), st.integers(0, 400))
def test_a_torn_journal_is_believed_as_far_as_it_is_whole(
    tmp_path_factory: pytest.TempPathFactory, blocks: dict[int, int], torn: int
) -> None:
    base = tmp_path_factory.mktemp("journals") / "x"
    identity = Identity("x", 1 << 30, DIGEST, None, "model")
    write_journal(base, identity, 1 << 20, blocks)
    content = journal_of(base).read_bytes()
    journal_of(base).write_bytes(content[: len(content) - min(torn, len(content))])
    read = read_journal(journal_of(base))
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


def test_secrets_are_not_sent_on_to_another_host(hub: HubServer, client: HttpClient) -> None:
    seen: list[str | None] = []

    class Elsewhere(HubServer):
        def answer(self, target: str, asked_range: str | None):  # type: ignore[no-untyped-def]
            return super().answer(target, asked_range)

    with Elsewhere() as other:
        other.files["/x"] = b"here"
        handler = other._server.RequestHandlerClass
        original = handler.do_GET  # type: ignore[attr-defined]

        def record(self) -> None:  # type: ignore[no-untyped-def]
            seen.append(self.headers.get("Authorization"))
            original(self)

        handler.do_GET = record  # type: ignore[attr-defined]

        def redirect(answer) -> None:  # type: ignore[no-untyped-def]
            answer.status, answer.body = 302, b""
            answer.headers = {"Location": f"{other.url}/x".replace("127.0.0.1", "localhost")}

        hub.files["/go"] = b"two"
        hub.always = [redirect]
        opened = client.open(f"{hub.url}/go", headers={"Authorization": "Bearer secret"})
        assert b"".join(client.read(opened)) == b"here"
    assert seen == [None]


def test_a_circle_of_redirects_is_refused(hub: HubServer, client: HttpClient) -> None:
    def redirect(answer) -> None:  # type: ignore[no-untyped-def]
        answer.status, answer.body, answer.headers = 302, b"", {"Location": "/go"}

    hub.files["/go"] = b"two"
    hub.always = [redirect]
    with pytest.raises(TransferError, match="too many redirects"):
        client.open(f"{hub.url}/go")
