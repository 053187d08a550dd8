"""A matplotlib figure as SVG inside an HTML page.

matplotlib draws; this makes its file a part of a page: one that needs no ids (several pictures share a page), no clip
paths and no names of the network, whose colours are the page's CSS variables, so that one picture serves light and
dark, and whose marks tell their details where the reader points at them.

`ink` colours become variables. Of the gids of artists, one in `details` gets that text as its `<title>`, one in
`CLASSES` becomes a class; every other id is dropped. Text is escaped by the XML writer and can't be markup.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES = 8  # variables --s0 .. --s7; --s0 is the reference's
INKS = (*(f"s{number}" for number in range(SERIES)), "ink", "soft", "faint", "rule", "grid", "card")
CLASSES = frozenset({"name", "path", "front"})
MOST = 60  # characters of one text
_COLOUR = {f"#0101{number:02x}": f"var(--{name})" for number, name in enumerate(INKS)}
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "dsc",
    "text.parse_math": False,  # a name with two dollars is a name
    "font.size": 12.5,
    "font.family": "DejaVu Sans",  # measured with; the page's own face is narrower
    "axes.spines.top": False,
    "axes.spines.right": False,
    "path.simplify": False,
}
_NUMBER = re.compile(r"-?\d+\.\d+")


def ink(name: str) -> str:
    """Return the colour that becomes the CSS variable `--name`."""
    return f"#0101{INKS.index(name):02x}"


def plain(words: str) -> str:
    """Text for a picture: what XML can't hold replaced, and cut at `MOST` characters."""
    clean = "".join(letter if letter.isprintable() else "�" for letter in words)
    return clean if len(clean) <= MOST else clean[: MOST - 1] + "…"


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's settings for a page, whatever the user's own are; its warnings of fonts are silenced."""
    import matplotlib

    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), matplotlib.rc_context():
            warnings.simplefilter("ignore")
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            yield
    finally:
        log.setLevel(level)


def figure(width: float, height: float) -> Figure:
    """Make an empty figure of so many pixels."""
    from matplotlib.figure import Figure

    found = Figure(figsize=(width / 72, height / 72), dpi=72)
    found.patch.set_visible(False)
    return found


def inline(drawn: Figure, title: str, description: str, key: str, details: Mapping[str, str]) -> Markup:
    """`<svg>` that a screen reader announces by `title` and `description`; `key` makes their ids unique."""
    file = io.StringIO()
    drawn.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    root: ElementTree.Element = ElementTree.fromstring(file.getvalue())
    width, height = (f"{72 * inches:.0f}" for inches in drawn.get_size_inches())
    names = {"role": "img", "aria-labelledby": f"{key}-t {key}-d"} if title else {"aria-hidden": "true"}
    box = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    svg = ElementTree.Element("svg", {**box, "class": "chart" if title else "swatch", **names})
    if title:
        for tag, words in (("title", title), ("desc", description)):
            ElementTree.SubElement(svg, tag, {"id": f"{key}-{tag[0]}"}).text = _printable(words)
    shapes = {node.get("id"): node for node in root.iter() if _tag(node) == "path" and node.get("id")}
    svg.extend(_kept(root, shapes, details))
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _kept(node: ElementTree.Element, shapes: Mapping[str | None, ElementTree.Element], details: Mapping[str, str]
          ) -> Iterator[ElementTree.Element]:  # fmt: skip
    """Return the elements of `node` that draw something; groups stay only where they have a class or a detail."""
    for child in node:
        tag, name = _tag(child), child.get("id", "")
        if tag == "g":
            inside = list(_kept(child, shapes, details))
            if name in details or name in CLASSES:
                group = ElementTree.Element("g", {"class": name if name in CLASSES else "detail"})
                if name in details:
                    ElementTree.SubElement(group, "title").text = _printable(details[name])
                group.extend(inside)
                yield group
            else:
                yield from inside
        elif tag == "use":
            shape = shapes[child.get("{http://www.w3.org/1999/xlink}href", "").removeprefix("#")]
            place = _short(f"translate({child.get('x')} {child.get('y')})")
            yield ElementTree.Element("path", {"d": _short(shape.get("d", "")), "transform": place, **_style(child)})
        elif tag == "path":
            yield ElementTree.Element("path", {"d": _short(child.get("d", "")), **_style(child)})
        elif tag == "text":
            x, y = _short(child.get("x", "0")), _short(child.get("y", "0"))
            words = ElementTree.Element("text", {"x": x, "y": y, **_style(child)})
            words.text = child.text
            yield words


def _tag(node: ElementTree.Element) -> str:
    return str(node.tag).rpartition("}")[2]


def _style(node: ElementTree.Element) -> dict[str, str]:
    """Return the style with variables for colours, without faces."""
    pairs = (pair.strip().partition(": ") for pair in node.get("style", "").split(";"))
    kept = {key: _COLOUR.get(value, value) for key, _, value in pairs if key and key != "font-family"}
    return {"style": ";".join(f"{key}:{value}" for key, value in kept.items())} if kept else {}


def _short(numbers: str) -> str:
    """Coordinates to a tenth of a pixel, on one line."""
    return " ".join(_NUMBER.sub(_rounded, numbers).split())


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.1f}".removesuffix(".0")


def _printable(words: str) -> str:
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in words)
