"""The keys of a report's row: all of them are there, those that nothing measured are null."""

from __future__ import annotations

from typing import Any

from deepseek_compress.evaluation import efficiency, summary

METRICS = (*summary.REASONING, *summary.FIDELITY, *efficiency.UNKNOWN)
UNKNOWN = (
    "families", "error_by_layer", "choice_by_layer", "outliers_by_layer", "experts_by_layer", "weight_errors",
    "expert_coverage", "kv_cache_bytes_per_token", "process", "sampled", "certainty", "flips", "kl", "speed", "safety",
)  # fmt: skip


def empty_row(name: str, path: str) -> dict[str, Any]:
    """Return a row of which nothing is known."""
    row: dict[str, Any] = {"name": name, "path": path, "bytes": None, "parameters": None, "bits_per_weight": None}
    row |= {"metrics": dict.fromkeys(METRICS), "intervals": {}, "lineage": [], "about": "", "relative": {}}
    return {**row, **dict.fromkeys(UNKNOWN)}
