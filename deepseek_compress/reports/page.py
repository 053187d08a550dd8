"""One self-contained HTML page from a record: no network, pictures inline, one small script that sorts tables.

The template escapes every value (Jinja2's autoescape; the pictures of inline.py are the only markup that comes from
elsewhere), and the page's Content-Security-Policy lets nothing be loaded and no script run but ours, named by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from deepseek_compress.reports import charts, errors, proof, safety, table, words
from deepseek_compress.reports.table import Column, Model, Record

TEMPLATES = Path(__file__).with_name("templates")
WIDE, NARROW = 1150, 336  # pixels of the two variants of a picture
SCATTER = (
    "Bars are 95 % intervals; a dotted line leads from a model to what was made of it, a broad one through those that "
    "no other beats in both (Pareto front)."
)


def page(record: Record) -> str:
    """Render the whole document. The same record gives the same bytes."""
    script = _own("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _environment().get_template("page.html").render(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=_own("page.css"), script=script, key=table.sort_key, unknown=table.UNKNOWN, schema=record["schema"],
        **_head(record), **_models(record), **_answers(record), **_pictures(record), **_rest(record),
    )  # fmt: skip


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


@cache
def _own(name: str) -> Markup:
    """Read a file of the package, which is markup (or a style, or a script) as it stands."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _head(record: Record) -> dict[str, Any]:
    return {
        "title": str(record.get("name") or "evaluation"),
        "subject": words.subject(record),
        "verdict": words.verdict(record),
        "facts": words.facts(record),
        "measured_on": words.measured_on(record),
    }


def _models(record: Record) -> dict[str, Any]:
    """Render the table over the models."""
    found = table.shown(record)
    starts = [index == 0 or found[index - 1].group != column.group for index, column in enumerate(found)]
    columns = [
        {"header": column.header, "hint": column.hint, "first": Markup(' class="first"') if start else ""}
        for column, start in zip(found, starts, strict=True)
    ]
    names = list(dict.fromkeys(column.group for column in found))
    return {
        "columns": columns,
        "groups": [(name, sum(column.group == name for column in found)) for name in names],
        "models": [_model(record, model, found, columns) for model in table.everything(record)],
        "missing": ", ".join(table.not_measured(record)),
    }


def _model(
    record: Record, model: Model, columns: Sequence[Column], shown: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    ablation = any(model is other for other in record.get("ablations") or [])
    reference = model["name"] == record.get("reference")
    kind = "reference" if reference else "ablation" if ablation else ""
    cells = []
    for column, heading in zip(columns, shown, strict=True):
        cell, raw = table.cell(column, model), column.find(model)
        cells.append({
            "column": heading, "value": cell.value, "interval": cell.interval, "sort": "" if raw is None else raw,
            "known": cell.value != table.UNKNOWN,
            "strong": column.key == "exact_match" and proof.beyond_noise(model),
        })  # fmt: skip
    about = model.get("about") or {"reference": "reference", "ablation": "outside the pipeline"}.get(kind, "")
    return {
        "kind": kind, "name": model["name"], "about": about, "cells": cells,
        "swatch": charts.swatch(charts.series(record)[model["name"]], ablation),
    }  # fmt: skip


def _answers(record: Record) -> dict[str, Any]:
    """Render the tables of what the answers prove, and those that changed, the model's with the reference's."""
    sections = {**proof.SECTIONS, **errors.SECTIONS, **safety.SECTIONS}
    proofs = [(title, make(record), caption) for title, (make, caption) in sections.items()]
    flips = []
    for model in table.everything(record):
        found = model.get("flips")
        if found and found["examples"]:
            counts = f"{found['lost']} lost, {found['gained']} gained, {table.percent(found['changed'])} changed"
            flips.append({"title": f"{model['name']}: {counts}", "examples": found["examples"]})
    shown = [one for one in proofs if one[1].rows]
    return {"proofs": shown, "flips": flips, "refusals": safety.changed(record)}


def _pictures(record: Record) -> dict[str, Any]:
    layers = charts.with_errors(record)
    return {
        "scatters": _scatters(record),
        "legend": _legend(record, table.everything(record)),
        "families": [] if proof.floor(record) else _families(record),
        "layers": _both(lambda width, key: charts.layer_lines(record, width, key), "layers", crowded=True),
        "layer_legend": _legend(record, layers),
        "cells": charts.CELLS,
        "coverage": [
            {
                "name": model["name"],
                "both": _both(lambda width, key, model=model: charts.expert_cells(model, width, key), f"x{index}"),  # type: ignore[misc]
            }
            for index, model in enumerate(table.covered(record))
        ],
        "coverage_rows": table.coverage_rows(record),
    }


def _scatters(record: Record) -> list[dict[str, Any]]:
    """Accuracy against size, and against speed where that was measured of two models or more."""
    found = []
    caption = SCATTER
    if record.get("ablations"):
        caption += " Hollow marks are ablations, which the pipeline does not use."
    for across, least in ((charts.SIZE, 1), (charts.SPEED, 2)):
        models = [model for model in table.everything(record) if across.find(model)]
        axis = charts.accuracy_axis(record, across)
        if axis is None or len(models) < least or (axis.key == "exact_match" and proof.floor(record)):
            continue
        both = _both(
            lambda width, key, across=across: charts.scatter(record, width, key, across),  # type: ignore[misc]
            f"scatter-{across.title[:4].strip().lower()}",
            crowded=len(models) > charts.NAMED,
        )
        found.append({"title": f"{axis.title} against {across.title.lower()}", "both": both, "caption": caption})
    return found


def _families(record: Record) -> list[dict[str, Any]]:
    numbers, found = charts.series(record), []
    totals = (record.get("suite") or {}).get("families") or {}
    for family in table.family_names(record):
        shares = [
            (model["name"], ((model.get("families") or {}).get(family) or {}).get("exact_match"))
            for model in table.everything(record)
        ]
        bars = [
            {"name": name, "value": table.percent(share), "number": numbers[name], "width": f"{100 * share:.1f}"}
            for name, share in shares
            if share is not None
        ]
        if bars:
            found.append({"name": family.capitalize(), "total": totals.get(family), "bars": bars})
    return found


def _rest(record: Record) -> dict[str, Any]:
    return {
        "artifacts": table.artifact_rows(record),
        "lineage": [
            {"name": model["name"], "path": model["path"] or "", "steps": words.lineage(model)}
            for model in table.everything(record)
        ],
        "machine": [(name, words.fact(name, value)) for name, value in (record.get("machine") or {}).items()],
        "versions": [(name, words.fact(name, value)) for name, value in (record.get("versions") or {}).items()],
        "notes": words.notes(record),
        "recipe": record.get("recipe"),
    }


def _legend(record: Record, models: Sequence[Model]) -> list[dict[str, Any]]:
    numbers, ablations = charts.series(record), record.get("ablations") or []
    return [
        {
            "name": model["name"],
            "swatch": charts.swatch(numbers[model["name"]], any(model is other for other in ablations)),
        }
        for model in models
    ]


def _both(
    draw: Callable[[int, str], Markup | None], key: str, crowded: bool = False
) -> dict[str, Markup | bool | None] | None:
    """Join the wide and the narrow variant; the style sheet shows one of them, and only that one is read out.

    `crowded`: the wide one has no labels either, so that the list below is needed.
    """
    wide, narrow = draw(WIDE, f"{key}-wide"), draw(NARROW, f"{key}-narrow")
    return {"wide": wide, "narrow": narrow, "crowded": crowded} if wide else None
