"""One self-contained HTML page from a record: no network, no scripts, pictures inline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from deepseek_compress.reports import charts, proof, svg, table, words
from deepseek_compress.reports.table import Cell, Column, Model, Record

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is loaded, nothing runs
WIDE, NARROW = 1150, 336  # pixels of the two variants of a picture


def page(record: Record) -> str:
    """The whole document. The same record gives the same bytes."""
    title = str(record.get("name") or "evaluation")
    sections = [_header(record, title), _stages(record), *_proof(record), _flips(record)]
    sections += [_accuracy(record), _families(record), _layers(record)]
    sections += [_coverage(record), _artifacts(record), _lineage(record), _machine(record), _footer(record)]
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head += f"<title>{escape(title)} · compression report</title><style>{style}</style>"
    body = "\n".join(part for part in sections if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


def _header(record: Record, title: str) -> str:
    verdict = f'<p class="verdict">{escape(words.verdict(record))}</p>'
    facts = "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for term, value, note in words.facts(record)
    )
    boxes = f'<dl class="facts">{facts}</dl>' if facts else ""
    eyebrow = f'<p class="eyebrow">{escape(words.subject(record))}</p>'
    return f"<header>{eyebrow}<h1>{escape(title)}</h1>{verdict}{boxes}</header>"


def _stages(record: Record) -> str:
    columns = table.shown(record)
    cells = [
        f'<th scope="col" role="columnheader"{_first(columns, i)} title="{escape(c.hint)}">{escape(c.header)}</th>'
        for i, c in enumerate(columns)
    ]
    groups = "".join(f'<th scope="colgroup" colspan="{span}">{escape(name)}</th>' for name, span in _groups(columns))
    head = f'<thead><tr class="groups" aria-hidden="true"><th></th>{groups}</tr>'
    head += f'<tr role="row"><th scope="col" role="columnheader">Model</th>{"".join(cells)}</tr></thead>'
    rows = "".join(_stage_row(record, model, columns) for model in table.everything(record))
    caption = "<caption>Models in the order of the pipeline. In brackets the 95 % interval.</caption>"
    grid = f'<table role="table">{caption}{head}<tbody role="rowgroup">{rows}</tbody></table>'
    missing = table.not_measured(record)
    note = f'<p class="note">Not measured in this run: {escape(", ".join(missing))}.</p>' if missing else ""
    lead = f'<p class="lead">{escape(words.measured_on(record))}</p>'
    return f'<section class="cards"><h2>The models</h2>{lead}{_scroll(grid, "The models")}{note}</section>'


def _stage_row(record: Record, model: Model, columns: Sequence[Column]) -> str:
    ablation = any(model is other for other in record.get("ablations") or [])
    reference = model["name"] == record.get("reference")
    kind = "reference" if reference else "ablation" if ablation else ""
    about = model.get("about") or ("reference" if reference else "beside the pipeline" if ablation else "")
    number = charts.series(record)[model["name"]]
    swatch = svg.element(
        "svg",
        svg.mark(number, 6.0, 6.0, 4.5, f"mark s{number}" + (" hollow" if ablation else "")),
        viewBox="0 0 12 12",
        class_="swatch",
        aria_hidden="true",
    )
    small = f'<span class="about">{escape(about)}</span>' if about else ""
    head = f'<th scope="row" role="rowheader">{swatch}{escape(model["name"])}{small}</th>'
    cells = "".join(
        f'<td role="cell"{_first(columns, index)} data-label="{escape(column.header)}">'
        f"{_cell(table.cell(column, model))}</td>"
        for index, column in enumerate(columns)
    )
    return f'<tr role="row" class="{kind}">{head}{cells}</tr>'


def _cell(cell: Cell) -> str:
    if cell.value == table.UNKNOWN:
        return f'<span class="none">{cell.value}</span>'
    return escape(cell.value) + (f"<small>{escape(cell.interval)}</small>" if cell.interval else "")


def _groups(columns: Sequence[Column]) -> list[tuple[str, int]]:
    names = list(dict.fromkeys(column.group for column in columns))
    return [(name, sum(column.group == name for column in columns)) for name in names]


def _first(columns: Sequence[Column], index: int) -> str:
    starts = index == 0 or columns[index - 1].group != columns[index].group
    return ' class="first"' if starts else ""


def _proof(record: Record) -> list[str]:
    """A section for each table of what the answers prove."""
    parts = []
    for title, (make, caption) in proof.SECTIONS.items():
        found = make(record)
        if found.rows:
            parts.append(f"<section><h2>{escape(title)}</h2>{_scroll(_words(found, caption), title)}</section>")
    return parts


def _flips(record: Record) -> str:
    """Answers that changed, the model's beside the reference's; closed until they are asked for."""
    parts = []
    for model in table.everything(record):
        found = model.get("flips")
        if not found or not found["examples"]:
            continue
        shown = "".join(_flip(one) for one in found["examples"])
        counts = f"{found['lost']} lost, {found['gained']} gained, {table.percent(found['changed'])} changed"
        title = f"{model['name']}: {counts}"
        parts.append(f"<details><summary>{escape(title)}</summary>{shown}</details>")
    return f"<section><h2>Answers that changed</h2>{''.join(parts)}</section>" if parts else ""


def _flip(one: Mapping[str, Any]) -> str:
    sides = "".join(
        f"<div><h3>{name}: {escape(str(side['answer'] or table.UNKNOWN))}</h3><pre>{escape(side['text'])}</pre></div>"
        for name, side in (("reference", one["reference"]), ("model", one["model"]))
    )
    head = f"{one['kind']} · right: {one['right']}"
    return f'<p class="note">{escape(head)}</p><p>{escape(one["question"])}</p><div class="columns">{sides}</div>'


def _accuracy(record: Record) -> str:
    if proof.floor(record) is not None:
        return ""
    axis = charts.accuracy_axis(record)
    if axis is None:
        return ""
    drawing = _both(lambda width, key: charts.scatter(record, width, key), "scatter")
    caption = "Bars are 95 % intervals; a dotted line leads from a model to what was made of it."
    if record.get("ablations"):
        caption += " Hollow marks are ablations, which the pipeline does not use."
    return f"<section><h2>{escape(axis.title)} against size</h2>{_figure(drawing, caption)}</section>"


def _families(record: Record) -> str:
    panels: list[str] = []
    if proof.floor(record) is not None:
        return ""
    for index, family in enumerate(table.family_names(record)):
        drawing = charts.family_bars(record, family, f"family{index}")
        if drawing:
            total = ((record.get("suite") or {}).get("families") or {}).get(family)
            small = f'<span class="about">{escape(str(total))} problems</span>' if total else ""
            panels.append(f"<div><h3>{escape(family.capitalize())}{small}</h3>{drawing}</div>")
    if not panels:
        return ""
    figure = _figure(f'<div class="panels">{"".join(panels)}</div>', "Exact match in percent of the family's problems.")
    return f"<section><h2>By kind of problem</h2>{figure}</section>"


def _layers(record: Record) -> str:
    drawing = _both(lambda width, key: charts.layer_lines(record, width, key), "layers")
    if not drawing:
        return ""
    caption = "‖h − h′‖ / ‖h‖ of the hidden state after each block, model against reference, on the same tokens."
    return f"<section><h2>Error by layer</h2>{_figure(drawing, caption)}</section>"


def _coverage(record: Record) -> str:
    """A picture a model, a cell an expert; the numbers by block below."""
    parts = []
    for index, model in enumerate(table.covered(record)):
        drawing = _both(lambda width, key, model=model: charts.expert_cells(model, width, key), f"experts{index}")
        parts.append(f"<h3>{escape(model['name'])}</h3>{_figure(drawing, charts.CELLS)}")
    if not parts:
        return ""
    grid = _words(table.coverage_rows(record), "Tokens of the calibration text, by block.")
    details = f"<details><summary>Numbers by block</summary>{_scroll(grid, 'Tokens by block')}</details>"
    return f"<section><h2>Tokens that reached each expert</h2>{''.join(parts)}{details}</section>"


def _artifacts(record: Record) -> str:
    found = table.artifact_rows(record)
    if not found.rows:
        return ""
    grid = _words(found, "Built files. What has not been run here has no speed in this report.")
    return f"<section><h2>Engines and graphs</h2>{_scroll(grid, 'Engines and graphs')}</section>"


def _lineage(record: Record) -> str:
    items = []
    for model in table.everything(record):
        steps = "".join(f"<li>{escape(step)}</li>" for step in words.lineage(model))
        chain = f"<ol>{steps}</ol>" if steps else '<p class="about">as it was given</p>'
        path = escape(str(model["path"] or ""))
        items.append(f"<li><strong>{escape(model['name'])}</strong> <code>{path}</code>{chain}</li>")
    return f'<section><h2>Lineage</h2><ul class="chain">{"".join(items)}</ul></section>'


def _machine(record: Record) -> str:
    machine = _pairs("Machine", record.get("machine") or {})
    versions = _pairs("Versions", record.get("versions") or {})
    notes = "".join(f"<li>{escape(note)}</li>" for note in words.notes(record))
    details = f"<details><summary>How it was measured</summary><ul>{notes}</ul></details>" if notes else ""
    recipe = record.get("recipe")
    if recipe:
        details += f"<details><summary>The recipe</summary><pre><code>{escape(recipe)}</code></pre></details>"
    return f'<section><h2>Where it ran</h2><div class="columns">{machine}{versions}</div>{details}</section>'


def _footer(record: Record) -> str:
    schema = escape(str(record["schema"]))
    return f"<footer>Written by dsc from its run record, schema {schema}. Fractions in the JSON, percent here.</footer>"


def _pairs(title: str, values: Mapping[str, Any]) -> str:
    pairs = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(words.fact(name, value))}</dd>" for name, value in values.items()
    )
    return f'<div><h3>{title}</h3><dl class="pairs">{pairs}</dl></div>'


def _both(draw: Any, key: str) -> str:
    """The wide and the narrow variant; the style sheet shows one of them, and only that one is read out."""
    wide, narrow = draw(WIDE, f"{key}-wide"), draw(NARROW, f"{key}-narrow")
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>' if wide else ""


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _scroll(grid: str, name: str) -> str:
    """A table that is wider than its column scrolls by itself, and by keyboard."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">{grid}</div>'


def _words(found: table.Table, caption: str) -> str:
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in found.headers)
    rows = "".join("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in row) + "</tr>" for row in found.rows)
    caption = f"<caption>{escape(caption)}</caption>"
    return f'<table class="words">{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
