"""Tables of where the error sits: by kind of weight, the worst weights, channels that stand out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepseek_compress.reports import table
from deepseek_compress.reports.table import UNKNOWN, Model, Record, Table


def role_rows(record: Record) -> Table:
    """One row a kind of linear of a model."""
    headers = ["Model", "Kind", "Linears", "Bits", "Weight error", "Output error"]
    return Table(headers, [
        [table.label(record, model), one["role"], f"{one['linears']:,}", *_errors(one)]
        for model, found in _known(record, "weight_errors")
        for one in found["roles"]
    ])  # fmt: skip


def worst_rows(record: Record) -> Table:
    """List the weights of each model whose outputs are furthest from the original's."""
    headers = ["Model", "Weight", "Bits", "Weight error", "Output error"]
    return Table(headers, [
        [table.label(record, model), one["name"], *_errors(one)]
        for model, found in _known(record, "weight_errors")
        for one in found["worst"]
    ])  # fmt: skip


def expert_rows(record: Record) -> Table:
    """One row a model: tokens whose experts changed, and the load of experts in the reference and in the model."""
    lines = []
    for model, found in _known(record, "experts_by_layer"):
        blocks = [(number, one) for number, one in enumerate(found) if one]
        if not blocks:
            continue
        worst, most = max(blocks, key=lambda pair: pair[1]["changed"])
        busiest = [max(one["busiest"][side] for _, one in blocks) for side in (0, 1)]
        idle = [sum(one["idle"][side] for _, one in blocks) for side in (0, 1)]
        lines.append([
            table.label(record, model), table.percent(sum(one["changed"] for _, one in blocks) / len(blocks)),
            f"{table.percent(most['changed'])} (block {worst})", " → ".join(map(table.percent, busiest)),
            " → ".join(f"{count:,}" for count in idle),
        ])  # fmt: skip
    return Table(["Model", "Choices changed", "Most", "Busiest expert", "Idle experts"], lines)


def outlier_rows(record: Record) -> Table:
    """One row a model that has channels which stand out: where they are most, and where they carry most."""
    lines = []
    for model, found in _known(record, "outliers_by_layer"):
        blocks = [(number, one) for number, one in enumerate(found) if one and one["channels"]]
        if blocks:
            at, most = max(blocks, key=lambda pair: pair[1]["size"])
            error, worst = max(blocks, key=lambda pair: pair[1]["error"])
            lines.append([
                table.label(record, model), f"{len(blocks)} of {len(found)}", f"{most['channels']:,}",
                f"{table.percent(most['size'])} (block {at})", f"{table.percent(worst['error'])} (block {error})",
            ])  # fmt: skip
    return Table(["Model", "Blocks", "Channels", "Of the state", "Of the error"], lines)


def _known(record: Record, key: str) -> Iterator[tuple[Model, Any]]:
    for model in table.everything(record):
        if model.get(key):
            yield model, model[key]


def _errors(one: dict[str, Any]) -> list[str]:
    keys = ("bits", "weight_error", "output_error")
    return [UNKNOWN if one[key] is None else table.significant(one[key]) for key in keys]


#: title -> (table, what stands above it)
SECTIONS = {
    "Error by kind of weight": (
        role_rows,
        "Relative squared errors of weights, and of what linears give on the calibration text; means over weights.",
    ),
    "Weights with the largest error": (
        worst_rows,
        "Candidates for more bits by `overrides`; `dsc allocate` weighs what each costs the answers.",
    ),
    "Experts that tokens go to": (
        expert_rows,
        "On the same tokens, reference → model: shares of a token's experts that changed, load of the most chosen one.",
    ),
    "Channels that stand out": (
        outlier_rows,
        "Of a block's output, above 6 times the median: their share of its squares, and of the squared error.",
    ),
}
