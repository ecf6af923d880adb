"""Grouped bar charts as SVG, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

_WIDTH, _LEFT, _BAR, _GAP = 720, 130, 16, 18
_COLORS = ("#7c5cff", "#8a8f98")


def draw_bar_chart(title: str, series: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """
    Draw one group of bars per row, with one bar per series.

    Each group has its own scale, since prefill is many times faster than decoding.
    `draw_bar_chart("tokens/s", ["ours", "theirs"], [("tg128", [30.0, 29.0])])`
    """
    parts, top = [f'<text x="8" y="20" font-weight="bold">{escape(title)}</text>'], 40
    for number, name in enumerate(series):
        parts.append(f'<rect x="{8 + 150 * number}" y="{top - 8}" width="10" height="10" fill="{_COLORS[number]}"/>')
        parts.append(f'<text x="{24 + 150 * number}" y="{top + 2}">{escape(name)}</text>')
    top += 20
    for label, values in rows:
        parts.append(f'<text x="8" y="{top + _BAR}">{escape(label)}</text>')
        for number, value in enumerate(values):
            length = (_WIDTH - _LEFT - 90) * value / max(values)
            y = top + number * _BAR
            parts.append(
                f'<rect x="{_LEFT}" y="{y}" width="{length:.0f}" height="{_BAR - 2}" fill="{_COLORS[number]}"/>'
            )
            parts.append(f'<text x="{_LEFT + length + 6:.0f}" y="{y + _BAR - 4}">{value:,.1f}</text>')
        top += len(values) * _BAR + _GAP
    style = "text{font:13px system-ui,sans-serif;fill:#8a8f98}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" viewBox="0 0 {_WIDTH} {top}">'
        f"<style>{style}</style>{''.join(parts)}</svg>\n"
    )
