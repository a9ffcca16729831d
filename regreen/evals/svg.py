"""Small plots as inline SVG: lines, intervals, stacked shares, heat maps.

- Output is a fragment without scripts, external assets or fixed colours: series use the classes
  `s0` to `s7`, axes and text `axis`, so that the page's style sheet themes them.
- Every number that is drawn is also readable as text (a label or a `title`).
- All text is escaped; values that are not finite are left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Point = tuple[float, float]
_WIDTH, _HEIGHT = 560.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 12.0, 34.0


def line_chart(
    series: Mapping[str, Sequence[Sequence[float | None]]], *, y_label: str, percent: bool = False
) -> str:
    """Lines over steps, one per series; empty when nothing is finite."""
    kept = {name: _finite(points) for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    y_ticks = _ticks(min([*ys, 0.0] if percent else ys), max(ys))
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    across = _scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT)
    up = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(y_ticks, up, percent)]
    for tick in _steps(x_low, x_high):
        parts.append(_text(across(tick), _HEIGHT - 16, f"{tick:g}", anchor="middle"))
    for index, (name, points) in enumerate(kept.items()):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        last = f"{name}: {_number(points[-1][1], percent)} at step {points[-1][0]:g}"
        parts.append(
            f'<g class="s{index % 8}"><title>{escape(last)}</title>'
            f'<polyline class="line" points="{path}"/>'
            + "".join(
                f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.4"/>' for x, y in points[-60:]
            )
            + "</g>"
        )
    legend = _legend(list(kept)) if len(kept) > 1 else ""
    return _figure(parts, _HEIGHT, y_label) + legend


def interval_chart(rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Rates in [0, 1] with their intervals, one row each: (label, value, low, high)."""
    if not rows:
        return ""
    left, height = 190.0, 26.0 * len(rows) + 34
    across = _scale(0.0, 1.0, left, _WIDTH - 64)
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = across(tick)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" y1="6" x2="{x:.1f}" y2="{height - 26:.1f}"/>'
            + _text(x, height - 10, f"{tick:.0%}", anchor="middle")
        )
    for index, (label, value, low, high) in enumerate(rows):
        y = 20.0 + 26.0 * index
        parts.append(_text(left - 10, y + 4, label, anchor="end"))
        if not all(map(math.isfinite, (value, low, high))):
            parts.append(_text(left + 6, y + 4, "no samples"))
            continue
        parts.append(
            f'<g class="s{index % 8}"><line class="whisker" x1="{across(low):.1f}" y1="{y:.1f}" '
            f'x2="{across(high):.1f}" y2="{y:.1f}"/>'
            f'<circle cx="{across(value):.1f}" cy="{y:.1f}" r="5"/></g>'
            + _text(_WIDTH - 56, y + 4, f"{value:.1%}")
        )
    return _figure(parts, height, "")


def share_bars(rows: Mapping[str, Mapping[str, float]]) -> str:
    """One stacked bar per row; shares of a row sum to 1."""
    names = list(dict.fromkeys(name for shares in rows.values() for name in shares))
    if not names:
        return ""
    names.sort(key=lambda name: -max(shares.get(name, 0.0) for shares in rows.values()))
    left, height = 130.0, 30.0 * len(rows) + 8
    across = _scale(0.0, 1.0, left, _WIDTH - 8)
    parts = []
    for index, (label, shares) in enumerate(rows.items()):
        y, start = 6.0 + 30.0 * index, 0.0
        parts.append(_text(left - 10, y + 16, label, anchor="end"))
        for name in names:
            share = shares.get(name, 0.0)
            if share <= 0:
                continue
            x, width = across(start), across(start + share) - across(start)
            parts.append(
                f'<g class="s{names.index(name) % 8}"><title>'
                f"{escape(label)}: {escape(name)} {share:.1%}</title>"
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width - 1, 0.5):.1f}" height="22"/></g>'
            )
            if width > 40:
                parts.append(
                    _text(x + width / 2, y + 15, f"{share:.0%}", anchor="middle", cls="on")
                )
            start += share
    return _figure(parts, height, "") + _legend(names)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    signed: bool = False,
) -> str:
    """A matrix with its numbers; opacity is the magnitude, class `neg` marks negative cells."""
    if not rows or not columns:
        return ""
    left, top, cell = 150.0, 100.0, 34.0
    # Slanted labels of the last columns reach past the cells.
    width, height = left + cell * len(columns) + 64, top + cell * len(rows) + 6
    parts = []
    for j, column in enumerate(columns):
        x, y = left + cell * j + cell / 2, top - 8
        parts.append(
            f'<text class="axis" transform="translate({x:.1f},{y:.1f}) rotate(-45)">'
            f"{escape(column)}</text>"
        )
    for i, row in enumerate(rows):
        parts.append(_text(left - 8, top + cell * i + cell / 2 + 4, row, anchor="end"))
        for j, column in enumerate(columns):
            value = values[i][j]
            x, y = left + cell * j, top + cell * i
            shown = f"{value:+.2f}" if signed else f"{value:.2f}"
            sign = "neg" if value < 0 else "pos"
            parts.append(
                f"<g><title>{escape(row)} to {escape(column)}: {shown}</title>"
                f'<rect class="cell {sign}" fill-opacity="{min(1.0, abs(value)):.2f}" '
                f'x="{x:.1f}" y="{y:.1f}" width="{cell - 2:.1f}" height="{cell - 2:.1f}"/>'
                + (
                    _text(
                        x + cell / 2 - 1, y + cell / 2 + 3, shown[-5:], anchor="middle", cls="num"
                    )
                    if abs(value) >= 0.005
                    else ""
                )
                + "</g>"
            )
    return (
        f'<svg role="img" viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px">'
        + "".join(parts)
        + "</svg>"
    )


def _finite(points: Sequence[Sequence[float | None]]) -> list[Point]:
    return [
        (x, y)
        for x, y in points
        if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)
    ]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low if high != low else 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values that enclose [low, high]."""
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw - 1e-12)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _steps(low: float, high: float) -> list[float]:
    ticks = [t for t in _ticks(low, high, 6) if low <= t <= high and float(t).is_integer()]
    return ticks or [low, high]


def _grid(ticks: Sequence[float], up: Callable[[float], float], percent: bool) -> str:
    right = _WIDTH - _RIGHT
    return "".join(
        f'<line class="grid" x1="{_LEFT}" y1="{up(t):.1f}" x2="{right}" y2="{up(t):.1f}"/>'
        + _text(_LEFT - 6, up(t) + 4, _number(t, percent), anchor="end")
        for t in ticks
    )


def _number(value: float, percent: bool) -> str:
    return f"{value:.0%}" if percent else f"{value:.4g}"


def _text(x: float, y: float, text: str, *, anchor: str = "start", cls: str = "axis") -> str:
    return (
        f'<text class="{cls}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _figure(parts: Sequence[str], height: float, label: str) -> str:
    caption = f'<text class="axis" x="{_LEFT}" y="{_HEIGHT - 2:.0f}">step</text>' if label else ""
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH:.0f} {height:.0f}">'
        + "".join(parts)
        + caption
        + "</svg>"
    )


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<span class="key s{index % 8}">{escape(name)}</span>' for index, name in enumerate(names)
    )
    return f'<p class="legend">{items}</p>'
