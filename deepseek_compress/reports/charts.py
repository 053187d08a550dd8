"""The three pictures of a report: accuracy against size, families as bars, and error by layer.

Each takes a record and a width in pixels and returns one `<svg>`; the page asks for a wide and a narrow one, because
text that is scaled down with its picture cannot be read on a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_compress.reports import svg, table
from deepseek_compress.reports.svg import Box, Scale, element
from deepseek_compress.reports.table import Model, Record

TEXT = 13.0  # pixels; the class `name` in the style sheet has the same size


class Axis(NamedTuple):
    """What the vertical axis of the scatter shows: the first metric of this list that at least one model has."""

    key: str
    title: str
    share: bool  # a share of one, written in percent


AXES = (
    Axis("exact_match", "Exact match", True),
    Axis("top1_agreement", "Top-1 agreement with the reference", True),
    Axis("perplexity", "Perplexity", False),
)


def accuracy_axis(record: Record) -> Axis | None:
    """The metric of the scatter's vertical axis, None when no model has both a size and a metric."""
    models = [model for model in table.everything(record) if model["bytes"]]
    return next((a for a in AXES if any(_finite(m["metrics"].get(a.key)) for m in models)), None)


def series(record: Record) -> dict[str, int]:
    """Model name -> number of its colour and shape. The reference is 0; the others count from 1."""
    numbers: dict[str, int] = {}
    for model in table.everything(record):
        reference = model["name"] == record.get("reference")
        others = sum(1 for name in numbers if name != record.get("reference"))
        numbers[model["name"]] = 0 if reference else 1 + others % (svg.SERIES - 1)
    return numbers


def scatter(record: Record, width: int, key: str) -> str | None:
    """Accuracy against size on disk, with 95 % intervals and a path from each model to what was made of it."""
    axis = accuracy_axis(record)
    if axis is None:
        return None
    points = [m for m in table.everything(record) if m["bytes"] and _finite(m["metrics"].get(axis.key))]
    narrow = width < 520
    key_height = 20.0 * len(points) + 8 if narrow else 0.0
    height = int((330 if narrow else 420) + key_height)
    frame = Box(46.0, 30.0 + key_height, width - 14.0, height - 46.0)
    across = _size_scale([model["bytes"] for model in points], frame)
    up = _accuracy_scale(_main(record, points), axis, frame)
    body = _grid(frame, up, across, axis, narrow)
    places = {m["name"]: (across(m["bytes"]), min(up(m["metrics"][axis.key]), frame.bottom)) for m in points}
    body += _paths(record, places)
    body += _points(record, points, places, axis, up, frame)
    body += _key(record, points) if narrow else _names(record, points, places, axis, up, frame)
    words = "; ".join(
        f"{m['name']}: {table.size(m['bytes'])}, {_written(axis, m['metrics'][axis.key])}" for m in points
    )
    return svg.picture(width, height, f"{axis.title} against size on disk", words, body, key)


def _main(record: Record, points: Sequence[Model]) -> Sequence[Model]:
    """The models that set the vertical range: the pipeline's. An ablation below it stands on the lower edge."""
    names = {model["name"] for model in record["models"]}
    return [model for model in points if model["name"] in names] or points


def _size_scale(sizes: Sequence[float], frame: Box) -> Scale:
    low, high = min(sizes), max(sizes)
    if high / low > 8:
        return Scale(low / 1.35, high * 1.35, frame.left, frame.right, log=True)
    return Scale(0.0, high * 1.12, frame.left, frame.right)


def _accuracy_scale(points: Sequence[Model], axis: Axis, frame: Box) -> Scale:
    ends = [model["metrics"][axis.key] for model in points]
    ends += [limit for model in points for limit in _interval(model, axis.key) or ()]
    low, high = min(ends), max(ends)
    if axis.share:
        low = max(0.0, math.floor((low - 0.02) * 20) / 20)
        return Scale(low, 1.0, frame.bottom, frame.top)
    margin = 0.12 * (high - low) or 0.1 * high
    return Scale(max(0.0, low - margin), high + margin, frame.bottom, frame.top)


def _grid(frame: Box, up: Scale, across: Scale, axis: Axis, narrow: bool) -> list[str]:
    body = [svg.text(0.0, 14.0, axis.title, "axis")]
    for value in svg.linear_ticks(up.low, up.high, 6):
        y = up(value)
        body.append(element("line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="grid"))
        body.append(
            svg.text(
                frame.left - 8, y + 4, f"{100 * value:.0f} %" if axis.share else table.trimmed(value), "tick", "end"
            )
        )
    most = 4 if narrow else 8
    ticks = svg.log_ticks(across.low, across.high, most) if across.log else svg.linear_ticks(0.0, across.high, most)
    for value in ticks:
        words = "0" if value == 0 else _short_size(value)
        body.append(
            element("line", x1=across(value), x2=across(value), y1=frame.bottom, y2=frame.bottom + 5, class_="rule")
        )
        body.append(svg.text(across(value), frame.bottom + 20, words, "tick", "middle"))
    body.append(element("line", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom, class_="rule"))
    words = "Size on disk" + (", logarithmic" if across.log else "")
    body.append(svg.text(frame.right, frame.bottom + 40, words + " (smaller is to the left)", "axis", "end"))
    return body


def _paths(record: Record, places: Mapping[str, tuple[float, float]]) -> list[str]:
    body = []
    for model in table.everything(record):
        parent = parent_of(record, model)
        if parent is not None and model["name"] in places and parent in places:
            (x1, y1), (x2, y2) = places[parent], places[model["name"]]
            body.append(element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="path"))
    return body


def _points(
    record: Record,
    points: Sequence[Model],
    places: Mapping[str, tuple[float, float]],
    axis: Axis,
    up: Scale,
    frame: Box,
) -> list[str]:
    numbers, bars, marks = series(record), [], []
    for model in points:
        (x, y), limits, number = places[model["name"]], _interval(model, axis.key), numbers[model["name"]]
        if limits and up(limits[0]) <= frame.bottom:
            bars.append(element("path", d=_whisker(x, up(limits[1]), up(limits[0])), class_=f"whisker s{number}"))
        marks.append(svg.mark(number, x, y, 5.5, _mark_class(record, model)))
    return bars + marks


def _names(
    record: Record,
    points: Sequence[Model],
    places: Mapping[str, tuple[float, float]],
    axis: Axis,
    up: Scale,
    frame: Box,
) -> list[str]:
    """Every point's name beside it, where it covers least. A point on the lower edge says how far below it lies."""
    taken = [Box(x - 8, y - 8, x + 8, y + 8) for x, y in places.values()]
    for model in points:
        limits, x = _interval(model, axis.key), places[model["name"]][0]
        if limits:
            taken.append(Box(x - 4, up(limits[1]), x + 4, up(limits[0])))
    body = []
    for model in points:
        value = model["metrics"][axis.key]
        words = model["name"] + (f" ↓ {_written(axis, value)}" if up(value) > frame.bottom else "")
        spot = svg.place(words, *places[model["name"]], TEXT, frame, taken)
        taken.append(spot.box)
        body.append(svg.text(spot.x, spot.baseline, words, f"name s{series(record)[model['name']]}", spot.anchor))
    return body


def _key(record: Record, models: Sequence[Model]) -> list[str]:
    """A list of marks and names above a picture that is too narrow for names beside its marks."""
    body = []
    for index, model in enumerate(models):
        number, y = series(record)[model["name"]], 33.0 + 20 * index
        body.append(svg.mark(number, 6.0, y, 4.5, _mark_class(record, model)))
        body.append(svg.text(18.0, y + 4.5, model["name"], f"name s{number}"))
    return body


def _mark_class(record: Record, model: Model) -> str:
    hollow = any(model is other for other in record.get("ablations") or [])
    return f"mark s{series(record)[model['name']]}" + (" hollow" if hollow else "")


def _whisker(x: float, top: float, bottom: float) -> str:
    return f"M{x - 4:.1f} {top:.1f}h8M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 4:.1f} {bottom:.1f}h8"


def parent_of(record: Record, model: Model) -> str | None:
    """The model of the record that this one was made of: the nearest source in its lineage, by name or directory."""
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


def family_bars(record: Record, family: str, key: str, metric: str = "exact_match") -> str | None:
    """One panel: a bar a model with its share written beside it, name above the bar."""
    found = [(m, ((m.get("families") or {}).get(family) or {})) for m in table.everything(record)]
    bars = [(model, facts[metric]) for model, facts in found if _finite(facts.get(metric))]
    if not bars:
        return None
    width, step = 260, 34
    numbers, body = series(record), []
    for index, (model, value) in enumerate(bars):
        top = index * step
        class_ = f"s{numbers[model['name']]}"
        body.append(svg.text(0.0, top + 13.0, _clip(model["name"], width - 60), "label"))
        body.append(svg.text(float(width), top + 13.0, table.percent(value), "figure", "end"))
        body.append(element("rect", x=0, y=top + 19, width=width, height=6, rx=3, class_="track"))
        if value > 0:
            body.append(
                element(
                    "rect",
                    x=0,
                    y=top + 19,
                    width=max(float(width * value), 3.0),
                    height=6,
                    rx=3,
                    class_=f"bar {class_}",
                )
            )
    words = "; ".join(f"{model['name']}: {table.percent(value)}" for model, value in bars)
    return svg.picture(width, step * len(bars), f"Exact match on {family}", words, body, key)


def layer_lines(record: Record, width: int, key: str) -> str | None:
    """Relative error of every block's output, one line a model, labelled at its end."""
    models = [model for model in table.everything(record) if _errors(model)]
    if not models:
        return None
    narrow = width < 520
    depth = max(len(model["error_by_layer"]) for model in models)
    room = 0.0 if narrow else max(svg.text_width(model["name"], TEXT) for model in models) + 18
    key_height = 20.0 * len(models) + 8 if narrow else 0.0
    height = int((260 if narrow else 320) + key_height)
    frame = Box(52.0, 30.0 + key_height, width - 14.0 - room, height - 42.0)
    top = max(max(_errors(model)) for model in models)
    up = Scale(0.0, top * 1.08 if top > 0 else 1.0, frame.bottom, frame.top)
    across = Scale(0.0, float(max(depth - 1, 1)), frame.left + 8, frame.right - 8)
    body = [svg.text(0.0, 14.0, "Relative error of a block's output", "axis")]
    body += _layer_grid(frame, up, across, depth, narrow)
    ends = [up(_errors(model)[-1]) for model in models]
    labels = svg.spread(ends, TEXT + 5, frame.top + 4, frame.bottom)
    for index, model in enumerate(models):
        body += _line(model, series(record)[model["name"]], up, across)
        if not narrow:
            number = series(record)[model["name"]]
            body.append(svg.text(frame.right + 8, labels[index] + 4, model["name"], f"name s{number}"))
    body += _key(record, models) if narrow else []
    words = "; ".join(f"{model['name']}: {', '.join(table.significant(e) for e in _errors(model))}" for model in models)
    return svg.picture(width, height, "Relative error of each block's output, by layer", words, body, key)


CELLS = (
    "One cell an expert, one row a block: the darker, the more calibration tokens it saw. Outlined: too few, so it was "
    "rounded without statistics."
)


def expert_cells(model: Model, width: int, key: str) -> str:
    """How many calibration tokens reached each expert of each block, on a logarithmic scale."""
    blocks = model["expert_coverage"]
    across, most = max(len(block["tokens"]) for block in blocks), max(max(block["tokens"]) for block in blocks)
    left, step = 34.0, (width - 36.0) / across
    high = min(max(step, 5.0), 18.0)
    body = []
    for row, block in enumerate(blocks):
        y = row * (high + 1)
        body.append(svg.text(left - 8, y + high - 1, str(block["block"]), "tick", "end"))
        starved = set(block["starved"])
        for expert, tokens in enumerate(block["tokens"]):
            shade = 0.04 + 0.96 * math.log1p(tokens) / math.log1p(most) if most else 0.04
            kind = "cell starved" if expert in starved else "cell"
            body.append(
                element(
                    "rect",
                    x=left + expert * step + 0.5,
                    y=y + 0.5,
                    width=max(step - 1, 0.8),
                    height=high - 1,
                    fill_opacity=round(shade, 3),
                    class_=kind,
                )
            )
    few = sum(len(block["starved"]) for block in blocks)
    words = f"{len(blocks)} blocks of up to {across} experts, {few} experts with too few tokens, {most} tokens at most"
    height = int(len(blocks) * (high + 1)) + 4
    return svg.picture(width, height, f"Tokens that reached each expert of {model['name']}", words, body, key)


def _layer_grid(frame: Box, up: Scale, across: Scale, depth: int, narrow: bool) -> list[str]:
    body = []
    for value in svg.linear_ticks(0.0, up.high, 5):
        y = up(value)
        body.append(element("line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="rule" if value == 0 else "grid"))
        body.append(svg.text(frame.left - 8, y + 4, table.trimmed(value), "tick", "end"))
    whole = (
        [int(v) for v in svg.linear_ticks(0.0, float(depth - 1), 6 if narrow else 14) if v == int(v)]
        if depth > 1
        else [0]
    )
    for layer in whole:
        body.append(svg.text(across(layer), frame.bottom + 20, str(layer), "tick", "middle"))
    body.append(svg.text(frame.right, frame.bottom + 38, "Layer", "axis", "end"))
    return body


def _line(model: Model, number: int, up: Scale, across: Scale) -> list[str]:
    points = [(across(layer), up(error)) for layer, error in enumerate(model["error_by_layer"]) if _finite(error)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    marks = [svg.mark(number, x, y, 3.6, f"mark s{number}") for x, y in points] if len(points) <= 40 else []
    return [element("path", d=path, class_=f"line s{number}"), *marks]


def _errors(model: Model) -> list[float]:
    return [error for error in model.get("error_by_layer") or [] if _finite(error)]


def _interval(model: Model, key: str) -> list[float] | None:
    limits = (model.get("intervals") or {}).get(key)
    return list(limits) if limits and all(_finite(limit) for limit in limits) else None


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _written(axis: Axis, value: float) -> str:
    return table.percent(value) if axis.share else table.significant(value)


def _short_size(value: float) -> str:
    number, unit = table.size(value).split(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def _clip(name: str, width: float) -> str:
    most = int(width / (svg.CHARACTER * TEXT))
    return name if len(name) <= most else name[: most - 1] + "…"
