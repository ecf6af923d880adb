"""Settings and strategies for tests with random damage."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

fuzz = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """Generate copies of `content` with bytes changed, removed or inserted, or truncated."""

    def mutate(edits: list[tuple[float, int, bytes]], cut: float | None) -> bytes:
        data = bytearray(content)
        for place, kind, new in edits:
            at = int(place * len(data))
            if kind == 0:
                data[at : at + len(new)] = new
            elif kind == 1:
                data[at:at] = new
            else:
                del data[at : at + 1 + len(new)]
        return bytes(data if cut is None else data[: int(cut * len(data))])

    places = st.floats(0, 1, exclude_max=True)
    edit = st.tuples(places, st.integers(0, 2), st.binary(min_size=1, max_size=4))
    return st.builds(mutate, st.lists(edit, min_size=1, max_size=3), st.one_of(st.none(), st.none(), places))
