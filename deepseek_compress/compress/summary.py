"""Summary of the block loop's facts for the run record and the manifest; the full table goes to `dsc_layers.json`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from deepseek_compress.calibration.selection import spread
from deepseek_compress.checkpoint.files import read_json, write_json

LAYERS = "dsc_layers.json"
WORST = 10
Facts = dict[str, Any]  # of one block: {"linears": [...], "experts": {...}}


def summarize(blocks: Sequence[Facts]) -> Facts:
    """{"linears", "weights", "bits_per_weight", "sparsity", "blocks": [...], "fallback": [...]}.

    Means are over weights. `blocks` has for each block the mean relative squared errors of weights and outputs, and
    where tokens were routed: the `spread` of what experts got, and which got too few.
    """
    linears = [linear for block in blocks for linear in block["linears"]]
    return {
        "linears": len(linears),
        "weights": sum(linear["weights"] for linear in linears),
        "bits_per_weight": _mean(linears, "bits"),
        "sparsity": _mean(linears, "zeros"),
        "blocks": [_block(layer, block) for layer, block in enumerate(blocks)],
        "fallback": [linear["name"] for linear in linears if linear["fallback"]],
    }


def corrections(blocks: Sequence[Facts]) -> list[str]:
    """Say in one line how far linears were corrected towards the original's outputs; none where no method does it."""
    found = sorted(linear["strength"] for block in blocks for linear in block["linears"] if linear.get("strength"))
    asked = sum("strength" in linear for block in blocks for linear in block["linears"])
    if not asked:
        return []
    middle = f", by {found[0]:.2f} to {found[-1]:.2f}, in the middle {found[len(found) // 2]:.2f}" if found else ""
    return [
        f"{len(found)} of {asked} linears corrected towards the original's outputs{middle} (1: all of what is missing)"
    ]


def starved(blocks: Sequence[Facts], least: int) -> list[str]:
    """Say in one line how many linears got too little text to be solved on it; nothing where all got enough."""
    linears = [linear for block in blocks for linear in block["linears"]]
    few = sum(linear["fallback"] for linear in linears)
    line = f"{few} of {len(linears)} linears saw fewer than {least} tokens, so that they were solved without statistics"
    return [f"{line}: give more text (--samples, --length)"] if few else []


def write(out: Path, blocks: Sequence[Facts]) -> None:
    """Write the table of all linears, and the tokens of every expert, to `out`/dsc_layers.json."""
    write_json(out / LAYERS, {"schema": 1, "blocks": list(blocks)})


def coverage(path: Path) -> list[Facts] | None:
    """[{"block", "tokens": [per expert], "starved": [...]}] of the checkpoint at `path`; None where it is not known."""
    rows = enumerate(_blocks(path))
    found = [(layer, block.get("experts")) for layer, block in rows if isinstance(block, dict)]
    return [{"block": layer, **experts} for layer, experts in found if _counted(experts)] or None


def weight_errors(path: Path) -> Facts | None:
    """{"roles": [...], "worst": [...]} of the linears that the checkpoint at `path` says it changed; None: unknown.

    Relative squared errors of weights and outputs: `roles` has means over weights for each kind of linear, `worst` the
    `WORST` linears of the largest output error, or weight error where outputs were not measured.
    """
    linears = [
        linear
        for block in _blocks(path)
        for linear in _list(block.get("linears") if isinstance(block, dict) else None)
        if _measured(linear)
    ]
    if not linears:
        return None
    keys = ("name", "bits", "weight_error", "output_error")
    first = "output_error" if any(linear["output_error"] is not None for linear in linears) else "weight_error"
    ranked = sorted(linears, key=lambda linear: (-(linear[first] or 0.0), linear["name"]))
    return {
        "roles": [
            {"role": role, "linears": len(its), **{key: _mean(its, key) for key in keys[1:]}}
            for role in sorted({linear["role"] for linear in linears})
            for its in [[linear for linear in linears if linear["role"] == role]]
        ],
        "worst": [{key: linear[key] for key in keys} for linear in ranked[:WORST]],
    }


def _blocks(path: Path) -> list[Any]:
    """Read the facts of the blocks at `path`; none where the table is missing or is of something else."""
    file = path / LAYERS
    return _list(read_json(file).get("blocks")) if file.is_file() else []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _measured(linear: Any) -> TypeGuard[Facts]:
    """Whether this is what `write` wrote of a linear whose weight error is known."""
    if not isinstance(linear, dict) or not all(isinstance(linear.get(key), str) for key in ("name", "role")):
        return False
    output = linear.get("output_error", 0.0)
    numbers = (linear.get("bits"), linear.get("weight_error"), 0.0 if output is None else output)
    return (
        "output_error" in linear
        and all(map(_positive, numbers))
        and _positive(linear.get("weights"))
        and linear["weights"] > 0
    )


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < math.inf


def _counted(experts: Any) -> TypeGuard[Facts]:
    """Whether this has the tokens of each expert, and those that starved."""
    if not isinstance(experts, dict) or not isinstance(experts.get("starved"), list):
        return False
    tokens = experts.get("tokens")
    return isinstance(tokens, list) and bool(tokens) and all(type(count) is int and count >= 0 for count in tokens)


def _block(layer: int, block: Facts) -> Facts:
    linears = block["linears"]
    row: Facts = {
        "block": layer,
        "weight_error": _mean(linears, "weight_error"),
        "output_error": _mean(linears, "output_error"),
    }
    if "experts" in block:
        row["expert_tokens"] = spread(block["experts"]["tokens"])
        row["starved_experts"] = block["experts"]["starved"]
    return row


def _mean(rows: Iterable[Facts], key: str) -> float | None:
    rows = [row for row in rows if row[key] is not None]  # None: not measured
    weights = sum(row["weights"] for row in rows)
    return sum(row["weights"] * row[key] for row in rows) / weights if weights else None
