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
    """The weights of each model whose outputs are furthest from the original's."""
    headers = ["Model", "Weight", "Bits", "Weight error", "Output error"]
    return Table(headers, [
        [table.label(record, model), one["name"], *_errors(one)]
        for model, found in _known(record, "weight_errors")
        for one in found["worst"]
    ])  # fmt: skip


def outlier_rows(record: Record) -> Table:
    """One row a block of a model that has channels which stand out."""
    headers = ["Model", "Block", "Channels", "Of the state", "Of the error"]
    return Table(headers, [
        [
            table.label(record, model), str(block), f"{one['channels']:,}", table.percent(one["size"]),
            table.percent(one["error"]),
        ]
        for model, found in _known(record, "outliers_by_layer")
        for block, one in enumerate(found)
        if one and one["channels"]
    ])  # fmt: skip


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
    "Channels that stand out": (
        outlier_rows,
        "Channels of a block's output above 6 times the median: their share of its squares, and of the squared error.",
    ),
}
