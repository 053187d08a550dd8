"""Where a model's predictions differ: the spread of KL over positions, by how sure the reference is, the worst as text.

A mean hides that a few positions carry most of it, and that they are where the reference itself is unsure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from deepseek_compress.evaluation.divergence import Positions, Sample

EDGES = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, float("inf"))  # nats of the reference's entropy
WORST, BEFORE = 5, 12  # positions that are shown, and tokens before each


def spread(positions: Positions, samples: Sequence[Sample], decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """Return the entry `kl` of a report: llama.cpp's percentiles (`--kl-divergence`), shares by entropy, the worst."""
    kl, entropy = np.asarray(positions.kl), np.asarray(positions.entropy)
    total = float(kl.sum()) or 1.0
    bands = []
    for low, high in pairwise(EDGES):
        inside = (entropy >= low) & (entropy < high) if low else entropy < high
        if inside.any():
            mean, share = float(kl[inside].mean()), float(kl[inside].sum() / total)
            bands.append({"from": low, "to": None if high == EDGES[-1] else high, "positions": int(inside.sum()),
                          "kl": mean, "share": share})  # fmt: skip
    worst = []
    for index in np.argsort(-kl, kind="stable")[:WORST]:
        sample, place = samples[positions.sample[index]], positions.place[index]
        worst.append(
            {
                "kl": float(kl[index]),
                "before": decode(sample.tokens[max(0, place - BEFORE) : place]),
                "token": decode(sample.tokens[place : place + 1]),
            }
        )
    percentiles = {name: float(np.quantile(kl, at)) for name, at in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {**percentiles, "max": float(kl.max()), "by_entropy": bands, "worst": worst}
