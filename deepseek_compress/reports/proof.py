"""The tables of what answers prove: certainty of a difference, how answers came about, flips, where KL sits, speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepseek_compress.reports import table
from deepseek_compress.reports.table import UNKNOWN, Model, Record, Table

FLOOR = 0.05  # exact match of the reference below which its answers cannot show a loss
FEW = 5  # and right answers
EVALUATION = "PyTorch, weights unpacked to float32"


def floor(record: Record) -> str | None:
    """Why the answers of this report cannot show a loss; None where they can."""
    reference = next((m for m in record["models"] if m["name"] == record.get("reference")), None)
    right = reference["metrics"].get("exact_match") if reference is not None else None
    problems = (record.get("suite") or {}).get("problems")
    if reference is None or right is None or (right >= FLOOR and right * (problems or FEW / FLOOR) >= FEW):
        return None
    of = f" of {problems:,} problems" if problems else " of the problems"
    return (
        f"{reference['name']} itself solves {table.percent(right)}{of}: too few to show what was lost. "
        "Judge by KL and top-1 over the reference answers, or give more problems, or easier ones."
    )


def certain(model: Model) -> str:
    """One sentence on the difference from the reference."""
    found = model.get("certainty")
    if not found:
        return ""
    low, high = (f"{100 * limit:+.1f}" for limit in found["interval"])
    if beyond_noise(model):
        what = "loss" if found["difference"] < 0 else "gain"
        size = f"{100 * abs(found['difference']):.1f} points (95 % interval {low} to {high}, p = {found['p_holm']:.2g})"
        return f"A {what} of {size}."
    hidden = f"could hide a loss of up to {100 * found['hidden']:.1f} points"
    return (
        f"No difference seen at this size ({hidden}); about {found['needed']:,} problems would show a loss of 1 point."
    )


def beyond_noise(model: Model) -> bool:
    """Whether the answers differ from the reference's by more than chance, after the correction for several models."""
    found = model.get("certainty")
    return found is not None and bool(found["p_holm"] < found.get("level", 0.05))


def certainty_rows(record: Record) -> Table:
    """One row a model that was compared with the reference on the same problems."""
    lines: list[list[str]] = []
    strong: set[int] = set()
    for model in table.everything(record):
        found = model.get("certainty")
        if found:
            if beyond_noise(model):
                strong.add(len(lines))
            low, high = (f"{100 * limit:+.1f}" for limit in found["interval"])
            lines.append([
                table.label(record, model), f"{100 * found['difference']:+.1f}", f"{low} to {high}", str(found["lost"]),
                str(found["gained"]), f"{found['p_holm']:.2g}", certain(model),
            ])  # fmt: skip
    return Table(["Model", "Points", "95 % interval", "Lost", "Gained", "p", "What it says"], lines, frozenset(strong))


def process_rows(record: Record) -> Table:
    """Tabulate the analysis of each model's answers."""
    lines = []
    for model in table.everything(record):
        found = model.get("process")
        if found:
            first = found["first_wrong_step"]
            common = max(first, key=lambda step: first[step]) if first else UNKNOWN
            lines.append([
                table.label(record, model), f"{found['tokens']:.0f}", _times(found["inflation"]),
                _number(found["thinking_tokens"]), _share(found["cut"]), _share(found["looped"]),
                _share(found["unclosed_think"]), _share(found["no_answer"]), _share(found["right_midway"]),
                _share(found["verified_chains"]), common,
            ])  # fmt: skip
    headers = ["Model", "Tokens", "Of reference", "Thinking", "Cut off", "Loops", "Unclosed think", "No answer"]
    return Table([*headers, "Right midway", "All steps hold", "First wrong step"], lines)


def sampled_rows(record: Record) -> Table:
    """pass@k and the spread over rounds, where answers were sampled."""
    found = [(model, model["sampled"]) for model in table.everything(record) if model.get("sampled")]
    counts = sorted({int(k) for _, one in found for k in one["pass_at"]})
    lines = [
        [
            table.label(record, model),
            f"{100 * one['spread']:.1f}",
            *(_share(one["pass_at"].get(str(k))) for k in counts),
        ]
        for model, one in found
    ]
    return Table(["Model", "Spread of rounds", *(f"pass@{k}" for k in counts)], lines)


def kl_rows(record: Record) -> Table:
    """Tabulate the spread of KL over positions."""
    lines = []
    for model in table.everything(record):
        found = model.get("kl")
        if found:
            unsure = sum(band["share"] for band in found["by_entropy"] if band["from"] >= 1.0)
            values = (model["metrics"].get("kl_divergence"), *(found[key] for key in ("median", "p90", "p99", "max")))
            lines.append([table.label(record, model), *map(_number3, values), _share(unsure)])
    headers = ["Model", "Mean", "Median", "90 %", "99 %", "Largest", "Where the reference is unsure"]
    return Table(headers, lines)


def speed_rows(record: Record) -> Table:
    """Speeds, each in its own runtime; those of the evaluation's own loop where nothing else was measured.

    Only those that were measured in turns are compared: the loop multiplies in float32 whatever the weights have.
    """
    models = [model for model in table.everything(record) if speed(model)]
    base = next((speed(model) for model in models if model["name"] == record.get("reference")), None)
    lines = []
    for model in models:
        found = speed(model)
        assert found is not None
        against = base if model.get("speed") else None
        ratio = found["decode_tokens_per_s"] / against["decode_tokens_per_s"] if against else None
        lines.append([
            table.label(record, model), found["runtime"], _rate(found, "prefill_tokens_per_s"),
            _rate(found, "decode_tokens_per_s"), _times(ratio), _number3(found.get("first_token_s")),
            _number3(found.get("token_p95_s")), _number3(found.get("cpu_seconds_per_token")),
            UNKNOWN if found.get("peak_bytes") is None else table.size(found["peak_bytes"]),
        ])  # fmt: skip
    headers = ["Model", "Runtime", "Prefill tok/s", "Decode tok/s", "Of reference", "First token s", "Slow token s"]
    return Table([*headers, "CPU s a token", "Peak memory"], lines)


def speed(model: Model) -> Mapping[str, Any] | None:
    """Collect the known speeds of a model."""
    if model.get("speed"):
        return model["speed"]  # type: ignore[no-any-return]
    metrics = model["metrics"]
    if not metrics.get("decode_tokens_per_s"):
        return None
    keys = ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_bytes")
    return {"runtime": EVALUATION, **{key: metrics.get(key) for key in keys}}


def _rate(found: Mapping[str, Any], key: str) -> str:
    value, limits = found.get(key), (found.get("intervals") or {}).get(key)
    if value is None:
        return UNKNOWN
    return table.rate(value) + (f" [{table.rate(limits[0])}, {table.rate(limits[1])}]" if limits else "")


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else table.percent(value)


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0f}"


def _number3(value: float | None) -> str:
    return UNKNOWN if value is None else table.significant(value)


def _times(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f} ×"


#: title -> (table, what stands above it)
SECTIONS = {
    "Is the difference real?": (
        certainty_rows,
        "Answers to the same problems, paired: McNemar's mid-p test after Holm's correction, Tango's interval.",
    ),
    "How answers came about": (process_rows, "Shares of the answers; right midway: of the wrong ones."),
    "Sampled answers": (sampled_rows, "Each question was answered several times; spread: standard deviation."),
    "Where KL sits": (
        kl_rows,
        "Nats a position; last column: the share of all KL where the reference's entropy is above 1 nat.",
    ),
    "Speed": (speed_rows, "Each model in its own runtime, in turns, one sequence; in brackets 95 % intervals."),
}
