"""`--fail-if "exact_match < -1.0"`: whether a report is good enough, for a build that stops where it is not.

    condition := KEY ("<" | ">" | "<=" | ">=") NUMBER

exact_match, f1, valid_steps and top1_agreement are points of difference from the reference (100 times the difference of
shares), or shares in points for a model without one; size is the ratio of bytes to the reference's, perplexity too;
decode_tokens_per_s and prefill_tokens_per_s the ratio of speeds in the models' own runtimes. kl_divergence is nats a
token, KL99 its 99th percentile. A condition that nothing measured answers is an error, never a pass.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from deepseek_compress.errors import DscError
from deepseek_compress.reports import proof, table
from deepseek_compress.reports.table import Model, Record

POINTS = ("exact_match", "f1", "valid_steps", "top1_agreement")
RATIOS = ("perplexity", "bytes", "decode_tokens_per_s", "prefill_tokens_per_s")
NATS = ("kl_divergence", "kl_p99")
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
}  # fmt: skip
_FORM = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*(-?\d+(?:\.\d+)?)\s*")


class Condition(NamedTuple):
    """One comparison."""

    key: str
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.key} {self.sign} {self.limit:g}"


def parse(text: str) -> Condition:
    """Parse the condition `text`. Raises `DscError` with the form and the valid names."""
    found = _FORM.fullmatch(text)
    valid = (*POINTS, *RATIOS, *NATS)
    if not found:
        raise DscError(f"--fail-if {text[:80]!r}: not a condition", 'write for instance --fail-if "exact_match < -1.0"')
    if found[1] not in valid:
        raise DscError(f"--fail-if: unknown key {found[1]!r}", f"valid names: {', '.join(valid)}")
    return Condition(found[1], found[2], float(found[3]))


def failures(record: Record, conditions: Sequence[Condition]) -> list[DscError]:
    """Every model that meets a condition, and every condition that nothing answers."""
    reference = next((m for m in record["models"] if m["name"] == record.get("reference")), None)
    found = []
    for condition in conditions:
        values = [(m, value(m, reference, condition.key)) for m in record["models"] if m is not reference]
        known = [(model, number) for model, number in values if number is not None]
        if not known:
            found.append(
                DscError(f"{condition}: not measured in these reports", "measure it, or leave the condition out")
            )
        found += [
            DscError(f"{model['name']}: {condition.key} is {number:.4g}, and {condition} fails", "")
            for model, number in known
            if OPERATORS[condition.sign](number, condition.limit)
        ]
    return found


def value(model: Model, reference: Model | None, key: str) -> float | None:
    """Return the value that a condition on `key` compares; None where it was not measured."""
    if key == "kl_p99":
        return (model.get("kl") or {}).get("p99")
    if key in RATIOS:
        mine, theirs = _plain(model, key), _plain(reference, key)
        return float(mine / theirs) if mine is not None and theirs else None
    mine = model["metrics"].get(key)
    if key in NATS or mine is None:
        return mine  # type: ignore[no-any-return]
    if key == "top1_agreement":
        return float(100 * (mine - 1))
    theirs = reference["metrics"].get(key) if reference is not None else 0.0
    return None if theirs is None else float(100 * (mine - theirs))


def _plain(model: Model | None, key: str) -> float | None:
    if model is None:
        return None
    if key == "bytes":
        return model["bytes"]  # type: ignore[no-any-return]
    if key.endswith("tokens_per_s"):
        return (proof.speed(model) or {}).get(key)
    return model["metrics"].get(key)  # type: ignore[no-any-return]


def pareto(record: Record) -> set[str]:
    """Names of the models that no other beats in size and in exact match (top-1 where nothing was asked)."""
    for key in ("exact_match", "top1_agreement"):
        points = [
            (m["bytes"], m["metrics"].get(key), m["name"])
            for m in table.everything(record)
            if m["bytes"] and m["metrics"].get(key) is not None
        ]
        if points:
            return front(points)
    return set()


def front(points: Sequence[tuple[float, float, str]]) -> set[str]:
    """Names of the (cost, score, name) that no other beats in both."""
    return {
        name
        for cost, score, name in points
        if not any(c <= cost and s >= score and (c < cost or s > score) for c, s, _ in points)
    }
