"""Charts of a model's quality as SVG, readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from qwenlocal.formatting import format_bytes

_WIDTH, _HEIGHT, _BAR = 720, 420, 26
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 90, 50, 50  # margins around the plot
_COLOR, _GRAY = "#7c5cff", "#8a8f98"
_DECADES = 4  # of a logarithmic axis, at most


class LevelPoint(NamedTuple):
    """A level in the chart of levels: the size of its file in bytes, and its mean KL divergence."""

    name: str
    size: int
    kl: float


def draw_quantiles(title: str, quantiles: Mapping[str, float]) -> str:
    """Draw one bar for each quantile of the KL divergence: `draw_quantiles("tiny", {"median": 0.01, "99%": 0.2})`."""
    largest = max((value for value in quantiles.values() if value > 0), default=1.0)
    parts, top = [_text(8, 24, title, bold=True)], _TOP
    for name, value in quantiles.items():
        length = (_WIDTH - _LEFT - _RIGHT) * _log_share(value, largest)
        parts.append(_text(8, top + _BAR - 12, name))
        parts.append(f'<rect x="{_LEFT}" y="{top}" width="{length:.1f}" height="{_BAR - 8}" fill="{_COLOR}"/>')
        parts.append(_text(_LEFT + length + 6, top + _BAR - 12, f"{value:.3g}"))
        top += _BAR
    return _document(parts, top + 12)


def draw_levels(title: str, points: Sequence[LevelPoint]) -> str:
    """Draw levels by size (to the right) and mean KL divergence (upwards, logarithmic)."""
    largest_size = max(point.size for point in points)
    largest_kl = max((point.kl for point in points if point.kl > 0), default=1.0)
    bottom, plot_width, plot_height = _HEIGHT - _BOTTOM, _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    parts = [_text(8, 24, title, bold=True), *_axes(largest_size, largest_kl)]
    for index, point in enumerate(sorted(points, key=lambda point: point.size)):
        x = _LEFT + plot_width * point.size / largest_size
        y = bottom - plot_height * _log_share(point.kl, largest_kl)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{_COLOR}"/>')
        is_left = index % 2 == 0  # levels of similar size have their names on different sides
        parts.append(_text(x - 9 if is_left else x + 9, y + 4, point.name, anchor="end" if is_left else "start"))
    return _document(parts, _HEIGHT)


def _axes(largest_size: int, largest_kl: float) -> Iterator[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    yield f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="{_GRAY}"/>'
    for share in (0.25, 0.5, 0.75, 1.0):
        yield _text(_LEFT + (right - _LEFT) * share - 20, bottom + 20, format_bytes(round(largest_size * share)))
    for decade in range(_DECADES):
        share = 1 - decade / _DECADES
        yield _text(8, bottom - (bottom - _TOP) * share + 4, f"KL {largest_kl / 10**decade:.2g}")


def _log_share(value: float, largest: float) -> float:
    """`_log_share(0.01, 1.0)` is 0.5: two of four decades below the largest value; 0 for more than four."""
    return max(0.0, 1 + math.log10(value / largest) / _DECADES) if value > 0 else 0.0


def _text(x: float, y: float, text: str, *, bold: bool = False, anchor: str = "start") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _document(parts: Sequence[str], height: float) -> str:
    style = f"text{{font:13px system-ui,sans-serif;fill:{_GRAY}}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {_WIDTH} {height:.0f}"><style>{style}</style>{"".join(parts)}</svg>\n'
    )
