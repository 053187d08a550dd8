"""The report as Markdown: the same cells as the page, for a terminal, a pull request or a model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deepseek_compress.reports import errors, proof, safety, table, words
from deepseek_compress.reports.table import Record, Table


def markdown(record: Record) -> str:
    """Render the whole document. The same record gives the same bytes. Strings of the record are text, never HTML."""
    record = _escaped(record)
    parts = [
        f"# {record.get('name') or 'evaluation'}",
        words.verdict(record),
        words.measured_on(record),
        grid(table.rows(record)),
    ]
    missing = table.not_measured(record)
    if missing:
        parts.append(f"Not measured in this run: {', '.join(missing)}.")
    for title, (make, _) in {**proof.SECTIONS, **errors.SECTIONS, **safety.SECTIONS}.items():
        found = make(record)
        if found.rows:
            parts += [f"## {title}", grid(found)]
    for title, found in (
        ("Exact match by kind of problem", table.family_rows(record)),
        ("Error by layer", table.layer_rows(record)),
        ("Share of the entries chosen that the reference chooses", table.layer_rows(record, "choice_by_layer")),
        ("Calibration tokens that reached each expert", table.coverage_rows(record)),
        ("Engines and graphs", table.artifact_rows(record)),
    ):
        if found.rows and len(found.headers) > 1:
            parts += [f"## {title}", grid(found)]
    parts += _flips(record) + _refusals(record)
    chains = [f"- **{m['name']}**: {' → '.join(words.lineage(m)) or 'unknown'}" for m in table.everything(record)]
    parts += ["## Lineage", "\n".join(chains)]
    parts += ["## How it was measured", "\n".join(f"- {note}" for note in words.notes(record))]
    for title, key in (("Machine", "machine"), ("Versions", "versions")):
        parts += [
            f"## {title}",
            "\n".join(f"- {name}: {words.fact(name, value)}" for name, value in (record.get(key) or {}).items()),
        ]
    if record.get("recipe"):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", record["recipe"])), default=0))
        parts += ["## Recipe", f"{fence}yaml\n{record['recipe'].rstrip()}\n{fence}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _flips(record: Record) -> list[str]:
    """Show the first flips of each direction, with both answers."""
    parts = []
    for model in table.everything(record):
        for one in ((model.get("flips") or {}).get("examples") or [])[:6]:
            mine, theirs = one["model"], one["reference"]
            parts.append(
                f"- **{model['name']}**, {one['kind']}: {one['question'][:300]}\n  - right: {one['right'][:80]}\n"
                f"  - reference: {theirs['answer'] or table.UNKNOWN} ({theirs['tokens']} tokens)\n"
                f"  - model: {mine['answer'] or table.UNKNOWN} ({mine['tokens']} tokens)"
            )
    return ["## Answers that changed", "\n".join(parts)] if parts else []


def _refusals(record: Record) -> list[str]:
    """Show the first refusals that changed, with both answers."""
    parts = [
        f"- **{group['name']}**, {one['kind']}: {one['prompt'][:300]}\n  - reference: {one['reference'][:300]}\n"
        f"  - model: {one['model'][:300]}"
        for group in safety.changed(record)
        for one in group["examples"][:6]
    ]
    return ["## Refusals that changed", "\n".join(parts)] if parts else []


def _escaped(value: Any) -> Any:
    """Every string of a record but the recipe, which stands in a code block."""
    if isinstance(value, str):
        return " ".join(value.replace("<", "&lt;").splitlines())
    if isinstance(value, Mapping):
        return {_escaped(key): item if key == "recipe" else _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list | tuple) else value


def grid(found: Table) -> str:
    """Format a table with its numbers to the right; a row beyond noise is bold."""
    rows = [[f"**{v}**" for v in row] if i in found.strong else row for i, row in enumerate(found.rows)]
    lines = [found.headers, ["---", *(["---:"] * (len(found.headers) - 1))], *rows]
    return "\n".join("| " + " | ".join(value.replace("|", "\\|") for value in line) + " |" for line in lines)
