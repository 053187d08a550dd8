"""A smaller student from a teacher: fewer layers, fewer routed experts, narrower MLPs, everything else copied.

Which of them stay is measured on calibration text, see `importance`. The same number of experts stays in every routing
group, since the router takes its groups from the order of the experts; all dense layers before them stay.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_compress.checkpoint.header import Header, Location, TensorInfo
from deepseek_compress.errors import DscError
from deepseek_compress.models import Family, ModelConfig
from deepseek_compress.models.config import Moe, Role

UNIT = 128  # a width stays a multiple of this, which groups of quantisation divide; of less where it is small or odd
_FFN = (Role.MLP, Role.SHARED_EXPERT, Role.EXPERT)
Neurons = Mapping[tuple[int, str], Tensor]  # (layer, name of an MLP in its block) -> importance of its channels


class Origin(NamedTuple):
    """Where a tensor of the student comes from."""

    name: str  # in the teacher
    rows: Tensor | None = None  # int64, the rows that stay; None: all
    columns: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return what stays of the teacher's."""
        tensor = tensor if self.rows is None else tensor[self.rows.to(tensor.device)]
        return tensor if self.columns is None else tensor[:, self.columns.to(tensor.device)]

    def shape(self, given: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what stays."""
        rows = given[0] if self.rows is None else len(self.rows)
        rest = given[1:] if self.columns is None else (len(self.columns), *given[2:])
        return (rows, *rest)


class Shrink(NamedTuple):
    """A student's tensors by name, and the keys of config.json that differ."""

    tensors: dict[str, Origin]
    config: dict[str, Any]
    experts: dict[int, list[int]]  # layer of the teacher -> the experts that stay
    layers: list[int]  # of the teacher that stay


def problems(
    family: Family,
    cfg: ModelConfig,
    experts: int | None,
    layers: int | None,
    width: float | None = None,
    active: int | None = None,
) -> list[DscError]:
    """Return what is wrong with the sizes asked for."""
    found = []
    moe = cfg.moe
    if cfg.compressed is not None and (experts or layers or width or active):
        what = f"distill: {family.model_type} cannot be made smaller"
        found.append(DscError(what, "leave out experts, layers, width and active"))
    if active is not None and (moe is None or active > moe.top_k):
        what = f"distill.active: {active}, but " + (f"{moe.top_k} experts run for a token" if moe else "there are none")
        found.append(DscError(what, f"give 1 to {moe.top_k}" if moe else "leave it out"))
    if experts is not None and moe is None:
        found.append(DscError(f"distill.experts: {experts}, but the model has no experts", "leave it out"))
    elif experts is not None and moe is not None:
        least = least_experts(moe)
        if not least <= experts <= moe.experts or experts % moe.groups:
            found.append(
                DscError(
                    f"distill.experts: {experts} of {moe.experts} experts in {moe.groups} groups",
                    f"give a multiple of {moe.groups} from {least} to {moe.experts}",
                )
            )
    if layers is not None:
        dense = min(moe.first_dense, cfg.num_hidden_layers) if moe else 0
        if not dense + 1 <= layers <= cfg.num_hidden_layers:
            found.append(
                DscError(
                    f"distill.layers: {layers} of {cfg.num_hidden_layers}",
                    f"give {dense + 1} to {cfg.num_hidden_layers}",
                )
            )
    return found


def sizes(cfg: ModelConfig, keep: float) -> tuple[int | None, int | None]:
    """(experts, layers) of a student that keeps about this share of the experts; of the layers where there are none."""
    if keep >= 1:
        return None, None
    if cfg.moe is None:
        return None, max(1, round(keep * cfg.num_hidden_layers))
    groups = cfg.moe.groups
    return max(least_experts(cfg.moe), int(keep * cfg.moe.experts) // groups * groups), None


def least_experts(moe: Moe) -> int:
    """Return the fewest experts that the router can choose from."""
    pair = moe.groups > 1 and moe.method == "noaux_tc"  # a group is judged by its two best experts
    each = max(2 if pair else 1, -(-moe.top_k // moe.top_groups))
    return max(moe.top_k, each * moe.groups)


def shrink(
    family: Family,
    cfg: ModelConfig,
    use: Mapping[int, Tensor],
    experts: int | None,
    layers: int | None,
    scores: Tensor | None = None,
    width: float | None = None,
    neurons: Neurons | None = None,
    active: int | None = None,
) -> Shrink:
    """Plan a student with `experts` routed experts a layer and `layers` layers; None keeps the number.

    `use`: importance of the experts (E,) of each layer. `scores` (layers,): of the layers; None thins them evenly.
    `width`: share of the channels of each MLP that stays, those of most importance in `neurons`; None there: any.
    `active`: experts that run for a token.
    """
    moe = cfg.moe
    kept_layers = _kept_layers(cfg, layers, scores)
    kept = {
        layer: _kept_experts(count, experts, moe.groups)
        for layer, count in use.items()
        if moe is not None and experts is not None and layer in kept_layers
    }
    config: dict[str, Any] = {"num_hidden_layers": len(kept_layers)} if layers is not None else {}
    if kept:
        config["n_routed_experts"] = experts
    if cfg.num_nextn_predict_layers:
        config["num_nextn_predict_layers"] = 0
    smaller = dataclasses.replace(
        cfg,
        num_hidden_layers=len(kept_layers),
        num_nextn_predict_layers=0,
        moe=dataclasses.replace(moe, experts=experts) if moe is not None and kept and experts is not None else moe,
    )
    if active is not None:
        config["num_experts_per_tok"] = active
    cuts: dict[tuple[int, str], Origin] = {}
    if width is not None:
        smaller = _narrowed(smaller, width)
        config |= {"intermediate_size": smaller.intermediate_size}
        config |= {"moe_intermediate_size": smaller.moe.intermediate} if smaller.moe else {}
        cuts = _cuts(family, cfg, smaller, kept_layers, neurons)
    tensors = {name: _origin(family, cfg, name, kept_layers, kept, cuts) for name in family.tensors(smaller)}
    return Shrink(tensors, config, kept, kept_layers)


def ffn_downs(family: Family, cfg: ModelConfig, layer: int) -> dict[str, str]:
    """{name of a linear that reads the channels of an MLP or expert: name of that MLP} of a block."""
    linears = (linear for linear in family.linears(cfg, layer) if linear.role in _FFN and linear.input == linear.name)
    return {linear.name: linear.name.rpartition(".")[0] for linear in linears}


def narrow(size: int, share: float) -> int:
    """Return about this share of a width, a multiple of what quantisation groups divide."""
    unit = min(UNIT, size & -size)
    while unit > 1 and 4 * unit > size:
        unit //= 2
    return max(unit, round(share * size / unit) * unit)


def _narrowed(cfg: ModelConfig, width: float) -> ModelConfig:
    moe = cfg.moe and dataclasses.replace(cfg.moe, intermediate=narrow(cfg.moe.intermediate, width))
    return dataclasses.replace(cfg, intermediate_size=narrow(cfg.intermediate_size, width), moe=moe)


def _cuts(
    family: Family, cfg: ModelConfig, smaller: ModelConfig, layers: list[int], neurons: Neurons | None
) -> dict[tuple[int, str], Origin]:
    """Say what stays of each linear of an MLP or expert, by layer of the teacher and name."""
    widths = {Role.MLP: smaller.intermediate_size}
    if smaller.moe is not None:
        each = smaller.moe.intermediate
        widths |= {Role.EXPERT: each, Role.SHARED_EXPERT: each * smaller.moe.shared}
    found = {}
    for layer in layers:
        for linear in family.linears(cfg, layer):
            if linear.role in _FFN:
                count, mlp = widths[linear.role], linear.name.rpartition(".")[0]
                kept = torch.arange(count) if neurons is None else _most(neurons[layer, mlp], count)
                reads = linear.input == linear.name
                found[layer, linear.name] = Origin(linear.name, *((None, kept) if reads else (kept,)))
    return found


def _most(scores: Tensor, count: int) -> Tensor:
    """Return the places of the largest scores of each row, in their old order; ties go to the earlier one."""
    return torch.sort(scores, descending=True, stable=True).indices[..., :count].sort().values


def any_experts(cfg: ModelConfig) -> dict[int, Tensor]:
    """For sizes alone any experts will do."""
    moe = cfg.moe
    layers = range(cfg.num_hidden_layers)
    return {layer: torch.zeros(moe.experts) for layer in layers if cfg.is_moe(layer)} if moe is not None else {}


def shrunk_header(header: Header, plan: Shrink) -> Header:
    """Return what the student's header will be: its tensors in BF16, from the shapes of the teacher's."""
    tensors = {}
    for name, origin in plan.tensors.items():
        if origin.name in header.tensors:
            info = header.tensors[origin.name]
            shape = origin.shape(info.shape)
            place = Location(next(iter(info.parts.values())).file, 0, 2 * math.prod(shape), torch.bfloat16, shape)
            tensors[name] = TensorInfo(name, shape, "plain", torch.bfloat16, {"weight": place})
    return Header(header.path, {**header.config, **plan.config}, tensors)


def _kept_layers(cfg: ModelConfig, layers: int | None, scores: Tensor | None) -> list[int]:
    if layers is None:
        return list(range(cfg.num_hidden_layers))
    dense = min(cfg.moe.first_dense, cfg.num_hidden_layers) if cfg.moe else 0
    rest = range(dense, cfg.num_hidden_layers)
    wanted = layers - dense
    if scores is not None:
        return [*range(dense), *(_most(scores[dense:], wanted) + dense).tolist()]
    # evenly spaced, the last one always among them
    chosen = [rest[(index + 1) * len(rest) // wanted - 1] for index in range(wanted)]
    return [*range(dense), *chosen]


def _kept_experts(use: Tensor, experts: int, groups: int) -> list[int]:
    """Return the most used of each group, in their old order; ties go to the earlier one."""
    by_group = use.view(groups, -1)
    first = torch.arange(groups)[:, None] * by_group.shape[1]
    kept: list[int] = (_most(by_group, experts // groups) + first).flatten().tolist()
    return kept


def _origin(
    family: Family,
    cfg: ModelConfig,
    name: str,
    layers: list[int],
    experts: Mapping[int, list[int]],
    cuts: Mapping[tuple[int, str], Origin],
) -> Origin:
    for new, old in enumerate(layers):
        prefix = family.prefix(new) + "."
        if not name.startswith(prefix):
            continue
        local = name[len(prefix) :]
        old_prefix = family.prefix(old) + "."
        if old in experts and cfg.moe is not None:
            names, kept = cfg.moe.names, experts[old]
            if local in (names.router, names.bias):
                return Origin(old_prefix + local, torch.tensor(kept))
            match = re.match(rf"{re.escape(names.experts)}\.(\d+)\.(.*)", local)
            if match:
                local = f"{names.experts}.{kept[int(match[1])]}.{match[2]}"
        cut = cuts.get((old, local.removesuffix(".weight")), Origin(local))
        return cut._replace(name=old_prefix + local)
    return Origin(name)
