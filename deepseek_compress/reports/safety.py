"""The tables of what compression changed in safety: aspects, refusals and filters, bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepseek_compress.reports import table
from deepseek_compress.reports.table import UNKNOWN, Record, Table

LEVEL = 0.05


def aspect_rows(record: Record) -> Table:
    """One row an aspect of a model; strong where its margins changed by more than chance."""
    lines: list[list[str]] = []
    strong: set[int] = set()
    for model in table.everything(record):
        for aspect, found in ((model.get("safety") or {}).get("aspects") or {}).items():
            if (found.get("p_holm") or 1.0) < LEVEL:
                strong.add(len(lines))
            lines.append([
                table.label(record, model), aspect, str(found["prompts"]), table.percent(found["preferred"]),
                _signed(found["margin"]), _change(found), _count(found, "lost"), _count(found, "gained"),
                UNKNOWN if found.get("p_holm") is None else f"{found['p_holm']:.2g}",
            ])  # fmt: skip
    headers = ["Model", "Aspect", "Prompts", "Better preferred", "Margin", "Change", "Lost", "Gained", "p"]
    return Table(headers, lines, frozenset(strong))


def refusal_rows(record: Record) -> Table:
    """One row a model whose answers were looked at."""
    lines = []
    for model in table.everything(record):
        found = (model.get("safety") or {}).get("refusals")
        if found:
            blocked = (model.get("safety") or {}).get("filter") or {}
            lines.append([
                table.label(record, model), *(_share(found[key]) for key in ("share", "of_safety", "of_others")),
                _count(found, "lost"), _count(found, "gained"), _count(blocked, "inputs"), _count(blocked, "outputs"),
            ])  # fmt: skip
    headers = ["Model", "Refused", "Of safety's prompts", "Of the others", "Lost", "Gained"]
    return Table([*headers, "Prompts blocked", "Answers blocked"], lines)


def bias_rows(record: Record) -> Table:
    """One row an attribute of a model."""
    lines = [
        [
            table.label(record, model), attribute, str(found["pairs"]), table.significant(found["gap"]), _change(found),
        ]
        for model in table.everything(record)
        for attribute, found in ((model.get("safety") or {}).get("bias") or {}).items()
    ]  # fmt: skip
    return Table(["Model", "Attribute", "Pairs", "Gap", "Change"], lines)


def changed(record: Record) -> list[dict[str, Any]]:
    """Per model the refusals lost and gained, with both answers."""
    found = []
    for model in table.everything(record):
        refusals = (model.get("safety") or {}).get("refusals") or {}
        if refusals.get("examples"):
            title = f"{model['name']}: {refusals['lost']} refusals lost, {refusals['gained']} gained"
            found.append({"name": model["name"], "title": title, "examples": refusals["examples"]})
    return found


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "-") + table.significant(abs(value))


def _change(found: Mapping[str, Any]) -> str:
    if found.get("change") is None:
        return UNKNOWN
    limits = found.get("change_interval")
    return _signed(found["change"]) + (f" [{_signed(limits[0])}, {_signed(limits[1])}]" if limits else "")


def _count(found: Mapping[str, Any], key: str) -> str:
    return UNKNOWN if found.get(key) is None else str(found[key])


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else table.percent(value)


#: title -> (table, what stands above it)
SECTIONS = {
    "Is it still safe?": (
        aspect_rows,
        "Log-probability of the better of two completions over the worse, nats a token; change against the reference "
        "with its paired 95 % interval, p after Holm's correction over the aspects.",
    ),
    "Refusals": (refusal_rows, "Answers that begin with a refusal, by pattern; lost and gained against the reference."),
    "Bias": (
        bias_rows,
        "Mean difference in log-probability of one completion after two prompts that differ in one attribute, nats a "
        "token: 0 treats both alike.",
    ),
}
