"""Recovery of damaged journals: what is on intact pages comes back, and damage is never reported as success."""

from __future__ import annotations

import contextlib
import functools
import random
import re
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from chat_holder import open_in_another_process
from conftest import Run
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.chat.journal import ChatInfo, Journal
from qwenlocal.chat.journal_writer import JournalWriter
from qwenlocal.chat.recovery import recover
from qwenlocal.chat.thread import ASSISTANT, USER, Thread
from qwenlocal.errors import JournalError
from qwenlocal.paths import Folders

PAGE, FRAME = 4096, 4096 + 24
LOST = "[This message could not be recovered.]"
LENGTHS = (40, 300, 900, 40, 3_000, 40, 200, 12_000)  # characters; the longer ones continue on overflow pages
Damage = Callable[[bytearray], None]


class JournalFiles(tuple[bytes, bytes]):
    """The database and its log."""

    def __repr__(self) -> str:
        return f"{len(self[0])} bytes with a log of {len(self[1])} bytes"


def message_text(chat: int, number: int) -> str:
    """A text that is marked everywhere with its place, so that its pages can be found."""
    length = LENGTHS[(chat + number) % len(LENGTHS)]
    return f"{'title ' * 8}\n" + "".join(f"<{chat}.{number}.{at}> lorem " for at in range(0, length, 20))


def write_chats(journal: Journal, chats: range) -> None:
    for chat in chats:
        thread = Thread("Be kind." if chat % 3 else "")
        writer = JournalWriter(journal, thread, "tiny")
        for number in range(1, 3 + chat % 4):
            message = thread.add((ASSISTANT, USER)[number % 2], message_text(chat, number), model="tiny")
            if message.role == ASSISTANT:
                thread.update(message, finish_reason="end of answer", ids=tuple(range(chat)))
        writer.close()


def expected_texts(chats: int) -> dict[tuple[int, int], str]:
    return {(c, n): message_text(c, n) for c in range(1, chats + 1) for n in range(1, 3 + c % 4)}


@functools.cache
def healthy_journal(folder: Path) -> JournalFiles:
    """A journal of 16 chats, 8 of them still in the log."""
    journal = Journal(folder / "healthy.db")
    write_chats(journal, range(1, 9))
    with contextlib.closing(sqlite3.connect(journal.path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    write_chats(journal, range(9, 17))
    data, log = journal.path.read_bytes(), journal.path.with_name("healthy.db-wal").read_bytes()
    assert len(log) > 20 * FRAME
    return JournalFiles((data, log))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> JournalFiles:
    return healthy_journal(tmp_path_factory.mktemp("healthy"))


def flip_bits(seed: int, count: int) -> Damage:
    def damage(data: bytearray) -> None:
        generator = random.Random(seed)
        for _ in range(count):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)

    return damage


def zero_pages(place: float, count: int) -> Damage:
    def damage(data: bytearray) -> None:
        start = int(place * len(data)) // PAGE * PAGE
        data[start : start + count * PAGE] = bytes(min(count * PAGE, len(data) - start))

    return damage


def truncate(place: float) -> Damage:
    def damage(data: bytearray) -> None:
        del data[int(place * len(data)) :]

    return damage


def swap_pages(one: float, other: float) -> Damage:
    def damage(data: bytearray) -> None:
        first, second = sorted(int(place * (len(data) // PAGE)) * PAGE for place in (one, other))
        page = data[first : first + PAGE]
        data[first : first + PAGE] = data[second : second + PAGE]
        data[second : second + PAGE] = page

    return damage


def overwrite_start(noise: bytes) -> Damage:
    def damage(data: bytearray) -> None:
        data[: len(noise)] = noise[: len(data)]

    return damage


places = st.floats(0, 1, exclude_max=True)
structural = st.one_of(
    st.builds(zero_pages, places, st.integers(1, 3)),
    st.builds(truncate, places),
    st.builds(swap_pages, places, places),
    st.builds(overwrite_start, st.binary(min_size=1, max_size=120)),
)
damages = st.lists(
    st.one_of(structural, st.builds(flip_bits, st.integers(0, 1 << 30), st.integers(1, 40))), min_size=1, max_size=2
)


def apply(content: bytes, damages: list[Damage]) -> bytes:
    data = bytearray(content)
    for damage in damages:
        if data:
            damage(data)
    return bytes(data)


def intact_messages(before: JournalFiles, after: JournalFiles) -> set[tuple[int, int]]:
    """Return the messages (chat and number) whose newest pages and frames are all unchanged and in their place."""
    damaged: set[tuple[int, int]] = set()
    newest: dict[bytes, tuple[int, int]] = {}
    for file, size, start in ((0, PAGE, 0), (1, FRAME, 32)):
        for at in range(start, len(before[file]), size):
            for marker in re.findall(rb"<\d+\.\d+\.\d+>", before[file][at : at + size]):
                newest[marker] = (file, at)
    for marker, (file, at) in newest.items():
        size = FRAME if file else PAGE
        if before[file][at : at + size] != after[file][at : at + size]:
            chat, number, _ = map(int, marker.strip(b"<>").split(b"."))
            damaged.add((chat, number))
    markers = b" ".join(newest)
    cut = {key for key, text in expected_texts(16).items() if not all_found(text, markers)}
    return set(expected_texts(16)) - damaged - cut


def all_found(text: str, markers: bytes) -> bool:
    """A marker at the border of two pages is in neither: its message has other markers on both."""
    return any(marker.encode() in markers for marker in re.findall(r"<\S+>", text))


def write_files(folder: Path, data: bytes, log: bytes) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / "chats.db"
    path.write_bytes(data)
    if log:
        path.with_name("chats.db-wal").write_bytes(log)
    return path


def read_journal(path: Path) -> dict[tuple[int, int], str]:
    with contextlib.closing(Journal(path)) as journal:
        threads = {chat.id: journal.load_thread(chat.id) for chat in journal.list_chats()}
        for thread in threads.values():
            assert thread.path or not thread.messages
        return {(c, m.number): m.text for c, thread in threads.items() for m in thread.messages.values()}


def check_recovery(path: Path, before: JournalFiles, after: JournalFiles) -> None:
    intact = intact_messages(before, after)
    try:
        recovered = recover(path, path.with_name("copy.db"))
    except JournalError as error:
        assert not intact, error
        assert "no readable message" in str(error)
    else:
        texts = read_journal(path.with_name("copy.db"))
        expected = expected_texts(16)
        assert {key: texts.get(key) for key in intact} == {key: expected[key] for key in intact}
        assert recovered.messages + recovered.lost == len(texts)
        assert recovered.lost == sum(text == LOST for text in texts.values())
        assert recovered.messages > 0
    assert path.read_bytes() == after[0]


@fuzz
@given(damages)
def test_messages_on_intact_pages_are_recovered(tmp_path: Path, healthy: JournalFiles, damages: list[Damage]) -> None:
    after = JournalFiles((apply(healthy[0], damages), healthy[1]))
    check_recovery(write_files(tmp_path / "j", *after), healthy, after)


@fuzz
@given(damages)
def test_messages_in_intact_frames_of_the_log_are_recovered(
    tmp_path: Path, healthy: JournalFiles, damages: list[Damage]
) -> None:
    after = JournalFiles((healthy[0], apply(healthy[1], damages)))
    check_recovery(write_files(tmp_path / "j", *after), healthy, after)


def listed(path: Path) -> list[ChatInfo]:
    with contextlib.closing(Journal(path)) as journal:
        chats = journal.list_chats()
        for chat in chats:
            journal.load_thread(chat.id)
        journal.search("lorem")
        return chats


@fuzz
@given(st.lists(structural, min_size=1, max_size=2))
def test_a_journal_with_damaged_pages_opens_only_if_all_its_chats_are_there(
    tmp_path: Path, healthy: JournalFiles, damages: list[Damage]
) -> None:
    complete = listed(write_files(tmp_path / "healthy", *healthy))
    path = write_files(tmp_path / "j", apply(healthy[0], damages), healthy[1])
    before = path.read_bytes()
    try:
        Journal(path).close()
    except JournalError:
        assert path.read_bytes() == before
        return
    with contextlib.suppress(JournalError):
        assert listed(path) == complete
        assert read_journal(path) == expected_texts(16)


@fuzz
@given(damages)
def test_any_damage_is_an_error_and_never_a_crash(tmp_path: Path, healthy: JournalFiles, damages: list[Damage]) -> None:
    for after in ((apply(healthy[0], damages), healthy[1]), (healthy[0], apply(healthy[1], damages))):
        with contextlib.suppress(JournalError):
            listed(write_files(tmp_path / "j", *after))


@pytest.mark.parametrize("frame", [0, 1, 10])
def test_a_damaged_frame_that_others_follow_is_reported_and_the_log_is_kept(
    tmp_path: Path, healthy: JournalFiles, frame: int
) -> None:
    log = bytearray(healthy[1])
    log[32 + frame * FRAME + 1000] ^= 4
    path = write_files(tmp_path / "j", healthy[0], bytes(log))
    for _ in range(2):
        with pytest.raises(JournalError, match="wrong checksum"):
            Journal(path)
    assert path.with_name("chats.db-wal").read_bytes() == log
    recovered = recover(path, path.with_name("copy.db"))
    assert (recovered.chats, recovered.messages + recovered.lost) == (16, len(expected_texts(16)))


@pytest.mark.parametrize("rest", [b"", b"S", b"SQ"])
def test_a_log_without_its_database_is_not_deleted(tmp_path: Path, healthy: JournalFiles, rest: bytes) -> None:
    path = write_files(tmp_path / "j", rest, healthy[1])
    with pytest.raises(JournalError, match="damaged"):
        Journal(path)
    assert path.with_name("chats.db-wal").read_bytes() == healthy[1]
    assert recover(path, path.with_name("copy.db")).chats >= 8


def test_an_unfinished_transaction_at_the_end_of_the_log_is_no_damage(tmp_path: Path, healthy: JournalFiles) -> None:
    for cut in (100, FRAME - 1, FRAME + 7):
        path = write_files(tmp_path / "j", healthy[0], healthy[1][:-cut])
        assert len(listed(path)) in (15, 16)


def test_a_lost_message_is_marked_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with contextlib.closing(Journal(path)) as journal:
        thread = Thread()
        JournalWriter(journal, thread, "tiny")
        for number, text in enumerate(("Q1", "A1", "Q2", "A2", "Q3", "A3")):
            message = thread.add((USER, ASSISTANT)[number % 2], text)
            thread.update(message, finish_reason="end of answer" if number % 2 else "")
        with journal.transaction() as db:
            db.execute("DELETE FROM messages WHERE number IN (3, 6)")
    assert recover(path, tmp_path / "copy.db") == (1, 4, 0, 2)
    with contextlib.closing(Journal(tmp_path / "copy.db")) as journal:
        path_of_chat = journal.load_thread(1).path
    assert [message.text for message in path_of_chat] == ["Q1", "A1", LOST, "A2", "Q3", LOST]
    assert [message.role for message in path_of_chat] == [USER, ASSISTANT] * 3


def test_the_beginning_of_a_long_message_is_recovered(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    long = "".join(f"{number:06} " for number in range(5_000))
    with contextlib.closing(Journal(path)) as journal:
        thread = Thread()
        JournalWriter(journal, thread, "tiny")
        thread.add(USER, "Count")
        thread.update(thread.add(ASSISTANT, long), finish_reason="end of answer")
    path.write_bytes(path.read_bytes()[: -2 * PAGE])
    assert recover(path, tmp_path / "copy.db") == (1, 2, 1, 0)
    with contextlib.closing(Journal(tmp_path / "copy.db")) as journal:
        answer = journal.load_thread(1).path[1]
    assert len(answer.text) > 20_000 and long.startswith(answer.text)
    assert answer.finish_reason == "interrupted"


def test_deleted_chats_and_earlier_versions_of_an_answer_do_not_come_back(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with contextlib.closing(Journal(path)) as journal:
        write_chats(journal, range(1, 5))
        journal.delete_chat(2)
        thread = Thread()
        JournalWriter(journal, thread, "tiny")
        answer = thread.add(ASSISTANT, "")
        for length in range(1, 40):
            thread.update(answer, text="x" * 200 * length, finish_reason="token limit")
        shutil.copy(path, tmp_path / "copied.db")
        shutil.copy(f"{path}-wal", tmp_path / "copied.db-wal")
    assert recover(tmp_path / "copied.db", tmp_path / "copy.db").cut == 0
    with contextlib.closing(Journal(tmp_path / "copy.db")) as journal:
        assert sorted(chat.id for chat in journal.list_chats()) == [1, 3, 4, 5]
        assert len(journal.load_thread(5).path[0].text) == 200 * 39


def test_a_journal_with_an_open_chat_is_not_recovered(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with contextlib.closing(Journal(path)) as journal:
        write_chats(journal, range(1, 2))
    with open_in_another_process(path, 1), pytest.raises(JournalError, match="open in another window"):
        recover(path, tmp_path / "copy.db")
    assert recover(path, tmp_path / "copy.db").chats == 1


def test_recovery_works_in_folders_with_special_characters(tmp_path: Path) -> None:
    folder = tmp_path / "a#b?c%41"
    folder.mkdir()
    with contextlib.closing(Journal(folder / "chats.db")) as journal:
        write_chats(journal, range(1, 2))
    assert recover(folder / "chats.db", folder / "copy.db").chats == 1


# --- the commands

COMMANDS = (["chats"], ["chats", "list", "--json"], ["chats", "show", "last"], ["chats", "search", "lorem"])


def run_commands(invoke: Run) -> Mapping[str, int]:
    return {" ".join(command): invoke(*command).returncode for command in COMMANDS}


@pytest.mark.parametrize("seed", range(12))
def test_commands_report_damage_and_recover_the_rest(
    invoke: Run, healthy: JournalFiles, seed: int, folders: Folders
) -> None:
    generator = random.Random(seed)
    pages = [healthy[0][at : at + PAGE] for at in range(0, len(healthy[0]), PAGE)]
    shuffled = pages[1:]
    generator.shuffle(shuffled)
    data = (
        b"".join([pages[0], *shuffled]),
        healthy[0][: len(healthy[0]) * 2 // 3],
        generator.randbytes(19) + healthy[0][19:],
        apply(healthy[0], [flip_bits(seed, 2_000)]),
    )[seed % 4]
    folders.home.mkdir(parents=True)
    path = folders.journal
    path.write_bytes(data)
    assert set(run_commands(invoke).values()) == {6}
    assert path.read_bytes() == data
    result = invoke("chats", "recover")
    assert result.returncode == 0
    assert re.search(r"Recovered [1-9]\d* chats with [1-9]\d* messages\.", result.stderr)
    assert set(run_commands(invoke).values()) == {0}
    (kept,) = folders.home.glob("chats.db.damaged-*")
    assert kept.read_bytes() == data


def test_a_journal_without_any_readable_message_is_kept_and_recovery_fails(invoke: Run, folders: Folders) -> None:
    folders.home.mkdir(parents=True)
    for number, content in enumerate((b"garbage" * 3_000, bytes(9 * PAGE), b"")):
        folders.journal.write_bytes(content)
        result = invoke("chats", "recover")
        assert (result.returncode, "no readable message" in result.stderr) == (6, True), number
        assert folders.journal.read_bytes() == content
        assert [path.name for path in folders.home.iterdir()] == ["chats.db"]


def test_recovering_twice_keeps_both_files(invoke: Run, healthy: JournalFiles, folders: Folders) -> None:
    folders.home.mkdir(parents=True)
    for _ in range(2):
        folders.journal.write_bytes(b"?" * 19 + healthy[0][19:])
        assert invoke("chats", "recover").returncode == 0
    assert len(list(folders.home.glob("chats.db.damaged-*"))) == 2


def test_recovering_logs_without_their_journals_keeps_all_of_them(
    invoke: Run, healthy: JournalFiles, folders: Folders
) -> None:
    folders.home.mkdir(parents=True)
    for _ in range(2):
        folders.journal.unlink(missing_ok=True)
        (folders.home / "chats.db-wal").write_bytes(healthy[1])
        assert invoke("chats", "recover").returncode == 0
    assert len(list(folders.home.glob("chats.db.damaged-*"))) == 2


def test_a_journal_that_is_not_damaged_or_newer_is_left_as_it_is(
    invoke: Run, healthy: JournalFiles, folders: Folders
) -> None:
    folders.home.mkdir(parents=True)
    folders.journal.write_bytes(healthy[0])
    result = invoke("chats", "recover")
    assert (result.returncode, "not damaged; nothing was changed" in result.stderr) == (0, True)
    with contextlib.closing(sqlite3.connect(folders.journal)) as db:
        db.execute("PRAGMA user_version = 2")
    result = invoke("chats", "recover")
    assert (result.returncode, "written by a newer version" in result.stderr) == (6, True)
    assert not list(folders.home.glob("*damaged*"))


def test_a_folder_in_place_of_the_journal_is_an_error(invoke: Run, folders: Folders) -> None:
    folders.journal.mkdir(parents=True)
    for command in ((), ("recover",)):
        result = invoke("chats", *command)
        assert (result.returncode, "it is not a file" in result.stderr) == (6, True)
