"""The sentences of a report: its verdict, the few figures on top, what was measured on what, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_compress.reports import gate, proof, table
from deepseek_compress.reports.table import Model, Record


def verdict(record: Record) -> str:
    """Summarize the loss against the reference: of the pipeline's last model, or of all that several runs compare."""
    if _several(record):
        return _compared(record)
    reference, last = ends(record)
    if last is None:
        return "No model was evaluated."
    if reference is None or last is reference:
        return _alone(last)
    parts = []
    if last["bytes"] and reference["bytes"]:
        parts.append(f"is {_times(reference['bytes'] / last['bytes'])} {reference['name']}")
    kept = table.cell(_column("exact_match_ratio"), last)
    agreement = last["metrics"].get("top1_agreement")
    if kept.value != table.UNKNOWN and proof.floor(record) is None:
        parts.append(f"keeps {kept.value} of its exact match{_of_interval(kept.interval)}")
    elif agreement is not None:
        parts.append(f"agrees with {reference['name']} on {table.percent(agreement)} of the next tokens")
    said = f"{last['name']} {' and '.join(parts) or 'was evaluated with ' + reference['name']}."
    other = f"{last['name']} has another tokenizer"  # so that its answers are all that can be compared
    noted = next((note for note in record.get("notes") or [] if other in note), None)
    return " ".join(filter(None, [said, proof.floor(record) or proof.certain(last), noted]))


def facts(record: Record) -> list[tuple[str, str, str]]:
    """(term, value, note) of the figures that stand on top, about the last model; unknown ones are left out."""
    reference, last = ends(record)
    if last is None or _several(record):
        return []
    found = []
    if last["bytes"]:
        note = ""
        if reference is not None and reference["parameters"] and last is not reference:
            note = f"{_times(2 * reference['parameters'] / last['bytes'])} {reference['name']} in BF16"
        found.append(("Size on disk", table.size(last["bytes"]), note))
    if last["bits_per_weight"] is not None:
        found.append(
            ("Bits per weight", f"{last['bits_per_weight']:.2f}", f"{table.count(last['parameters'] or 0)} parameters")
        )
    for key, other in (
        ("exact_match", True),
        ("top1_agreement", False),
        ("kl_divergence", False),
    ):
        if key == "exact_match" and proof.floor(record) is not None:
            continue
        column = _column(key)
        cell = table.cell(column, last)
        if cell.value == table.UNKNOWN:
            continue
        theirs = (
            table.cell(column, reference).value if other and reference is not None and last is not reference else ""
        )
        found.append(
            (column.header, cell.value, f"{reference['name']} {theirs}" if theirs and reference else cell.interval)
        )
    rows = {line[0]: line for line in proof.speed_rows(record).rows}
    mine = proof.speed(last)
    if mine is not None and mine["runtime"] != proof.EVALUATION and reference is not None and last is not reference:
        found.append(
            ("Decode speed", rows[table.label(record, last)][4], f"{mine['runtime']}, against {reference['name']}")
        )
    return found


def ends(record: Record) -> tuple[Model | None, Model | None]:
    """Return the reference, None if it is not among the models, and the last model that is not it, if there is one."""
    reference = next((model for model in record["models"] if model["name"] == record.get("reference")), None)
    others = [model for model in record["models"] if model is not reference]
    return reference, others[-1] if others else reference


def subject(record: Record) -> str:
    """Write the line above the title: how many models, against what."""
    models = len(record["models"])
    line = f"Compression report · {models} model{'' if models == 1 else 's'}"
    if record.get("ablations"):
        line += f" and {len(record['ablations'])} outside the pipeline"
    return line + (f" · reference {record['reference']}" if record.get("reference") else "")


def measured_on(record: Record) -> str:
    """Describe the data behind the table's numbers."""
    suite, text, parts = record.get("suite"), record.get("text"), []
    if suite:
        parts.append(
            f"Reasoning on {suite['problems']:,} unseen problems of the suite {suite['name']}, "
            "the same for every model."
        )
    if text:
        parts.append(
            f"Fidelity and perplexity on {text['source']}: {text['tokens']:,} predicted tokens "
            f"in {text['windows']:,} windows."
        )
    front = [model["name"] for model in table.everything(record) if model["name"] in gate.pareto(record)]
    if len(table.everything(record)) > 2 and front and not _several(record):
        parts.append(f"Not beaten in size and accuracy together (Pareto front): {', '.join(front)}.")
    return " ".join(parts) or "Size only: neither problems nor text were evaluated."


def notes(record: Record) -> list[str]:
    """Explain how every column was measured, then what this run had to leave out."""
    hints = [f"{column.header}: {column.hint}." for column in table.shown(record)]
    general = [
        "Intervals: Wilson for shares of problems; percentile bootstrap over problems or windows for the rest, drawn "
        "once for all models, so that ratios to the reference are paired.",
        "Speed: where the runtime is PyTorch, weights are unpacked to float32, and a model of few bits is no faster "
        "than its source; what is deployed is measured in its own runtime.",
    ]
    return [*hints, *general, *(record.get("notes") or [])]


def lineage(model: Model) -> list[str]:
    """Format the way from the published checkpoint to this model: `nano`, `distill: student`, `compress: w4a16`."""
    steps = [step for step in model.get("lineage") or [] if isinstance(step, Mapping)]
    if not steps:
        return []
    made = [str(step.get("source")) for step in steps[1:]] + [str(model["name"])]
    return [
        str(steps[0].get("source")),
        *(f"{step.get('stage')}: {name}" for step, name in zip(steps, made, strict=True)),
    ]


def fact(name: str, value: Any) -> str:
    """Format a value of the machine or the versions as text."""
    if value is None:
        return table.UNKNOWN
    if isinstance(value, int) and name.endswith("bytes"):
        return table.size(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {fact(str(key), item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(fact(name, item) for item in value)
    return str(value)


def _several(record: Record) -> bool:
    """Whether the models are of several runs, of which none is the last of one pipeline."""
    return len(record.get("sources") or []) > 1


def _compared(record: Record) -> str:
    reference, _ = ends(record)
    against = f" against {reference['name']}" if reference is not None else ", which have no reference in common"
    said = [f"{len(table.everything(record))} models of {len(record['sources'])} runs{against}."]
    best = [str(model["name"]) for model in table.everything(record) if model["name"] in gate.pareto(record)]
    if best:
        said.append(f"Not beaten in size and accuracy together: {_listed(best)}.")
    if proof.floor(record):
        return " ".join([*said, str(proof.floor(record))])
    compared = [model for model in table.everything(record) if model.get("certainty")]
    real = [str(model["name"]) for model in compared if proof.beyond_noise(model)]
    if compared:
        said.append(f"Answers differ from the reference's beyond noise: {_listed(real) if real else 'none'}.")
    return " ".join(said)


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _alone(model: Model) -> str:
    found = []
    for key in ("bytes", "exact_match", "top1_agreement", "perplexity"):
        column = _column(key)
        cell = table.cell(column, model)
        if cell.value != table.UNKNOWN:
            found.append(f"{column.header.lower()} {cell.value}{_of_interval(cell.interval)}")
    return f"{model['name']}: {', '.join(found) or 'nothing was measured'}."


def _times(factor: float) -> str:
    if 0.95 < factor < 1.05:
        return "as large as"
    return f"{factor:.1f} times smaller than" if factor > 1 else f"{1 / factor:.1f} times larger than"


def _of_interval(interval: str) -> str:
    return f" (95 % interval {interval.strip('[]').replace(', ', ' to ')})" if interval else ""


def _column(key: str) -> table.Column:
    return next(column for column in table.COLUMNS if column.key == key)
