"""Small functions that write SVG: elements, axes, marks and where a label may stand.

Everything is text in, text out and deterministic: coordinates are rounded to a tenth of a pixel. Colours are CSS
classes (`s0` .. `s7` for the series), so that one picture serves the light and the dark page. Every series also has
its own shape, because colour alone does not reach every reader.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

SERIES = 8  # classes s0 .. s7; s0 is the reference's
CHARACTER = 0.61  # mean width of a character of a bold sans-serif face, in ems; generous, because faces differ


class Box(NamedTuple):
    """A rectangle in pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area shared with `other`."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


class Spot(NamedTuple):
    """Where a label stands: its anchor point, which end of the text is there, and the room it takes."""

    x: float
    baseline: float
    anchor: str
    box: Box


class Scale(NamedTuple):
    """Maps values to pixels, linearly or in the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where `value` lies, in pixels."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)


def element(tag: str, content: str = "", **attributes: object) -> str:
    """`<tag a="b">content</tag>`; `content` is markup already. `stroke_width` becomes `stroke-width`."""
    written = "".join(f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"' for name, value in attributes.items())
    return f"<{tag}{written}>{content}</{tag}>" if content else f"<{tag}{written}/>"


def text(x: float, y: float, words: str, class_: str = "tick", anchor: str = "start") -> str:
    """One line of text with its baseline at (x, y)."""
    return element("text", escape(words), x=x, y=y, class_=class_, text_anchor=anchor)


def picture(width: int, height: int, title: str, description: str, body: Sequence[str], key: str) -> str:
    """A whole `<svg>` that a screen reader announces by `title` and `description`; `key` makes its ids unique."""
    heads = element("title", escape(title), id=f"{key}-t") + element("desc", escape(description), id=f"{key}-d")
    names = f"{key}-t {key}-d"
    box = f"0 0 {width} {height}"
    return element(
        "svg",
        heads + "".join(body),
        viewBox=box,
        width=width,
        height=height,
        role="img",
        class_="chart",
        aria_labelledby=names,
    )


def mark(shape: int, x: float, y: float, size: float, class_: str) -> str:
    """A marker centred at (x, y) with half-width about `size`; `shape` counts through eight forms."""
    forms: dict[int, list[tuple[float, float]]] = {
        1: [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        2: [(0, -1.25), (1.2, 0.95), (-1.2, 0.95)],
        3: [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
        4: [(0, 1.25), (1.2, -0.95), (-1.2, -0.95)],
        5: [(0, -1.35), (1.28, -0.42), (0.79, 1.09), (-0.79, 1.09), (-1.28, -0.42)],
        6: [(-0.6, -1.2), (0.6, -1.2), (1.2, 0), (0.6, 1.2), (-0.6, 1.2), (-1.2, 0)],
        7: [(-1.3, -0.8), (1.3, -0.8), (1.3, 0.8), (-1.3, 0.8)],
    }
    corners = forms.get(shape % SERIES)
    if corners is None:
        return element("circle", cx=x, cy=y, r=size * 1.1, class_=class_)
    points = " ".join(f"{_value(x + size * dx)},{_value(y + size * dy)}" for dx, dy in corners)
    return element("polygon", points=points, class_=class_)


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round values (1, 2, 2.5 or 5 times a power of ten apart) inside [low, high]."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / most)) if span > 0 else 1.0
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [round(index * step, 12) for index in range(first, last + 1)]
    return [low, high]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """At most about `most` values from 1-2-5 series (or powers of ten, or every few of them) inside [low, high]."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        inside = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(inside) <= most:
            return inside
    return inside[:: math.ceil(len(inside) / most)]


def text_width(words: str, size: float) -> float:
    """An estimate in pixels; no font is measured."""
    return CHARACTER * size * len(words)


def place(words: str, x: float, y: float, size: float, frame: Box, taken: Sequence[Box]) -> Spot:
    """Where the label of the point (x, y) may stand with the least overlap.

    Tries places around the point, nearest first; the first of the best wins, so that the answer is stable.
    """
    width, gap = text_width(words, size), 11.0
    level, above, below = size * 0.35, -gap - 2, gap + size * 0.85
    sides = [("start", gap, level), ("end", -gap, level), ("middle", 0.0, above), ("middle", 0.0, below)]
    for rows in (0.0, 1.0, 2.0, 3.0):
        up, down = above - rows * (size + 3), below + rows * (size + 3)
        sides += [("start", 2.0, up), ("start", 2.0, down), ("end", -2.0, up), ("end", -2.0, down)]

    def spot(anchor: str, dx: float, dy: float) -> Spot:
        left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        box = Box(left, y + dy - size * 0.85, left + width, y + dy + size * 0.3)
        return Spot(x + dx, y + dy, anchor, box)

    def cost(found: Spot) -> int:
        box = found.box
        outside = (box.right - box.left) * (box.bottom - box.top) - box.overlap(frame)
        return round(sum(box.overlap(other) for other in taken) + 4 * outside)

    return min((spot(*side) for side in sides), key=cost)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions as little as needed so that they lie `gap` apart inside [low, high], in the same order."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [0.0] * len(wanted)
    floor = low
    for index in order:
        placed[index] = max(wanted[index], floor)
        floor = placed[index] + gap
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return escape(str(value), quote=True)
