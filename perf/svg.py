"""Line charts as SVG, with nothing but text: two axes (x evenly spaced, y linear or logarithmic), a legend.
And waterfalls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from perf.hops import Bar

WIDTH, HEIGHT = 920, 440
LEFT, RIGHT, TOP, BOTTOM = 80, 270, 40, 50
COLOURS = ("#0b6fb8", "#d1495b", "#2e8b57", "#e08e0b", "#6f42c1", "#13868f", "#8a5a2b", "#444444")
DASHES = ("", "6 3", "2 3")


Series = dict[str, dict[str, float]]  # name -> x label -> y


def chart(title: str, x_title: str, y_title: str, series: Series, logarithmic: bool = False) -> str:
    """One chart. Points that a series does not have are left out of its line."""
    labels = list(dict.fromkeys(label for points in series.values() for label in points))
    values = [y for points in series.values() for y in points.values()]
    low, high, ticks = scale(values, logarithmic)

    def x(label: str) -> float:
        step = (WIDTH - LEFT - RIGHT) / max(1, len(labels) - 1)
        return LEFT + labels.index(label) * step

    def y(value: float) -> float:
        part = math.log(max(value, low) / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    def drawn() -> Iterator[str]:
        yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
        yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        yield text((LEFT + WIDTH - RIGHT) / 2, 22, title, 15)
        yield text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_title)
        yield f'<g transform="translate(16 {HEIGHT / 2}) rotate(-90)">{text(0, 0, y_title)}</g>'
        for tick in ticks:
            yield line([(LEFT, y(tick)), (WIDTH - RIGHT, y(tick))], "#dddddd")
            yield text(LEFT - 6, y(tick) + 4, short(tick), anchor="end")
        for label in labels:
            yield text(x(label), HEIGHT - BOTTOM + 18, label)
        for number, (name, points) in enumerate(series.items()):
            colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
            at = [(x(label), y(value)) for label, value in points.items()]
            yield line(at, colour, dash, 2)
            yield from (f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in at)
            row = TOP + 10 + 18 * number
            yield line([(WIDTH - RIGHT + 14, row - 4), (WIDTH - RIGHT + 40, row - 4)], colour, dash, 2)
            yield text(WIDTH - RIGHT + 46, row, name, anchor="start")
        yield "</svg>"

    return "\n".join(drawn()) + "\n"


def waterfall(title: str, bars: Sequence[Bar]) -> str:
    """A row for each bar: where it begins, its median, its 99th percentile as a thin line. A colour for each stage."""
    end = max(bar.start + max(bar.median, 0.0) for bar in bars) * 1.15 or 1.0
    left, row = 310, 18
    height = TOP + row * len(bars) + BOTTOM
    _, _, ticks = scale([end], False)
    owners = list(dict.fromkeys((bar.node, bar.stage) for bar in bars))

    def x(us: float) -> float:
        return left + min(us, end) / end * (WIDTH - left - 140)

    def drawn() -> Iterator[str]:
        yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">'
        yield f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
        yield text(WIDTH / 2, 22, title, 15)
        yield text((left + WIDTH - 140) / 2, height - 10, "microseconds; bar: median, line: to the 99th percentile")
        for tick in (tick for tick in ticks if tick <= end):
            yield line([(x(tick), TOP), (x(tick), height - BOTTOM)], "#dddddd")
            yield text(x(tick), height - BOTTOM + 16, short(tick))
        for number, bar in enumerate(bars):
            colour = COLOURS[owners.index((bar.node, bar.stage)) % len(COLOURS)]
            y = TOP + row * number
            yield text(left - 8, y + 12, f"{bar.node} {bar.stage}: {bar.what}", 11, "end")
            yield line([(x(bar.start), y + 8), (x(bar.start + bar.p99), y + 8)], colour)
            wide = max(1.0, x(bar.start + bar.median) - x(bar.start))
            yield f'<rect x="{x(bar.start):.1f}" y="{y + 2}" width="{wide:.1f}" height="12" fill="{colour}"/>'
            yield text(WIDTH - 132, y + 12, f"{bar.median:.1f} (p99 {bar.p99:.1f})", 11, "start")
        yield "</svg>"

    return "\n".join(drawn()) + "\n"


def scale(values: Sequence[float], logarithmic: bool) -> tuple[float, float, list[float]]:
    """Lowest and highest of the axis, and where its lines are."""
    most = max(values, default=1.0) or 1.0
    if logarithmic:
        least = min((value for value in values if value > 0), default=1.0)
        first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
        last = max(last, first + 1)
        return 10.0**first, 10.0**last, [10.0**power for power in range(first, last + 1)]
    step = 10 ** math.floor(math.log10(most))
    step = next(s for s in (step / 5, step / 2, step, step * 2) if most / s <= 6)
    count = math.ceil(most / step)
    return 0.0, count * step, [n * step for n in range(count + 1)]


def short(value: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'


def line(points: Sequence[tuple[float, float]], colour: str, dash: str = "", width: int = 1) -> str:
    at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'
