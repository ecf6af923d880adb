"""Incremental detokenizing, with stop strings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.engine.tokenizer import IncrementalDetokenizer


def split_bytes(data: bytes, cuts: list[int]) -> list[bytes]:
    """Split `data` at the given positions."""
    positions = sorted({min(cut, len(data)) for cut in cuts})
    return [data[a:b] for a, b in zip([0, *positions], [*positions, len(data)], strict=True)]


@given(st.text(), st.lists(st.integers(0, 200), max_size=20))
def test_text_does_not_depend_on_how_its_bytes_are_split(text: str, cuts: list[int]) -> None:
    stream = IncrementalDetokenizer()
    assert "".join(stream.feed(piece) for piece in split_bytes(text.encode(), cuts)) + stream.finish() == text


@given(
    st.text(alphabet="abc", max_size=40),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 40), max_size=10),
)
def test_text_ends_before_the_first_stop_string_however_tokens_are_split(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    stream = IncrementalDetokenizer(stops)
    shown = "".join(stream.feed(piece) for piece in split_bytes(text.encode(), cuts)) + stream.finish()
    found = [text.find(stop) for stop in stops if stop in text]
    if found and stream.matched_stop:
        assert shown == text[: len(shown)]
        assert text.startswith(stream.matched_stop, len(shown))
        assert not any(stop in shown for stop in stops)
    else:
        assert not found
        assert shown == text


def test_a_split_character_appears_when_it_is_complete() -> None:
    stream = IncrementalDetokenizer()
    first, second = "你".encode()[:2], "你".encode()[2:]
    assert stream.feed(first) == ""
    assert stream.feed(second) == "你"


def test_invalid_utf8_becomes_replacement_characters() -> None:
    stream = IncrementalDetokenizer()
    assert stream.feed(b"a\xffb") + stream.feed("你".encode()[:2]) + stream.finish() == "a\ufffdb\ufffd"


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    stream = IncrementalDetokenizer(["END"])
    assert stream.feed(b"an E") == "an "
    assert stream.feed(b"ND of it") == ""
    assert stream.matched_stop == "END"
    assert stream.feed(b"more") == stream.finish() == ""


def test_held_back_text_does_not_grow_with_the_answer() -> None:
    """Otherwise the work for a token would grow, too."""
    stream = IncrementalDetokenizer(["never said"])
    held = 0
    for _ in range(5000):
        shown = stream.feed(b"never sai ")
        held += 10 - len(shown)
        assert 0 <= held < len("never said")
