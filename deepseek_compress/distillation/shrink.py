"""A smaller student from a teacher: fewer layers, routed experts or heads, narrower MLPs, everything else copied.

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
Importances = Mapping[tuple[int, str], Tensor]  # (layer, MLP or attention by its name) -> of its channels or heads


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


class Sizes(NamedTuple):
    """Numbers of a student's parts; None: as many as its teacher has."""

    experts: int | None = None  # routed experts a layer
    layers: int | None = None
    width: float | None = None  # share of the channels of each MLP and expert
    heads: int | None = None  # of the queries
    active: int | None = None  # experts that run for a token


def problems(family: Family, cfg: ModelConfig, wanted: Sizes) -> list[DscError]:
    """Return what is wrong with the sizes asked for."""
    found = []
    moe, (experts, layers, _, heads, active) = cfg.moe, wanted
    if cfg.compressed is not None and wanted != Sizes():
        what = f"distill: {family.model_type} cannot be made smaller"
        found.append(DscError(what, f"leave out {', '.join(Sizes._fields)}"))
    if active is not None and (moe is None or active > moe.top_k):
        what = f"distill.active: {active}, but " + (f"{moe.top_k} experts run for a token" if moe else "there are none")
        found.append(DscError(what, f"give 1 to {moe.top_k}" if moe else "leave it out"))
    if heads is not None and (heads > cfg.num_attention_heads or heads % head_group(cfg)):
        what = f"distill.heads: {heads} of {cfg.num_attention_heads}, {head_group(cfg)} share keys and values"
        found.append(DscError(what, f"give a multiple of {head_group(cfg)} up to {cfg.num_attention_heads}"))
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


def sizes(cfg: ModelConfig, keep: float) -> Sizes:
    """Return the sizes of a student that keeps about this share of the experts; of the layers without experts."""
    if keep >= 1:
        return Sizes()
    if cfg.moe is None:
        return Sizes(layers=max(1, round(keep * cfg.num_hidden_layers)))
    groups = cfg.moe.groups
    return Sizes(experts=max(least_experts(cfg.moe), int(keep * cfg.moe.experts) // groups * groups))


def least_experts(moe: Moe) -> int:
    """Return the fewest experts that the router can choose from."""
    pair = moe.groups > 1 and moe.method == "noaux_tc"  # a group is judged by its two best experts
    each = max(2 if pair else 1, -(-moe.top_k // moe.top_groups))
    return max(moe.top_k, each * moe.groups)


def shrink(
    family: Family,
    cfg: ModelConfig,
    wanted: Sizes,
    use: Mapping[int, Tensor],
    scores: Tensor | None = None,
    parts: Importances | None = None,
) -> Shrink:
    """Plan a student of the sizes `wanted`.

    `use`: importance of the experts (E,) of each layer. `scores` (layers,): of the layers; None thins them evenly.
    `parts`: of channels and heads; None: any will do.
    """
    moe, experts = cfg.moe, wanted.experts
    kept_layers = _kept_layers(cfg, wanted.layers, scores)
    kept = {
        layer: _kept_experts(count, experts, moe.groups)
        for layer, count in use.items()
        if moe is not None and experts is not None and layer in kept_layers
    }
    config: dict[str, Any] = {"num_hidden_layers": len(kept_layers)} if wanted.layers is not None else {}
    if kept:
        config["n_routed_experts"] = experts
    if cfg.num_nextn_predict_layers:
        config["num_nextn_predict_layers"] = 0
    if wanted.active is not None:
        config["num_experts_per_tok"] = wanted.active
    narrower, keys = _narrowed(cfg, wanted)
    fewer = narrower.moe
    if fewer is not None and kept and experts is not None:
        fewer = dataclasses.replace(fewer, experts=experts)
    layers = len(kept_layers)
    smaller = dataclasses.replace(narrower, num_hidden_layers=layers, num_nextn_predict_layers=0, moe=fewer)
    cuts = _cuts(family, cfg, narrower, kept_layers, parts)
    tensors = {name: _origin(family, cfg, name, kept_layers, kept, cuts) for name in family.tensors(smaller)}
    return Shrink(tensors, {**config, **keys}, kept, kept_layers)


def readers(family: Family, cfg: ModelConfig, layer: int) -> dict[str, str]:
    """{name of a linear: the MLP, expert or attention whose channels it reads and adds to the hidden state}."""
    linears = (linear for linear in family.linears(cfg, layer) if linear.role in _FFN and linear.input == linear.name)
    return {name: name.rpartition(".")[0] for name in [*(linear.name for linear in linears), family.names.o]}


def head_group(cfg: ModelConfig) -> int:
    """Return how many heads of queries share a head of keys and values: they stay or go together."""
    return 1 if cfg.mla else cfg.num_attention_heads // cfg.num_key_value_heads


def narrow(size: int, share: float) -> int:
    """Return about this share of a width, a multiple of what quantisation groups divide."""
    unit = min(UNIT, size & -size)
    while unit > 1 and 4 * unit > size:
        unit //= 2
    return max(unit, round(share * size / unit) * unit)


def _narrowed(cfg: ModelConfig, wanted: Sizes) -> tuple[ModelConfig, dict[str, Any]]:
    """Return `cfg` with the heads and channels of the student, and their keys of config.json."""
    found: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    if wanted.width is not None:
        found["intermediate_size"] = keys["intermediate_size"] = narrow(cfg.intermediate_size, wanted.width)
        if cfg.moe is not None:
            each = narrow(cfg.moe.intermediate, wanted.width)
            found["moe"], keys["moe_intermediate_size"] = dataclasses.replace(cfg.moe, intermediate=each), each
    if wanted.heads is not None:
        heads = {"num_attention_heads": wanted.heads, "num_key_value_heads": wanted.heads // head_group(cfg)}
        found |= heads
        keys |= heads if cfg.mla else {**heads, "head_dim": cfg.head_dim}
    return dataclasses.replace(cfg, **found), keys


def _cuts(
    family: Family, cfg: ModelConfig, smaller: ModelConfig, layers: list[int], parts: Importances | None
) -> dict[tuple[int, str], Origin]:
    """Say what stays of each linear that has fewer rows or columns in `smaller`, by layer of the teacher and name."""
    found = {}
    for layer in layers:
        for old, new in zip(family.linears(cfg, layer), family.linears(smaller, layer), strict=True):
            place = (layer, old.name.rpartition(".")[0])
            rows, columns = (
                _kept_channels(before, after, None if parts is None else parts[place])
                for before, after in ((old.rows, new.rows), (old.columns, new.columns))
            )
            if rows is not None or columns is not None:
                found[layer, old.name] = Origin(old.name, rows, columns)
    return found


def _kept_channels(before: int, after: int, scores: Tensor | None) -> Tensor | None:
    """Return which of `before` channels stay, whole heads where `scores` are those of heads; None: all."""
    if before == after:
        return None
    if scores is None:
        return torch.arange(after)
    each = before // len(scores)
    return (_most(scores, after // each)[:, None] * each + torch.arange(each)).flatten()


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
        module, _, kind = local.rpartition(".")
        cut = cuts.get((old, module), Origin(local))
        return cut._replace(name=old_prefix + local, columns=cut.columns if kind == "weight" else None)
    return Origin(name)
