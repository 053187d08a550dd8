"""The report as CSV: one row a model, numbers as they are in the JSON, for a spreadsheet."""

from __future__ import annotations

import csv
import io
from typing import Any

from deepseek_compress.reports import gate, proof, table
from deepseek_compress.reports.table import Record

PLAIN = ("name", "bytes", "bits_per_weight", "parameters", "about")
METRICS = ("exact_match", "f1", "valid_steps", "perplexity", "kl_divergence", "top1_agreement")
CERTAINTY = ("difference", "lost", "gained", "p_holm", "hidden", "needed")
SPEED = ("runtime", "prefill_tokens_per_s", "decode_tokens_per_s", "first_token_s", "peak_bytes")
FORMULA = ("=", "+", "-", "@")  # a spreadsheet would compute a text that begins so


def csv_text(record: Record) -> str:
    """Render the record as CSV."""
    best, out = gate.pareto(record), io.StringIO()
    intervals = [f"{name}_{end}" for name in METRICS for end in ("low", "high")]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*PLAIN, *METRICS, *intervals, *CERTAINTY, *SPEED, "pareto"])
    for model in table.everything(record):
        limits = [(model.get("intervals") or {}).get(name) or (None, None) for name in METRICS]
        certainty, speed = model.get("certainty") or {}, proof.speed(model) or {}
        row = [
            *(model.get(key) for key in PLAIN),
            *(model["metrics"].get(key) for key in METRICS),
            *(limit for pair in limits for limit in pair),
            *(certainty.get(key) for key in CERTAINTY),
            *(speed.get(key) for key in SPEED),
            int(model["name"] in best),
        ]
        writer.writerow([_cell(value) for value in row])
    return out.getvalue()


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
