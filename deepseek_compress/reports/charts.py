"""The pictures of a report: accuracy against size and speed, error by layer, tokens of each expert.

Each takes a record and a width in pixels and returns one `<svg>`, drawn by matplotlib; the page asks for a wide and a
narrow one, because text that is scaled down with its picture cannot be read on a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from deepseek_compress.reports import gate, proof, table
from deepseek_compress.reports.inline import SERIES, drawing, figure, ink, inline, plain
from deepseek_compress.reports.table import Model, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "os^DvphX"  # every series has its own shape, because colour alone does not reach every reader
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # a second and third round of the colours
NAMED = 8  # points that are labelled; more are named by the list below and by pointing
MARKED = 400  # points of lines that have marks of their own
LEVELS = 8  # shades of the experts' cells


class Axis(NamedTuple):
    """The vertical axis of the scatter."""

    key: str
    title: str
    share: bool  # a share of one, written in percent

    def write(self, value: float) -> str:
        """As text."""
        return table.percent(value) if self.share else table.significant(value)


class Across(NamedTuple):
    """The horizontal axis of the scatter."""

    title: str
    better: str
    find: Callable[[Model], Any]
    write: Callable[[float], str]
    sign: int  # 1 where less is better


AXES = (
    Axis("exact_match", "Exact match", True),
    Axis("top1_agreement", "Top-1 agreement with the reference", True),
    Axis("perplexity", "Perplexity", False),
)
SIZE = Across("Size on disk", "smaller is to the left", lambda model: model["bytes"] or None, table.size, 1)
SPEED = Across("Decode speed", "faster is to the right", lambda model: (model.get("speed") or {}).get(
    "decode_tokens_per_s"), lambda value: f"{table.rate(value)} tok/s", -1)  # fmt: skip


def accuracy_axis(record: Record, across: Across = SIZE) -> Axis | None:
    """Choose the first metric that a model with a place on `across` has; None where no model has both."""
    models = [model for model in table.everything(record) if across.find(model)]
    return next((a for a in AXES if any(_finite(m["metrics"].get(a.key)) for m in models)), None)


def series(record: Record) -> dict[str, int]:
    """Model name -> number of its colour and shape. The reference is 0; the others count from 1."""
    numbers: dict[str, int] = {}
    for model in table.everything(record):
        reference = model["name"] == record.get("reference")
        others = sum(1 for name in numbers if name != record.get("reference"))
        numbers[model["name"]] = 0 if reference else 1 + others % (SERIES - 1)
    return numbers


@lru_cache(maxsize=2 * SERIES)
def swatch(number: int, hollow: bool) -> Markup:
    """Draw the mark of a series, for a row of a table or a list."""
    with drawing():
        drawn = figure(14, 14)
        axes = drawn.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.set(xlim=(-1, 1), ylim=(-1, 1))
        axes.plot([0], [0], MARKERS[number], **_mark(number, hollow), markersize=9)
        return inline(drawn, "", "", "", {})


def scatter(record: Record, width: int, key: str, across: Across = SIZE) -> Markup | None:
    """Accuracy against size or speed, with 95 % intervals, the Pareto front, and a path to what was made of a model."""
    axis = accuracy_axis(record, across)
    if axis is None:
        return None
    points = [m for m in table.everything(record) if across.find(m) and _finite(m["metrics"].get(axis.key))]
    narrow = width < 520
    with drawing():
        drawn = figure(width, 300 if narrow else 400)
        axes = _frame(drawn, axis.title, f"{across.title} ({across.better})", 46)
        low, high = _vertical(_main(record, points), axis)
        axes.set_ylim(low, high)
        _horizontal(axes, [across.find(model) for model in points], across, 4 if narrow else 8)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %" if axis.share else table.trimmed(value))
        places = {m["name"]: (across.find(m), max(m["metrics"][axis.key], low)) for m in points}
        _paths(record, axes, places)
        _front(axes, points, axis, across, low)
        details = _points(record, axes, points, places, axis, across)
        if not narrow and len(points) <= NAMED:
            _names(record, axes, points, places, axis)
        words = "; ".join(details.values()).replace("\n", ", ")
        return inline(drawn, f"{axis.title} against {across.title.lower()}", words, key, details)


def _frame(drawn: Any, title: str, below: str, left: float) -> Axes:
    """Axes with their title above and the horizontal one's at the right below."""
    width, height = (72 * inches for inches in drawn.get_size_inches())
    box = (left / width, 48 / height, (width - left - 14) / width, (height - 48 - 34) / height)
    axes: Axes = drawn.add_axes(box)
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=ink("grid"))
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(ink("faint"))
    axes.tick_params(axis="x", color=ink("faint"), labelcolor=ink("soft"))
    axes.tick_params(axis="y", length=0, labelcolor=ink("soft"))
    drawn.text(0, 1 - 14 / height, plain(title), color=ink("soft"))
    drawn.text(1 - 14 / width, 8 / height, plain(below), color=ink("soft"), ha="right")
    return axes


def _main(record: Record, points: Sequence[Model]) -> Sequence[Model]:
    """Select the models that set the vertical range: the pipeline's. An ablation below it stands on the lower edge."""
    names = {model["name"] for model in record["models"]}
    return [model for model in points if model["name"] in names] or points


def _vertical(points: Sequence[Model], axis: Axis) -> tuple[float, float]:
    ends = [model["metrics"][axis.key] for model in points]
    ends += [limit for model in points for limit in _interval(model, axis.key) or ()]
    low, high = min(ends), max(ends)
    if axis.share:
        return max(0.0, math.floor((low - 0.02) * 20) / 20), 1.0
    margin = 0.12 * (high - low) or 0.1 * high or 1.0
    return max(0.0, low - margin), high + margin


def _horizontal(axes: Axes, values: Sequence[float], across: Across, most: int) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = min(values), max(values)
    if high / low > 8:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.35, high * 1.35)
        axes.xaxis.set_major_locator(LogLocator(subs=_subs(low / 1.35, high * 1.35, most), numticks=most + 1))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, high * 1.12)
        axes.xaxis.set_major_locator(MaxNLocator(most))
    axes.xaxis.set_major_formatter(lambda value, _: _tick(across, value))


def _subs(low: float, high: float, most: int) -> tuple[int, ...]:
    """Return the finest multiples of powers of ten of which at most `most` lie between `low` and `high`."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for subs in ((1, 2, 5), (1, 3)):
        if sum(low <= each * 10.0**decade <= high for each in subs for decade in decades) <= most:
            return subs
    return (1,)


def _tick(across: Across, value: float) -> str:
    number, unit = across.write(value).split(" ")
    return "0" if value == 0 else f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def _paths(record: Record, axes: Axes, places: Mapping[str, tuple[float, float]]) -> None:
    for model in table.everything(record):
        parent = parent_of(record, model)
        if parent is not None and model["name"] in places and parent in places:
            (x1, y1), (x2, y2) = places[parent], places[model["name"]]
            axes.plot([x1, x2], [y1, y2], ":", color=ink("faint"), linewidth=1.2, gid="path")


def _front(axes: Axes, points: Sequence[Model], axis: Axis, across: Across, low: float) -> None:
    """Draw a line through the models that no other beats in both."""
    sign = 1 if axis.share else -1
    best = gate.front([(across.sign * across.find(m), sign * m["metrics"][axis.key], m["name"]) for m in points])
    line = sorted((across.find(m), max(m["metrics"][axis.key], low)) for m in points if m["name"] in best)
    if len(points) > 2 and len(line) > 1:
        axes.plot(*zip(*line, strict=True), "-", color=ink("faint"), linewidth=5, gid="front", zorder=1)


def _points(
    record: Record, axes: Axes, points: Sequence[Model], places: Mapping[str, tuple[float, float]], axis: Axis,
    across: Across,
) -> dict[str, str]:  # fmt: skip
    """Draw a mark and an interval for each model, and its details on hover."""
    numbers, details, floor = series(record), {}, axes.get_ylim()[0]
    for index, model in enumerate(points):
        (x, y), limits, number = places[model["name"]], _interval(model, axis.key), numbers[model["name"]]
        gid = f"detail-{index}"
        if limits and limits[0] > floor:
            apart = [[max(y - limits[0], 0)], [max(limits[1] - y, 0)]]
            axes.errorbar([x], [y], apart, fmt="none", color=ink(f"s{number}"), capsize=4, elinewidth=1.5)
        axes.plot([x], [y], MARKERS[number], **_mark(number, _hollow(record, model)), markersize=10, gid=gid,
                  clip_on=False, zorder=5)  # fmt: skip
        details[gid] = _detail(model, axis, across)
    return details


def _detail(model: Model, axis: Axis, across: Across) -> str:
    limits = _interval(model, axis.key)
    between = f" [{', '.join(axis.write(limit) for limit in limits)}]" if limits else ""
    lines = [str(model["name"]), f"{axis.title}: {axis.write(model['metrics'][axis.key])}{between}"]
    lines.append(f"{across.title}: {across.write(across.find(model))}")
    for column in table.COLUMNS:
        if column.key in ("bits_per_weight", "kl_divergence") and column.find(model) is not None:
            lines.append(f"{column.header}: {table.cell(column, model)}")
    return "\n".join(filter(None, [*lines, proof.certain(model)]))


def _names(
    record: Record, axes: Axes, points: Sequence[Model], places: Mapping[str, tuple[float, float]], axis: Axis
) -> None:
    """Label every point where the label covers least. A point on the lower edge says how far below it lies."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    frame, numbers = axes.get_window_extent(renderer), series(record)
    centres = [axes.transData.transform(place) for place in places.values()]
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in centres]
    for model in points:
        limits, x = _interval(model, axis.key), places[model["name"]][0]
        if limits:
            ends = [axes.transData.transform((x, limit)) for limit in limits]
            taken.append(Bbox.from_extents(ends[0][0] - 4, ends[0][1], ends[1][0] + 4, ends[1][1]))
    sides = [(11, -4, "left"), (-11, -4, "right"), (0, 12, "center"), (0, -22, "center")]
    sides += [(x, y, side) for y in (13, -23, 29, -39, 45) for x, side in ((3, "left"), (-3, "right"))]
    for model in points:
        value, place = model["metrics"][axis.key], places[model["name"]]
        words = plain(str(model["name"])) + (f" ↓ {axis.write(value)}" if value < place[1] else "")
        label = axes.annotate(words, place, (0, 0), textcoords="offset points", gid="name", fontweight="bold",
                              color=ink(f"s{numbers[model['name']]}"), annotation_clip=False)  # fmt: skip
        best: tuple[float, Any, Any] | None = None
        for dx, dy, side in sides:
            label.set(position=(dx, dy), ha=side)
            box = label.get_window_extent(renderer)
            outside = box.width * box.height - _overlap(box, frame)
            cost = round(sum(_overlap(box, other) for other in taken) + 4 * outside)
            if best is None or cost < best[0]:
                best = (cost, (dx, dy, side), box.frozen())
        assert best is not None
        label.set(position=best[1][:2], ha=best[1][2])
        taken.append(best[2])


def _overlap(box: Any, other: Any) -> float:
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return float(max(width, 0) * max(height, 0))


def _mark(number: int, hollow: bool) -> dict[str, Any]:
    colour = ink(f"s{number}")
    if hollow:
        return {"markerfacecolor": ink("card"), "markeredgecolor": colour, "markeredgewidth": 2}
    return {"markerfacecolor": colour, "markeredgecolor": ink("card"), "markeredgewidth": 1}


def _hollow(record: Record, model: Model) -> bool:
    return any(model is other for other in record.get("ablations") or [])


def parent_of(record: Record, model: Model) -> str | None:
    """Find the model of the record that this one was made from: the nearest in its lineage, by name or directory."""
    names: dict[str, str] = {}
    for other in table.everything(record):
        names.setdefault(Path(str(other["path"])).name, other["name"])
        names[other["name"]] = other["name"]
    for step in reversed(model.get("lineage") or []):
        source = step.get("source") if isinstance(step, Mapping) else None
        found = names.get(str(source))
        if found is not None and found != model["name"]:
            return found
    return None


def layer_lines(record: Record, width: int, key: str) -> Markup | None:
    """Relative error of every block's output, one line a model."""
    from matplotlib.ticker import MaxNLocator

    models = with_errors(record)
    if not models:
        return None
    details, numbers = {}, series(record)
    marked = sum(len(model["error_by_layer"]) for model in models) <= MARKED
    with drawing():
        drawn = figure(width, 260 if width < 520 else 320)
        axes = _frame(drawn, "Relative error of a block's output", "Layer", 52)
        for index, model in enumerate(models):
            errors, number = model["error_by_layer"], numbers[model["name"]]
            dash = DASHES[index // (SERIES - 1) % len(DASHES)]
            axes.plot(range(len(errors)), errors, linestyle=dash, color=ink(f"s{number}"), gid=f"line-{index}")
            worst = max(range(len(errors)), key=errors.__getitem__)
            details[f"line-{index}"] = f"{model['name']}\nlargest {table.significant(errors[worst])} at layer {worst}"
            for layer, error in enumerate(errors if marked else []):
                gid = f"mark-{index}-{layer}"
                axes.plot([layer], [error], MARKERS[number], **_mark(number, _hollow(record, model)), gid=gid)
                details[gid] = f"{model['name']}\nlayer {layer}: {table.significant(error)}"
        top = max(max(model["error_by_layer"]) for model in models)
        axes.set_ylim(0, 1.08 * top or 1.0)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(6 if width < 520 else 14, integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: table.trimmed(value))
        words = "; ".join(details[f"line-{index}"].replace("\n", ", ") for index in range(len(models)))
        return inline(drawn, "Relative error of each block's output, by layer", words, key, details)


def with_errors(record: Record) -> list[Model]:
    """Models of which the error by layer is known."""
    return [model for model in table.everything(record) if model.get("error_by_layer")]


CELLS = (
    "One cell an expert, one row a block: the stronger its colour, the more calibration tokens it saw. Outlined: too "
    "few, so it was rounded without statistics."
)


def expert_cells(model: Model, width: int, key: str) -> Markup:
    """Draw the calibration tokens of each expert of each block, on a logarithmic scale."""
    from matplotlib.patches import Rectangle

    blocks = model["expert_coverage"]
    columns, most = max(len(block["tokens"]) for block in blocks), max(max(block["tokens"]) for block in blocks)
    high = min(max((width - 36.0) / columns, 5.0), 18.0)
    height, details = len(blocks) * (high + 1) + 4, {}
    with drawing():
        drawn = figure(width, height)
        axes = drawn.add_axes((34 / width, 0, (width - 36) / width, 1))
        axes.patch.set_visible(False)
        axes.set(xlim=(0, columns), ylim=(len(blocks), 0), xticks=[])
        every = math.ceil(14 / (high + 1))  # rows between numbers that do not cover each other
        rows = range(0, len(blocks), every)
        axes.set_yticks([row + 0.5 for row in rows], [str(blocks[row]["block"]) for row in rows])
        axes.tick_params(length=0, labelcolor=ink("soft"))
        axes.spines[:].set_visible(False)
        _shades(axes, blocks, most, high - 1)
        for row, block in enumerate(blocks):
            bar = Rectangle((0, row), len(block["tokens"]), 1, alpha=0, gid=f"row-{row}")
            axes.add_patch(bar)
            details[f"row-{row}"] = _row(block)
        few = sum(len(block["starved"]) for block in blocks)
        words = f"{len(blocks)} blocks of up to {columns} experts, {few} experts with too few tokens, {most} at most"
        return inline(drawn, f"Tokens that reached each expert of {model['name']}", words, key, details)


def _shades(axes: Axes, blocks: Sequence[Mapping[str, Any]], most: int, thick: float) -> None:
    """Join the cells of one shade into one path, so that thousands of experts stay a small picture."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    cells: dict[int, list[tuple[float, float]]] = {}
    starved: list[Any] = []
    for row, block in enumerate(blocks):
        few = set(block["starved"])
        for expert, tokens in enumerate(block["tokens"]):
            level = round(LEVELS * math.log1p(tokens) / math.log1p(most)) if most else 0
            cells.setdefault(level, []).extend([(expert + 0.06, row + 0.5), (expert + 0.94, row + 0.5)])
            if expert in few:
                corners = [(expert + x, row + y) for x, y in ((0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9))]
                starved.append(Outline([*corners, corners[0]], closed=True))
    for level, ends in sorted(cells.items()):
        strokes = Outline(ends, [Outline.MOVETO, Outline.LINETO] * (len(ends) // 2))
        axes.add_patch(PathPatch(strokes, facecolor="none", edgecolor=ink("s1"), alpha=0.04 + 0.96 * level / LEVELS,
                                 linewidth=thick, capstyle="butt"))  # fmt: skip
    if starved:
        whole = Outline.make_compound_path(*starved)
        axes.add_patch(PathPatch(whole, facecolor="none", edgecolor=ink("s4"), linewidth=1.5))


def _row(block: Mapping[str, Any]) -> str:
    tokens = sorted(block["tokens"])
    few = f"\ntoo few: {', '.join(map(str, block['starved'][:20]))}" if block["starved"] else ""
    middle = tokens[len(tokens) // 2]
    return f"block {block['block']}: {tokens[0]} to {tokens[-1]} tokens an expert, median {middle}{few}"


def _interval(model: Model, key: str) -> list[float] | None:
    limits = (model.get("intervals") or {}).get(key)
    return list(limits) if limits and all(_finite(limit) for limit in limits) else None


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
