"""Token bytes to text, with stop strings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.engine.text import TextStream


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` cut at the given places."""
    at = sorted({min(cut, len(data)) for cut in cuts})
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


@given(st.text(), st.lists(st.integers(0, 200), max_size=20))
def test_text_is_the_same_wherever_its_bytes_are_cut(text: str, cuts: list[int]) -> None:
    stream = TextStream()
    assert "".join(stream.feed(piece) for piece in pieces_of(text.encode(), cuts)) + stream.finish() == text


@given(
    st.text(alphabet="abc", max_size=40),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 40), max_size=10),
)
def test_text_ends_before_the_first_stop_string_wherever_the_tokens_are_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    stream = TextStream(stops)
    shown = "".join(stream.feed(piece) for piece in pieces_of(text.encode(), cuts)) + stream.finish()
    found = [text.find(stop) for stop in stops if stop in text]
    if found and stream.stopped:
        assert shown == text[: len(shown)]
        assert text.startswith(stream.stopped, len(shown))
        assert not any(stop in shown for stop in stops)
    else:
        assert not found
        assert shown == text


def test_a_character_cut_in_two_appears_when_it_is_whole() -> None:
    stream = TextStream()
    first, second = "你".encode()[:2], "你".encode()[2:]
    assert stream.feed(first) == ""
    assert stream.feed(second) == "你"


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    stream = TextStream()
    assert stream.feed(b"a\xffb") + stream.feed("你".encode()[:2]) + stream.finish() == "a\ufffdb\ufffd"


def test_text_that_might_become_a_stop_string_waits() -> None:
    stream = TextStream(["END"])
    assert stream.feed(b"an E") == "an "
    assert stream.feed(b"ND of it") == ""
    assert stream.stopped == "END"
    assert stream.feed(b"more") == stream.finish() == ""


def test_what_is_held_back_does_not_grow_with_the_answer() -> None:
    """So the work for a token does not either."""
    stream = TextStream(["never said"])
    held = 0
    for _ in range(5000):
        shown = stream.feed(b"never sai ")
        held += 10 - len(shown)
        assert 0 <= held < len("never said")
