"""Which linears of a model change, and in which groups, from shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from deepseek_compress.checkpoint import Header
from deepseek_compress.compress.fused_groups import fused_groups
from deepseek_compress.compress.overrides import Override, assigned
from deepseek_compress.compress.overrides import problems as override_problems
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture, Block, Linear, Role
from deepseek_compress.numerics.types import Sparsifier, WeightQuantizer

CHANGEABLE = (Role.ATTENTION, Role.MLP, Role.EXPERT, Role.SHARED_EXPERT, Role.INDEXER, Role.ENGRAM)
EVERY_TOKEN = frozenset({Role.ATTENTION, Role.MLP, Role.SHARED_EXPERT})  # what no router chooses
GROUP_SIZES = (128, 64, 32)
LEFT_AT_MOST = 0.01  # share of the weights that a chosen group size may leave in 16 bits
PROVIDED = frozenset({"hessian", "input_absmax", "input_absmean", "cross_covariance", "half"})  # by the block loop


def packed_problems(header: Header, what: str) -> list[DscError]:
    """Why `what` of a recipe, which changes 16-bit weights, has nothing to change."""
    packed = [name for name, info in header.tensors.items() if info.encoding == "packed"]
    if packed:
        return [DscError(f"{what}: {packed[0]} and others are packed already", "start from the 16-bit model")]
    return []


def of_roles(
    architecture: Architecture, changed: Collection[Role], bits: Sequence[tuple[int, frozenset[Role]]]
) -> list[Override]:
    """Give linears of whole roles bits of their own, symmetric, as servers read 8 bits; only those that change."""
    found = []
    for number, roles in bits:
        names = (re.sub(r"\.\d+\.", ".*.", name) for name, _ in architecture.linears(roles.intersection(changed)))
        if modules := tuple(dict.fromkeys(names)):
            found.append(Override(modules=modules, num_bits=number, symmetric=True))
    return found


@dataclass(frozen=True)
class Selection:
    """The linears of `roles` change, but those whose name is in `left` or that an override keeps."""

    roles: frozenset[Role]
    group_size: int | None  # of weights that say none themselves; None: one scale a row
    left: frozenset[str] = frozenset()  # modules that stay 16-bit because they don't fit, by checkpoint name
    own: Mapping[str, WeightQuantizer | None] = field(default_factory=dict)  # by overrides; None: stays 16-bit

    def wants(self, block: Block, linear: Linear) -> bool:
        """Whether this linear changes."""
        name = block.prefix + linear.name
        kept = name in self.left or (name in self.own and self.own[name] is None)
        return linear.role in self.roles and not kept

    def quantizer(self, name: str, columns: int, weights: WeightQuantizer) -> WeightQuantizer:
        """Return the quantiser of the module `name` of so many columns in a recipe with `weights`; it must change."""
        found = self.own.get(name) or weights
        size = columns if one_scale_a_row(found) else found.group_size or self.group_size
        return found.model_copy(update={"group_size": size})


def one_scale_a_row(weights: WeightQuantizer) -> bool:
    """8-bit symmetric without a group size: the form of W8A8 that servers take has one scale a row."""
    return weights.group_size is None and weights.num_bits == 8 and weights.symmetric


def select(
    architecture: Architecture,
    roles: Collection[Role],
    weights: WeightQuantizer | None,
    overrides: Sequence[Override] = (),
) -> Selection:
    """Return what changes. Without a group size given: the largest of 128, 64, 32 that leaves at most 1 % in 16
    bits."""
    wanted = frozenset(roles)
    if weights is None:
        return Selection(wanted, None)
    linears = dict(architecture.linears(wanted))
    own = assigned(overrides, linears, weights)
    found = [item for item in linears.items() if _leaves_size_open(own.get(item[0], weights))]
    if not found:
        return Selection(wanted, weights.group_size, own=own)
    total = sum(linear.rows * linear.columns for _, linear in found)
    left: list[tuple[str, Linear]] = found
    for size in GROUP_SIZES:
        left = [item for item in found if item[1].columns % size]
        if sum(linear.rows * linear.columns for _, linear in left) <= LEFT_AT_MOST * total:
            return Selection(wanted, size, frozenset(name for name, _ in left), own)
    names = ", ".join(dict.fromkeys(f"{linear.columns} columns ({name})" for name, linear in left[:3]))
    common = math.gcd(*(linear.columns for _, linear in found))
    fix = f"set weights' group_size to {common & -common}, which divides all columns"
    raise DscError(f"no group size of {', '.join(map(str, GROUP_SIZES))} fits: {names}", fix)


def _leaves_size_open(weights: WeightQuantizer | None) -> bool:
    return weights is not None and weights.group_size is None and not one_scale_a_row(weights)


def problems(
    architecture: Architecture,
    roles: Collection[Role],
    weights: WeightQuantizer | None,
    sparsity: Sparsifier | None,
    overrides: Sequence[Override] = (),
) -> list[DscError]:
    """Everything that cannot work, from shapes alone."""
    found: list[DscError] = []
    for part in (weights, sparsity):
        missing = sorted((part.needs if part else frozenset()) - PROVIDED)
        if missing:
            found.append(DscError(f"{type(part).__name__.lower()} needs {', '.join(missing)}", "choose another method"))
    if overrides:
        found += override_problems(overrides, fused_groups(architecture, roles), weights)
    linears = list(architecture.linears(roles))
    if weights is not None:
        found += _sizes(architecture, linears, roles, weights, overrides)
    if sparsity is not None:
        found += _unfit(linears, 4, "groups of {} for the pattern 2:4", "keep this role dense")
    packed = [name for name, _ in linears if architecture.header.tensors[name + ".weight"].encoding == "packed"]
    if packed and (weights is not None or sparsity is not None):
        found.append(
            DscError(f"{packed[0]} and {len(packed) - 1} more are packed already", "start from the 16-bit model")
        )
    return found


def _sizes(
    architecture: Architecture,
    linears: list[tuple[str, Linear]],
    roles: Collection[Role],
    weights: WeightQuantizer,
    overrides: Sequence[Override],
) -> Iterator[DscError]:
    """Group sizes that do not divide the columns they are given for, and where none fits."""
    try:
        own = select(architecture, roles, weights, overrides).own
    except DscError as error:
        yield error
        return
    by_size: dict[int, list[tuple[str, Linear]]] = {}
    for name, linear in linears:
        given = own.get(name, weights)
        if given is not None and given.group_size is not None:
            by_size.setdefault(given.group_size, []).append((name, linear))
    for size, chosen in by_size.items():
        fits = next((n for n in (128, 64, 32, 16) if all(x.columns % n == 0 for _, x in chosen)), None)
        yield from _unfit(chosen, size, "groups of {}", f"set group_size: {fits}" if fits else "leave it out")


def _unfit(linears: list[tuple[str, Linear]], size: int, what: str, fix: str) -> list[DscError]:
    """One problem for each number of columns that `size` does not divide, naming the first linear that has it."""
    by_columns: dict[int, list[str]] = {}
    for name, linear in linears:
        if linear.columns % size:
            by_columns.setdefault(linear.columns, []).append(name)
    return [
        DscError(
            f"{names[0]}.weight{f' and {len(names) - 1} more' if names[1:] else ''}: "
            f"{columns} columns do not divide into {what.format(size)}",
            fix,
        )
        for columns, names in by_columns.items()
    ]
