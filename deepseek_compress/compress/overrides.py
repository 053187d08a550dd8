"""Overrides of a recipe: modules that get other bits than the rest, or none.

    overrides:
      - {modules: "model.layers.0.self_attn.*", num_bits: 8}
      - {modules: ["model.layers.*.mlp.experts.*"], num_bits: 3, group_size: 32}
      - {modules: "re:.*o_proj$", keep: true}

A pattern is a shell pattern for the whole name of a module (`*` crosses dots), or `re:` and a regular expression that
is matched from the start, as in `quantization_config`. Of several overrides that match a module the last one decides;
what it leaves out is as in the recipe's `weights`. Linears that serving engines fuse must agree.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import translate
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from deepseek_compress import limits
from deepseek_compress.compress.fused_groups import FusedGroup
from deepseek_compress.errors import DscError, Problems, raise_problems
from deepseek_compress.numerics.types import WeightQuantizer
from deepseek_compress.registry import build

_SHELL = re.compile(r"[*?\[]")  # what makes a shell pattern more than a name
NOT_BY_TRANSFORMERS = "vLLM and the export targets read that, transformers 5.23 does not"
_CLOSE = 3  # names that a message proposes


class Scheme(BaseModel, frozen=True, extra="forbid"):
    """Scheme of a weight, where it differs from the recipe's `weights`."""

    num_bits: int | None = Field(default=None, ge=2, le=8)
    group_size: int | None = Field(default=None, gt=0)
    symmetric: bool | None = None
    keep: bool = False  # the weight stays as it is, in 16 bits

    @model_validator(mode="after")
    def _says_one_thing(self) -> Scheme:
        if self.keep and self.given:
            raise DscError(f"keep: true with {', '.join(self.given)}", "a weight that is kept has no grid")
        if not self.keep and not self.given:
            raise DscError(f"{self} changes nothing", "give num_bits, group_size, symmetric or keep: true")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The knobs of the quantiser that it sets."""
        values = {"num_bits": self.num_bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return {key: value for key, value in values.items() if value is not None}

    def applied(self, weights: WeightQuantizer) -> WeightQuantizer | None:
        """`weights` with these knobs; None: the weight is kept."""
        return None if self.keep else build(type(weights), {**weights.model_dump(), **self.given}, "overrides")

    def __str__(self) -> str:
        """`3 bits, group_size 32`."""
        words = {"num_bits": f"{self.num_bits} bits", "group_size": f"group_size {self.group_size}"}
        words["symmetric"] = "symmetric" if self.symmetric else "asymmetric"
        return "16 bits" if self.keep else ", ".join(words[key] for key in self.given) or "no knob"


class Override(Scheme, frozen=True):
    """A scheme for the modules that match."""

    modules: Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)] = Field(
        min_length=1
    )

    @field_validator("modules")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if pattern.startswith("re:"):
                limits.pattern(pattern[3:])
            elif len(pattern) > 1000:
                raise DscError(f"{pattern[:80]!r}: a pattern of {len(pattern)} characters", "shorten it")
        return patterns


def build_all(values: Any) -> Any:
    """Return what stands in a recipe -> overrides; every mistake is reported with its place."""
    if not isinstance(values, (list, tuple)):
        return values
    found, problems = [], []
    for number, value in enumerate(values):
        try:
            found.append(value if isinstance(value, Override) else _one(value, f"overrides.{number}"))
        except Problems as error:
            problems += error.problems
    raise_problems(problems)
    return found


def _one(value: Any, where: str) -> Override:
    if not isinstance(value, Mapping):
        raise Problems([DscError(f"{where}: expected modules with their knobs, got {value!r}", "write {modules: ...}")])
    try:
        return build(Override, value, where)
    except Problems:
        raise
    except DscError as error:
        raise Problems([DscError(f"{where}: {error.what}", error.fix)]) from None


def assigned(
    overrides: Sequence[Override], names: Collection[str], weights: WeightQuantizer
) -> dict[str, WeightQuantizer | None]:
    """Return the quantiser of each module among `names` that an override matches; None: it is kept."""
    found: dict[str, WeightQuantizer | None] = {}
    for override in overrides:
        wanted, matches = override.applied(weights), _matcher(override.modules)
        found |= {name: wanted for name in names if matches(name)}
    return found


def problems(
    overrides: Sequence[Override], groups: Sequence[FusedGroup], weights: WeightQuantizer | None
) -> Iterator[DscError]:
    """Patterns that match nothing which changes, and fused linears that would part."""
    if weights is None:
        yield DscError("overrides without weights", "give weights, whose bits they change")
        return
    names = [name for group in groups for name in group.names]
    known = set(names)
    for pattern in dict.fromkeys(pattern for override in overrides for pattern in override.modules):
        matches = _matcher((pattern,))
        if pattern not in known and not any(matches(name) for name in names):
            yield _matches_nothing(pattern, groups)
    yield from _parted(groups, assigned(overrides, names, weights), weights)


def _parted(
    groups: Sequence[FusedGroup], own: Mapping[str, WeightQuantizer | None], weights: WeightQuantizer
) -> Iterator[DscError]:
    """One line for all units whose linears differ."""
    wrong = [group for group in groups if len({own.get(name, weights) for name in group.names}) > 1]
    if not wrong:
        return
    first, *others = wrong[0].names
    other = next(name for name in others if own.get(name, weights) != own.get(first, weights))
    given = [f"{name} ({said(own.get(name, weights))})" for name in (first, other)]
    more = f", and so in {len(wrong) - 1} more places" if wrong[1:] else ""
    patterns = ", ".join(wrong[0].patterns)
    yield DscError(
        f"overrides: {given[0]} and {given[1]}: serving engines fuse them{more}",
        f"give them the same scheme with modules: [{patterns}]",
    )


def counted(own: Mapping[str, WeightQuantizer | None], weights: WeightQuantizer | None) -> list[str]:
    """One line for each scheme that overrides ask for, with how many linears get it, and who does not read them.

    `own` as `assigned` gives it, beside the recipe's `weights`.
    """
    counts = Counter(said(own_weights) for own_weights in own.values())
    lines = [f"{scheme}: {count} linears, by overrides" for scheme, count in counts.items()]
    packed = [each for each in (weights, *own.values()) if each is not None]
    if len({said(each) for each in packed}) > 1 and not all(each.symmetric for each in packed):
        lines.append(f"several schemes, not all symmetric: {NOT_BY_TRANSFORMERS}")
    return lines


def said(weights: WeightQuantizer | None) -> str:
    """`4 bits, group_size 64, asymmetric`."""
    if weights is None:
        return "kept as stored"
    kind = "symmetric" if weights.symmetric else "asymmetric"
    size = "" if weights.group_size is None else f"group_size {weights.group_size}, "
    return f"{weights.num_bits} bits, {size}{kind}"


def _matches_nothing(pattern: str, groups: Sequence[FusedGroup]) -> DscError:
    close = difflib.get_close_matches(pattern, [p for group in groups for p in group.patterns], n=_CLOSE, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"names are like {groups[0].names[0]}" if groups else ""
    return DscError(f"overrides: {pattern!r} matches no weight that changes", hint)


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a name matches one of `patterns`. Models have some ten thousand names: plain ones are looked up."""
    plain = {pattern for pattern in patterns if not pattern.startswith("re:") and not _SHELL.search(pattern)}
    shell = [translate(p) for p in patterns if p not in plain and not p.startswith("re:")]
    tests = [re.compile("|".join(shell))] if shell else []
    tests += [re.compile(pattern[3:]) for pattern in patterns if pattern.startswith("re:")]
    return lambda name: name in plain or any(test.match(name) for test in tests)
