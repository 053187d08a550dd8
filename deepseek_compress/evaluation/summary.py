"""From what was measured per problem and per sample to the metrics of a report, with their intervals.

Pure: lists in, numbers out. Shares of problems have Wilson intervals, everything else the bootstrap's; what compares a
model with its reference is resampled over the same problems for both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from deepseek_compress.evaluation.divergence import Divergence
from deepseek_compress.evaluation.reasoning import step_share
from deepseek_compress.evaluation.statistics import Bootstrap, ratio_of_means, wilson
from deepseek_compress.tasks import Verdict

REASONING = ("exact_match", "f1", "valid_steps")
FIDELITY = ("perplexity", "kl_divergence", "top1_agreement")


def scores(verdicts: Sequence[Verdict], samples: int = 1) -> dict[str, list[float]]:
    """Per problem: exact match (0 or 1), token F1, share of valid steps; means over `samples` neighbours."""
    found = {
        "exact_match": [float(verdict.exact) for verdict in verdicts],
        "f1": [verdict.f1 for verdict in verdicts],
        "valid_steps": [step_share(verdict) for verdict in verdicts],
    }
    if samples == 1:
        return found
    starts = range(0, len(verdicts), samples)
    return {name: [mean(values[start : start + samples]) for start in starts] for name, values in found.items()}


def sampled(verdicts: Sequence[Verdict], samples: int) -> dict[str, Any] | None:
    """Return the entry `sampled` of a report: exact match of each round of answers, and pass@k; None for one answer
    each.

    pass@k = 1 - C(n - c, k) / C(n, k) of n answers with c right, averaged over problems (Chen et al. 2021, arXiv
    2107.03374).
    """
    if samples == 1:
        return None
    right = [sum(v.exact for v in verdicts[at : at + samples]) for at in range(0, len(verdicts), samples)]
    rounds = [mean([float(v.exact) for v in verdicts[number::samples]]) for number in range(samples)]
    counts = sorted({1, *(2**power for power in range(1, 11) if 2**power < samples), samples})
    passed = {str(k): mean([1 - math.comb(samples - c, k) / math.comb(samples, k) for c in right]) for k in counts}
    return {"rounds": rounds, "spread": statistics.stdev(rounds), "pass_at": passed}


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean, rounded once."""
    return math.fsum(values) / len(values)


def reasoning(verdicts: Sequence[Verdict], draws: Bootstrap, samples: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, intervals) over all problems."""
    found = scores(verdicts, samples)
    metrics = {name: mean(values) for name, values in found.items()}
    intervals: dict[str, Any] = {name: draws.ratio(values) for name, values in found.items()}
    if samples == 1:
        intervals["exact_match"] = wilson(sum(found["exact_match"]), len(verdicts))
    return metrics, intervals


def against(
    verdicts: Sequence[Verdict], reference: Sequence[Verdict], draws: Bootstrap, samples: int = 1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(relative, intervals): each score divided by the reference's on the same problems, and their differences.

    Intervals are named `exact_match_ratio`, `exact_match_difference` and so on.
    """
    mine, theirs = scores(verdicts, samples), scores(reference, samples)
    relative = {name: ratio_of_means(mine[name], theirs[name]) for name in REASONING}
    intervals: dict[str, Any] = {}
    for name in REASONING:
        intervals[f"{name}_ratio"] = draws.ratio(mine[name], theirs[name])
        intervals[f"{name}_difference"] = draws.difference(mine[name], theirs[name])
    return relative, intervals


def families(verdicts: Sequence[Verdict], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the scores of each family; `names[i]` is the family of problem i. The interval is that of exact match."""
    found: dict[str, dict[str, Any]] = {}
    for family in dict.fromkeys(names):
        chosen = [verdict for verdict, name in zip(verdicts, names, strict=True) if name == family]
        values = scores(chosen)
        found[family] = {name: mean(values[name]) for name in REASONING}
        found[family] |= {"problems": len(chosen), "interval": wilson(sum(values["exact_match"]), len(chosen))}
    return found


def fidelity(divergence: Divergence, draws: Bootstrap) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, intervals) per predicted token, resampled over windows or solutions."""
    tokens = divergence.tokens
    metrics = {
        "perplexity": divergence.perplexity,
        "kl_divergence": divergence.kl_divergence,
        "top1_agreement": divergence.top1_agreement,
    }
    intervals: dict[str, Any] = {"perplexity": draws.exp_ratio(divergence.nll, tokens)}
    if divergence.kl is not None and divergence.agreed is not None:
        intervals["kl_divergence"] = draws.ratio(divergence.kl, tokens)
        intervals["top1_agreement"] = draws.ratio(divergence.agreed, tokens)
    return metrics, intervals


def finite(value: Any) -> Any:
    """Return the same structure with every number that JSON cannot hold (infinity, NaN) as None, and tuples as
    lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
