"""The table over the stages: a record's models as formatted cells, the same for terminal, Markdown and HTML.

A column says once how its value is found, written and explained. A value nobody measured is written as an en dash; a
column that no row has a value for is left out of the table (never out of the record) and named by `not_measured`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

Record = Mapping[str, Any]
Model = Mapping[str, Any]
UNKNOWN = "–"


class Cell(NamedTuple):
    """Contents of one cell: the value, and its 95 % interval or an empty string."""

    value: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.interval}" if self.interval else self.value


class Column(NamedTuple):
    """One column: `find` gives the raw value of a model, `write` its text, `key` names its interval in the record."""

    key: str
    header: str
    hint: str
    group: str
    write: Callable[[float], str]
    find: Callable[[Model], Any]


class Table(NamedTuple):
    """Formatted text only: `rows[i][j]` belongs under `headers[j]`; the first column is the model's name.

    `strong` are the indices of rows that say something beyond noise.
    """

    headers: list[str]
    rows: list[list[str]]
    strong: frozenset[int] = frozenset()


def percent(value: float) -> str:
    """0.973 -> `97.3 %`."""
    return f"{100 * value:.1f} %"


def size(value: float) -> str:
    """Bytes in decimal units with three significant digits: 11_034_112 -> `11.0 MB`."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        scaled = value / 10**power
        if scaled >= 0.9995:
            return f"{scaled:.{max(0, 2 - int(math.log10(max(scaled, 1))))}f} {unit}"
    return f"{value:.0f} B"


def count(value: float) -> str:
    """10_412_032 -> `10.4 M`."""
    for power, unit in ((9, "B"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.1f} {unit}"
    return f"{value:.0f}"


def rate(value: float) -> str:
    """Tokens per second with a thin grouping: 12345.6 -> `12,346`."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits, where it is readable without an exponent: 0.0181, 1.640, 12345."""
    if not math.isfinite(value):
        return "∞"
    if value != 0 and not 1e-5 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    places = 0 if value == 0 else digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(places, 0)}f}"


_UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_NUMBER = re.compile(r"([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)(?: ([kMGT]?B)\b)?", re.IGNORECASE)


def sort_key(written: str) -> str:
    """Return a cell's sort key: its number in base units, else its text; nothing where the value is unknown.

    `11.0 MB` -> `11000000.0`, `94.0 % [92.0, 96.0]` -> `94.0`, `w4a16` -> `w4a16`.
    """
    if written == UNKNOWN:
        return ""
    found = _NUMBER.match(written)
    return written if found is None else str(float(found[1].replace(",", "")) * _UNITS.get(found[2] or "", 1.0))


def trimmed(value: float) -> str:
    """Format a round value as on an axis: 0.2, 50."""
    written = significant(value, 4)
    return written.rstrip("0").rstrip(".") if "." in written and "e" not in written else written


def _metric(key: str) -> Callable[[Model], Any]:
    return lambda model: model["metrics"].get(key)


def _top(key: str) -> Callable[[Model], Any]:
    return lambda model: model.get(key)


def _column(key: str, header: str, group: str, write: Callable[[float], str], hint: str) -> Column:
    return Column(key, header, hint, group, write, _metric(key))


def _two(value: float) -> str:
    return f"{value:.2f}"


def _four(value: float) -> str:
    return significant(value, 4)


COLUMNS: tuple[Column, ...] = (
    Column("bytes", "Size", "sum of the safetensors files", "Size", size, _top("bytes")),
    Column("bits_per_weight", "Bits per weight", "8 × bytes / parameters", "Size", _two, _top("bits_per_weight")),
    Column("kv_cache_bytes_per_token", "Cache a token", "keys and values of all blocks, scales included", "Size", size,
           _top("kv_cache_bytes_per_token")),
    _column("exact_match", "Exact match", "Reasoning", percent, "share of unseen problems answered exactly"),
    Column("exact_match_ratio", "Of reference", "exact match / the reference's, same problems", "Reasoning", percent,
           lambda model: (model.get("relative") or {}).get("exact_match")),
    _column("f1", "F1", "Reasoning", percent, "token F1 of the answer"),
    _column("valid_steps", "Valid steps", "Reasoning", percent, "valid steps / written steps, 0 without a chain"),
    _column("kl_divergence", "KL", "Fidelity", significant, "KL(reference ‖ model), nats per predicted token"),
    _column("top1_agreement", "Top-1", "Fidelity", percent, "share of positions with the reference's likeliest token"),
    _column("perplexity", "Perplexity", "Fidelity", _four, "exp of the mean negative log-likelihood of a token"),
    _column("peak_bytes", "Peak memory", "Runtime", size, "peak resident memory of a process that runs it in PyTorch"),
)  # fmt: skip
COMPACT = (
    "bytes",
    "bits_per_weight",
    "exact_match",
    "exact_match_ratio",
    "valid_steps",
    "kl_divergence",
    "top1_agreement",
)


def cell(column: Column, model: Model) -> Cell:
    """Format the value and interval of one model in one column."""
    value = column.find(model)
    if value is None:
        return Cell(UNKNOWN)
    limits = (model.get("intervals") or {}).get(column.key)
    if not limits or limits[0] is None or limits[1] is None:
        return Cell(column.write(value))
    write = _short if column.key == "kl_divergence" else column.write
    low, high = (write(limit).removesuffix(" %") for limit in limits)
    return Cell(column.write(value), f"[{low}, {high}]")


def _short(value: float) -> str:
    return significant(value, 2)


def shown(record: Record, keys: Iterable[str] | None = None) -> list[Column]:
    """Select the columns (of `keys`, or all) that at least one model or ablation has a value for."""
    wanted = set(keys) if keys is not None else {column.key for column in COLUMNS}
    models = everything(record)
    return [c for c in COLUMNS if c.key in wanted and any(c.find(model) is not None for model in models)]


def not_measured(record: Record) -> list[str]:
    """Headers of the columns that were left out because no model has a value."""
    present = {column.key for column in shown(record)}
    return [column.header for column in COLUMNS if column.key not in present]


def everything(record: Record) -> list[Model]:
    """Models in the order of the pipeline, then the ablations."""
    return [*record["models"], *(record.get("ablations") or [])]


def rows(record: Record, compact: bool = False) -> Table:
    """Build the table over the stages, teacher first; `compact` keeps what fits into a terminal of 120 columns."""
    columns = shown(record, COMPACT if compact else None)
    lines = [[label(record, model), *(str(cell(column, model)) for column in columns)] for model in everything(record)]
    return Table(["Model", *(column.header for column in columns)], lines)


def label(record: Record, model: Model) -> str:
    """Return the name, marked where the row is the reference or an ablation."""
    if model["name"] == record.get("reference"):
        return f"{model['name']} (reference)"
    if any(model is other for other in record.get("ablations") or []):
        return f"{model['name']} (ablation)"
    return str(model["name"])


def artifact_rows(record: Record) -> Table:
    """Engines and graphs: built files that are not models of this report."""
    lines = [
        [
            a["name"],
            a["target"] or UNKNOWN,
            UNKNOWN if a["bytes"] is None else size(a["bytes"]),
            "; ".join(filter(None, (a["status"], a.get("note")))) or UNKNOWN,
            a["path"] or UNKNOWN,
        ]
        for a in record.get("artifacts") or []
    ]
    return Table(["Artifact", "Target", "Size", "Status", "File"], lines)


def family_rows(record: Record, metric: str = "exact_match") -> Table:
    """One row a model, one column a problem family, of one reasoning metric."""
    families = family_names(record)
    lines = []
    for model in everything(record):
        found = model.get("families") or {}
        values = [(found.get(family) or {}).get(metric) for family in families]
        lines.append([label(record, model), *(UNKNOWN if v is None else percent(v) for v in values)])
    return Table(["Model", *families], lines)


def family_names(record: Record) -> list[str]:
    """Every family any model has numbers for, in the order they first appear."""
    return list(dict.fromkeys(family for model in everything(record) for family in model.get("families") or {}))


def covered(record: Record) -> list[Model]:
    """Models of which it is known how many calibration tokens reached each expert."""
    return [model for model in everything(record) if model.get("expert_coverage")]


def coverage_rows(record: Record) -> Table:
    """One row a block of a model: how evenly the calibration text reached its experts."""
    lines = []
    for model in covered(record):
        for block in model["expert_coverage"]:
            tokens = sorted(block["tokens"])
            numbers = (len(tokens), tokens[0], tokens[len(tokens) // 2], tokens[-1], len(block["starved"]))
            starved = ", ".join(map(str, block["starved"][:12])) + (", ..." if len(block["starved"]) > 12 else "")
            lines.append([str(model["name"]), str(block["block"]), *map(str, numbers), starved or UNKNOWN])
    headers = ["Model", "Block", "Experts", "Fewest", "Median", "Most", "Too few", "Solved without statistics"]
    return Table(headers, lines)


def layer_rows(record: Record, key: str = "error_by_layer") -> Table:
    """One row a layer, one column a model whose `key` by layer is known."""
    models = [model for model in everything(record) if model.get(key)]
    depth = max((len(model[key]) for model in models), default=0)
    lines = []
    for layer in range(depth):
        values = [model[key][layer] if layer < len(model[key]) else None for model in models]
        if key == "error_by_layer" or any(value is not None for value in values):
            lines.append([str(layer), *(UNKNOWN if v is None else significant(v) for v in values)])
    return Table(["Layer", *(model["name"] for model in models)], lines)
