"""The best bits for each unit under a size: what a unit may become, what that takes on disk, and the recipe it makes.

Sizes are those on disk, scales, zero points and shapes included. A target in bits per weight is over the weights of the
units; one in bytes is of the whole checkpoint: embedding, head, norms and the headers of the files too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_compress.checkpoint import Header
from deepseek_compress.compress.fused_groups import FusedGroup
from deepseek_compress.compress.layout import packed, stored16
from deepseek_compress.compress.overrides import Scheme, said
from deepseek_compress.errors import DscError
from deepseek_compress.evaluation.sensitivity import Choice
from deepseek_compress.numerics import MIGRATION, WEIGHTS, WeightQuantizer
from deepseek_compress.numerics.knapsack import assign
from deepseek_compress.numerics.migration import Migration

ENTRY = 128  # bytes that a stored part takes in the header of its file, besides its name
PARTS = 4  # of a packed weight
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")  # that YAML reads as something else


class Target(NamedTuple):
    """A size: one of the two."""

    bits_per_weight: float | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """`3.5 bits per weight`, or `8 GiB`. Raises DscError."""
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(bits? per weight|[kmgt]?i?b)\s*", text.lower())
        if not found or not float(found[1]):
            raise DscError(f"target: invalid size {text!r}", "write for instance 3.5 bits per weight, or 8 GiB")
        if found[2].startswith("bit"):
            return cls(bits_per_weight=float(found[1]))
        return cls(bytes=int(float(found[1]) * _UNITS[found[2]]))


class Sizes(NamedTuple):
    """Bits on disk."""

    options: list[list[int]]  # of each choice, at each of its options
    rest: int  # of everything else in the checkpoint, headers included
    weights: int  # of all units together: how many there are

    def budget(self, target: Target) -> int:
        """Return the bytes that `target` leaves for the units."""
        if target.bits_per_weight is not None:
            return int(target.bits_per_weight * self.weights)
        return 8 * int(target.bytes or 0) - self.rest

    def taken(self, chosen: Sequence[int]) -> int:
        """By the units."""
        return sum(options[choice] for options, choice in zip(self.options, chosen, strict=True))

    def describe(self, bits: int, target: Target) -> str:
        """Bits of the units, in the words of `target`."""
        if target.bits_per_weight is not None:
            return f"{bits / self.weights:.4g} bits per weight"
        return f"{(bits + self.rest) / 8 / (1 << 30):.4g} GiB"


def choices(
    groups: Sequence[FusedGroup], weights: WeightQuantizer, options: Sequence[Scheme], size: int
) -> list[Choice]:
    """List the options of each group; `size`: where neither option nor `weights` has one. What none fits is kept."""
    found = []
    for group in groups:
        fitting: list[WeightQuantizer | None] = []
        for option in options:
            quantizer = option.applied(weights)
            if quantizer is not None:
                quantizer = quantizer.model_copy(update={"group_size": quantizer.group_size or size})
                if any(linear.columns % (quantizer.group_size or size) for linear in group.linears):
                    continue
            fitting.append(quantizer)
        found.append(Choice(group, tuple(dict.fromkeys(fitting)) or (None,)))
    return found


def sizes(header: Header, found: Sequence[Choice]) -> Sizes:
    """From shapes alone; `header` is that of the source."""
    plain = {name: stored16(info) for name, info in header.tensors.items()}
    options, taken = [], set()
    for choice in found:
        names = [name + ".weight" for name in choice.group.names]
        taken |= set(names)
        options.append([8 * sum(_bytes(plain, name, quantizer) for name in names) for quantizer in choice.options])
    rest = sum(info.bytes for name, info in plain.items() if name not in taken)
    entries = sum((PARTS if name in taken else 1) * (len(name) + ENTRY) for name in plain)
    return Sizes(options, 8 * (rest + entries), sum(choice.group.weights for choice in found))


def _bytes(plain: Mapping[str, Any], name: str, quantizer: WeightQuantizer | None) -> int:
    info = plain[name] if quantizer is None else packed(plain[name], quantizer)
    return int(info.bytes)


def allocate(sizes: Sizes, losses: Sequence[Sequence[float]], target: Target) -> list[int]:
    """Choose the option of each unit. Raises DscError where no assignment is small enough."""
    chosen = assign(sizes.options, losses, sizes.budget(target))
    if chosen is None:
        raise too_small(sizes, target)
    return chosen


def uniform(found: Sequence[Choice], sizes: Sizes, target: Target) -> list[int] | None:
    """Choose one number of bits for all units, the largest within the target; None where none fits.

    A unit that lacks that number takes its next larger one: a recipe without overrides would do no better.
    """
    counts = {quantizer.num_bits for choice in found for quantizer in choice.options if quantizer is not None}
    for bits in sorted(counts, reverse=True):
        chosen = [_nearest(choice, taken, bits) for choice, taken in zip(found, sizes.options, strict=True)]
        if sizes.taken(chosen) <= sizes.budget(target):
            return chosen
    return None


def _nearest(choice: Choice, taken: Sequence[int], bits: int) -> int:
    """Return the smallest option of at least so many bits, else the largest there is."""
    widths = [16 if quantizer is None else quantizer.num_bits for quantizer in choice.options]
    enough = [option for option, width in enumerate(widths) if width >= bits]
    return min(enough, key=lambda option: (widths[option], taken[option])) if enough else widths.index(max(widths))


def moved(
    found: Sequence[Choice], losses: Sequence[Sequence[float]], plain: Sequence[int], chosen: Sequence[int]
) -> list[dict[str, Any]]:
    """List the units whose option differs between `chosen` and `plain`, the largest gain first."""
    rows = [
        {
            "unit": choice.group.label, "role": str(choice.group.linears[0].role), "from": said(choice.options[before]),
            "to": said(choice.options[after]), "gain": loss[before] - loss[after],
        }
        for choice, loss, before, after in zip(found, losses, plain, chosen, strict=True)
        if before != after
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["gain"])


def moved_lines(rows: Sequence[Mapping[str, Any]], most: int = 20) -> str:
    """Format them as a table."""
    if not rows:
        return ""
    head = "| unit | role | from | to | KL saved |\n| --- | --- | --- | --- | ---: |\n"
    cells = [f"| {r['unit']} | {r['role']} | {r['from']} | {r['to']} | {r['gain']:+.2e} |" for r in rows[:most]]
    rest = f"\n\nand {len(rows) - most} more" if len(rows) > most else ""
    return f"\n## Where more bits help, and where fewer do no harm\n\n{head}" + "\n".join(cells) + rest + "\n"


def too_small(sizes: Sizes, target: Target) -> DscError:
    """Return the error for a target that nothing fits."""
    least = sum(min(options) for options in sizes.options)
    asked = sizes.describe(sizes.budget(target), target)
    what = f"target: {asked} asked for, the smallest options take {sizes.describe(least, target)}"
    return DscError(what, "give a larger target, or options with fewer bits")


def recipe(
    found: Sequence[Choice],
    chosen: Sequence[int],
    weights: WeightQuantizer,
    calibration: Mapping[str, Any],
    note: str,
    migration: Migration | None = None,
) -> str:
    """Write the recipe as YAML: the scheme of most weights in `weights`, one override for each of the others."""
    groups: dict[WeightQuantizer | None, list[FusedGroup]] = {}
    for choice, option in zip(found, chosen, strict=True):
        groups.setdefault(choice.options[option], []).append(choice.group)
    ordered = sorted(groups, key=lambda q: -sum(unit.weights for unit in groups[q]))
    base = next((quantizer for quantizer in ordered if quantizer is not None), weights)
    method = next(name for name, kind in WEIGHTS.items() if type(weights) is kind)
    knobs = {**weights.model_dump(mode="json", exclude_defaults=True), **_scheme(base), "symmetric": base.symmetric}
    lines = [f"# {note}", f"calibration: {_flow(calibration)}", "stages:", "  - compress:"]
    if migration is not None:
        moved = next(name for name, kind in MIGRATION.items() if type(migration) is kind)
        lines += [f"      migration: {{{moved}: {_flow(migration.model_dump(mode='json', exclude_defaults=True))}}}"]
    lines += [f"      weights: {{{method}: {_flow(knobs)}}}"]
    others = [quantizer for quantizer in ordered if quantizer != base]
    lines += ["      overrides:"] if others else []
    for quantizer in others:
        scheme = {"keep": True} if quantizer is None else _scheme(quantizer)
        if quantizer is not None and quantizer.symmetric != base.symmetric:
            scheme["symmetric"] = quantizer.symmetric
        keys = [f"{key}: {_flow(value)}" for key, value in scheme.items()]
        lines += [f"        - {keys[0]}", *(f"          {key}" for key in keys[1:]), "          modules:"]
        lines += [f"            - {_flow(pattern)}" for unit in groups[quantizer] for pattern in unit.patterns]
    return "\n".join(lines) + "\n"


def _scheme(quantizer: WeightQuantizer) -> dict[str, Any]:
    return {"num_bits": quantizer.num_bits, "group_size": quantizer.group_size}


def _flow(value: Any) -> str:
    """Format a value as YAML on one line; text in quotes wherever it might mean something else."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value)


def table(
    found: Sequence[Choice], sizes: Sizes, losses: Sequence[Sequence[float]], chosen: Sequence[int]
) -> list[dict[str, Any]]:
    """Return [{"unit", "role", "weights", "chosen", "options": [{"scheme", "bits_per_weight", "kl"}]}]."""
    return [
        {
            "unit": choice.group.label,
            "role": str(choice.group.linears[0].role),
            "weights": choice.group.weights,
            "chosen": option,
            "options": [
                {"scheme": said(quantizer), "bits_per_weight": bits / choice.group.weights, "kl": loss}
                for quantizer, bits, loss in zip(choice.options, size, loss_of, strict=True)
            ],
        }
        for choice, option, size, loss_of in zip(found, chosen, sizes.options, losses, strict=True)
    ]


def markdown(rows: Sequence[Mapping[str, Any]], title: str, lines: Sequence[str]) -> str:
    """Format the table in Markdown: one row a unit, its loss at each scheme, the chosen one in bold."""
    schemes = list(dict.fromkeys(option["scheme"] for row in rows for option in row["options"]))
    head = ["unit", "weights", *schemes]
    body = []
    for row in rows:
        cells = {option["scheme"]: f"{option['kl']:.2e}" for option in row["options"]}
        picked = row["options"][row["chosen"]]["scheme"]
        cells[picked] = f"**{cells[picked]}**"
        body.append([row["unit"], f"{row['weights']:,}", *(cells.get(scheme, "") for scheme in schemes)])
    rule = ["---", *["---:"] * (len(head) - 1)]
    grid = "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *body))
    return "\n\n".join([f"# {title}", "\n".join(f"- {line}" for line in lines), grid]) + "\n"
