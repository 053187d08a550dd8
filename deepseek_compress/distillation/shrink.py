"""A smaller student from a teacher: fewer layers, fewer routed experts, everything else copied.

Which experts stay is decided by use: how many calibration tokens the router sends to each (the frequency criterion of
REAP, arXiv 2510.13999, section 3.1). The same number stays in every routing group, since the router takes its groups
from the order of the experts. Of the layers, all dense ones and the last stay and the others are thinned evenly
(Sanh et al. 2019, DistilBERT, arXiv 1910.01108, section 2).
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
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.weights import ObservingWeights


class Origin(NamedTuple):
    """Where a tensor of the student comes from."""

    name: str  # in the teacher
    rows: Tensor | None = None  # int64, the rows that stay; None: all


class Shrink(NamedTuple):
    """A student's tensors by name, and the keys of config.json that differ."""

    tensors: dict[str, Origin]
    config: dict[str, Any]
    experts: dict[int, list[int]]  # layer of the teacher -> the experts that stay


def problems(family: Family, cfg: ModelConfig, experts: int | None, layers: int | None) -> list[DscError]:
    """What is wrong with the sizes asked for."""
    found = []
    moe = cfg.moe
    if cfg.compressed is not None and (experts or layers):
        found.append(DscError(f"distill: {family.model_type} cannot be made smaller", "leave out experts and layers"))
    if experts is not None and moe is None:
        found.append(DscError(f"distill.experts: {experts}, but the model has no experts", "leave it out"))
    elif experts is not None and moe is not None:
        pair = moe.groups > 1 and moe.method == "noaux_tc"  # a group is judged by its two best experts
        least = max(moe.top_k, 2 * moe.groups if pair else moe.groups)
        if not least <= experts <= moe.experts or experts % moe.groups:
            found.append(
                DscError(
                    f"distill.experts: {experts} of {moe.experts} experts in {moe.groups} groups",
                    f"give a multiple of {moe.groups} from {least} to {moe.experts}",
                )
            )
        elif moe.groups > 1 and experts // moe.groups * moe.top_groups < moe.top_k:
            found.append(DscError(f"distill.experts: {experts} leave fewer than {moe.top_k} to choose", "keep more"))
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


def expert_use(model: Model, batches: list[Tensor]) -> dict[int, Tensor]:
    """How many tokens of `batches` (each int64 (B, T)) the router sends to each expert: {layer: int64 (E,)}."""
    moe = model.cfg.moe
    if moe is None:
        return {}
    layers = [layer for layer in range(model.cfg.num_hidden_layers) if model.cfg.is_moe(layer)]
    use = {layer: torch.zeros(moe.experts, dtype=torch.long) for layer in layers}
    pattern = re.compile(rf"{re.escape(moe.names.experts)}\.(\d+)\.{re.escape(moe.names.gate)}$")
    watched = Model(model.family, model.cfg, model.weights)

    def watch(layer: int) -> None:
        def count(name: str, x: Tensor) -> None:
            if match := pattern.fullmatch(name):
                use[layer][int(match[1])] += len(x)

        watched.blocks[layer] = ObservingWeights(watched.blocks[layer], count)

    for layer in layers:
        watch(layer)
    with torch.no_grad():
        for tokens in batches:
            watched.hidden_states(tokens)
    return use


def shrink(
    family: Family, cfg: ModelConfig, use: Mapping[int, Tensor], experts: int | None, layers: int | None
) -> Shrink:
    """Plan a student with `experts` routed experts a layer and `layers` layers; None keeps the number."""
    moe = cfg.moe
    kept_layers = _kept_layers(cfg, layers)
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
    tensors = {name: _origin(family, cfg, name, kept_layers, kept) for name in family.tensors(smaller)}
    return Shrink(tensors, config, kept)


def shrunk_header(header: Header, plan: Shrink) -> Header:
    """What the student's header will be: its tensors in BF16, from the shapes of the teacher's."""
    tensors = {}
    for name, origin in plan.tensors.items():
        if origin.name in header.tensors:
            info = header.tensors[origin.name]
            shape = info.shape if origin.rows is None else (len(origin.rows), *info.shape[1:])
            place = Location(next(iter(info.parts.values())).file, 0, 2 * math.prod(shape), torch.bfloat16, shape)
            tensors[name] = TensorInfo(name, shape, "plain", torch.bfloat16, {"weight": place})
    return Header(header.path, {**header.config, **plan.config}, tensors)


def _kept_layers(cfg: ModelConfig, layers: int | None) -> list[int]:
    if layers is None:
        return list(range(cfg.num_hidden_layers))
    dense = min(cfg.moe.first_dense, cfg.num_hidden_layers) if cfg.moe else 0
    rest = range(dense, cfg.num_hidden_layers)
    wanted = layers - dense
    # evenly spaced, the last one always among them
    chosen = [rest[(index + 1) * len(rest) // wanted - 1] for index in range(wanted)]
    return [*range(dense), *chosen]


def _kept_experts(use: Tensor, experts: int, groups: int) -> list[int]:
    """The most used of each group, in their old order; ties go to the earlier one."""
    by_group = use.view(groups, -1)
    order = torch.sort(by_group, dim=1, descending=True, stable=True).indices[:, : experts // groups]
    first = torch.arange(groups)[:, None] * by_group.shape[1]
    kept: list[int] = (order.sort(dim=1).values + first).flatten().tolist()
    return kept


def _origin(family: Family, cfg: ModelConfig, name: str, layers: list[int], experts: Mapping[int, list[int]]) -> Origin:
    for new, old in enumerate(layers):
        prefix = family.prefix(new) + "."
        if not name.startswith(prefix):
            continue
        local = name[len(prefix) :]
        old_prefix = family.prefix(old) + "."
        if old not in experts or cfg.moe is None:
            return Origin(old_prefix + local)
        names, kept = cfg.moe.names, experts[old]
        if local in (names.router, names.bias):
            return Origin(old_prefix + local, torch.tensor(kept))
        match = re.match(rf"{re.escape(names.experts)}\.(\d+)\.(.*)", local)
        if match:
            local = f"{names.experts}.{kept[int(match[1])]}.{match[2]}"
        return Origin(old_prefix + local)
    return Origin(name)
