"""Charts of a model's quality as SVG, readable on light and dark pages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from qwenlocal.formatting import format_bytes

_WIDTH, _HEIGHT, _BAR = 720, 420, 26
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 90, 60, 40  # margins around the plot
_COLOR, _GRAY = "#7c5cff", "#8a8f98"
_DECADES = 4  # of the bars, below the longest
_LEAST_KL = 1e-6  # nats: less is only rounding
_CHARACTER, _LINE, _RADIUS = 8, 15, 5  # pixels: at most, of text of 13 pixels
_MAX_TITLE = 80  # characters


class LevelPoint(NamedTuple):
    """A level in the chart of levels: the size of its file in bytes, and its mean KL divergence."""

    name: str
    size: int
    kl: float


# --- quantiles


def draw_quantiles(title: str, quantiles: Mapping[str, float]) -> str:
    """Draw one bar for each quantile of the KL divergence: `draw_quantiles("tiny", {"median": 0.01, "99%": 0.2})`."""
    largest = max((value for value in quantiles.values() if value > 0), default=1.0)
    parts, top = [], _TOP
    for name, value in quantiles.items():
        length = (_WIDTH - _LEFT - _RIGHT) * _bar_share(value, largest)
        parts.append(_text(8, top + _BAR - 12, name))
        parts.append(f'<rect x="{_LEFT}" y="{top}" width="{length:.1f}" height="{_BAR - 8}" fill="{_COLOR}"/>')
        parts.append(_text(_LEFT + length + 6, top + _BAR - 12, f"{value:.3g}"))
        top += _BAR
    return _document(title, "nats per token, logarithmic", parts, top + 12)


def _bar_share(value: float, largest: float) -> float:
    """`_bar_share(0.01, 1.0)` is 0.5: two of four decades below the largest value; 0 for more than four."""
    return max(0.0, 1 + math.log10(value / largest) / _DECADES) if value > 0 else 0.0


# --- levels


class Axis(NamedTuple):
    """A linear scale: the values at its ends, and the pixels there."""

    first: float
    last: float
    begin: float
    end: float

    def position(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.begin + (self.end - self.begin) * (value - self.first) / (self.last - self.first)


class Box(NamedTuple):
    """A rectangle, in pixels."""

    left: float
    top: float
    width: float
    height: float

    def overlaps(self, other: Box) -> bool:
        """Return True if both have pixels in common."""
        return (
            self.left < other.left + other.width
            and other.left < self.left + self.width
            and self.top < other.top + other.height
            and other.top < self.top + self.height
        )


def draw_levels(title: str, points: Sequence[LevelPoint]) -> str:
    """Draw levels by size (to the right) and mean KL divergence (upwards, logarithmic)."""
    points = sorted(points, key=lambda point: point.size)
    sizes = [point.size for point in points]
    decades = [math.log10(max(point.kl, _LEAST_KL)) for point in points]
    lowest, highest = math.floor(min(decades)), math.ceil(max(decades))
    x = Axis(0.8 * min(sizes), max(sizes), _LEFT, _WIDTH - _RIGHT)
    y = Axis(lowest, max(highest, lowest + 1), _HEIGHT - _BOTTOM, _TOP)
    places = [(x.position(size), y.position(decade)) for size, decade in zip(sizes, decades, strict=True)]
    circles = [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="{_RADIUS}" fill="{_COLOR}"/>' for left, top in places]
    labels = _labels([point.name for point in points], places)
    return _document(
        title, "mean KL divergence in nats per token, by file size", [*_axes(x, y), *circles, *labels], _HEIGHT
    )


def _axes(x: Axis, y: Axis) -> Iterator[str]:
    yield f'<path d="M{x.begin} {y.end}V{y.begin}H{x.end}" fill="none" stroke="{_GRAY}"/>'
    for quarter in range(5):
        size = x.first + (x.last - x.first) * quarter / 4
        yield _text(x.position(size), y.begin + 20, format_bytes(round(size)), anchor="middle")
    for decade in range(int(y.first), int(y.last) + 1):
        yield _text(x.begin - 8, y.position(decade) + 4, f"{10.0**decade:g}", anchor="end")


def _labels(names: Sequence[str], places: Sequence[tuple[float, float]]) -> Iterator[str]:
    """Write each name beside its point; if that would hide something, above or below, with a line to the point."""
    taken = [Box(x - _RADIUS, y - _RADIUS, 2 * _RADIUS, 2 * _RADIUS) for x, y in places]
    for name, (x, y) in zip(names, places, strict=True):
        boxes = _boxes_around(x, y, _CHARACTER * len(name))
        box = next(box for box in boxes if not any(box.overlaps(other) for other in taken))
        taken.append(box)
        middle = box.top + _LINE / 2
        edge, anchor = (box.left, "start") if box.left > x else (box.left + box.width, "end")
        if middle != y:
            yield f'<path d="M{x:.1f} {y:.1f}L{edge:.1f} {middle:.1f}" stroke="{_GRAY}" stroke-width="0.5"/>'
        yield _text(edge, middle + 4, name, anchor=anchor)


def _boxes_around(x: float, y: float, width: float) -> Iterator[Box]:
    """Yield boxes for a line of text to the right and left of a point, and then farther and farther up and down."""
    gap = _RADIUS + 4
    for distance in itertools.count():
        for middle in (y - distance * _LINE, y + distance * _LINE):
            yield Box(x + gap, middle - _LINE / 2, width, _LINE)
            yield Box(x - gap - width, middle - _LINE / 2, width, _LINE)


# --- elements


def _text(x: float, y: float, text: str, *, anchor: str = "start", style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _document(title: str, unit: str, parts: Sequence[str], height: float) -> str:
    if len(title) > _MAX_TITLE:
        title = f"…{title[-_MAX_TITLE:]}"
    head = _text(8, 22, title, style=' style="font-weight:bold"') + _text(8, 40, unit)
    style = f"text{{font:13px system-ui,sans-serif;fill:{_GRAY}}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {_WIDTH} {height:.0f}"><style>{style}</style>{head}{"".join(parts)}</svg>\n'
    )
