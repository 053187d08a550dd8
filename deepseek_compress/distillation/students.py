"""The student that a training begins with: cut out of a model by what matters least on calibration text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from deepseek_compress.checkpoint import Checkpoint, CheckpointWriter
from deepseek_compress.distillation import importance
from deepseek_compress.distillation.documents import Batch, Document, batch_of, batches_by_length
from deepseek_compress.distillation.features import Pair
from deepseek_compress.distillation.shrink import Shrink, Sizes, shrink, sizes
from deepseek_compress.errors import DscError
from deepseek_compress.models import ModelConfig
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.types import Quantized

SHOWN = 256  # documents that tell what matters
SHOWN_TOKENS = {"loss": 2048}  # fewer where the model runs once for each layer
TOKENS_AT_ONCE = 4096


class Size(BaseModel, frozen=True, extra="forbid"):
    """Size of a student relative to its teacher."""

    keep: float | None = Field(None, gt=0, le=1)  # share of the experts, of the layers where there are none
    experts: int | None = Field(None, gt=0)  # routed experts a layer; None keeps all; goes before keep
    layers: int | None = Field(None, gt=0)  # layers; None keeps all; goes before keep
    layers_by: Literal["influence", "loss", "even"] = "influence"
    experts_by: Literal["activation", "frequency"] = "activation"
    width: float | None = Field(None, gt=0, lt=1)  # share of the channels of each MLP and expert; None keeps all
    heads: int | None = Field(None, gt=0)  # of attention's queries; None keeps all
    active: int | None = Field(None, gt=0)  # routed experts that run for a token; None keeps their number

    def of(self, cfg: ModelConfig) -> Sizes:
        """Return what the student of a teacher with `cfg` has."""
        named = Sizes(self.experts, self.layers, self.width, self.heads, self.active)
        return named if self.keep is None or named != Sizes() else sizes(cfg, self.keep)


class Student(NamedTuple):
    """A model to train, what differs in its config.json, and where its blocks come from."""

    model: Model
    weights: dict[str, Tensor]  # of the model
    config: dict[str, Any]
    facts: dict[str, Any]
    pairs: list[Pair]


def cut(model: Model, config: dict[str, Any], size: Size, documents: Sequence[Document], shared: bool) -> Student:
    """Return a student with the parts of `model` that matter most on `documents`; its tensors are its own where
    `shared`."""
    wanted = size.of(model.cfg)
    use: dict[int, Tensor] = {}
    scores = parts = None
    if wanted.experts is not None:
        use = importance.expert_use(model, _shown(model, documents, size.experts_by), size.experts_by)
    if wanted.layers is not None and size.layers_by != "even":
        measure = importance.influence if size.layers_by == "influence" else importance.loss_without
        scores = measure(model, _shown(model, documents, size.layers_by))
    if wanted.width is not None or wanted.heads is not None:
        parts = importance.parts(model, _shown(model, documents, "parts"))
    plan = shrink(model.family, model.cfg, wanted, use, scores, parts)
    weights: dict[str, Tensor] = {}
    for name, origin in plan.tensors.items():
        tensor = origin.of(model.weights[origin.name])
        weights[name] = tensor.clone() if shared else tensor
    cfg = model.family.parse({**config, **plan.config})
    facts: dict[str, Any] = {"layers_kept": plan.layers} if wanted.layers is not None else {}
    if plan.experts:
        facts["experts_kept"] = {str(layer): kept for layer, kept in plan.experts.items()}
    if size.active is not None:
        facts["active"] = size.active
    if size.width is not None:
        facts["width_kept"] = {name: plan.config[name] for name in plan.config if name.endswith("intermediate_size")}
    if size.heads is not None:
        facts["heads_kept"] = size.heads
    return Student(Model(model.family, cfg, weights), weights, plan.config, facts, _pairs(plan))


def _shown(model: Model, documents: Sequence[Document], by: str) -> list[Batch]:
    chosen, tokens = [], 0
    for document in documents[:SHOWN]:
        if tokens < SHOWN_TOKENS.get(by, 1 << 62):
            chosen.append(document)
            tokens += len(document.ids)
    groups = batches_by_length([len(document.ids) for document in chosen], TOKENS_AT_ONCE)
    return [batch_of(chosen, group, 1.0).to(model.head.device) for group in groups]


def _pairs(plan: Shrink) -> list[Pair]:
    return [Pair(new, old, plan.experts.get(old)) for new, old in enumerate(plan.layers)]


def check_tokenizers(student: str, teacher: str, sizes: tuple[int, int]) -> None:
    """`sizes`: vocabularies of teacher and student. Padded ones of equal tokenizers may differ."""
    if student != teacher:
        what = f"distill: teacher and student have other tokenizers (vocabularies of {sizes[0]} and {sizes[1]} tokens)"
        raise DscError(what, "give a student with the teacher's tokenizer, or train it on text the teacher wrote")


def is_linear(student: Model, name: str) -> bool:
    """Whether `name` is the weight of a linear of a block."""
    family, cfg = student.family, student.cfg
    for layer in range(cfg.num_hidden_layers):
        prefix = family.prefix(layer) + "."
        if name.startswith(prefix):
            local = name[len(prefix) :]
            return any(local == linear.name + ".weight" for linear in family.linears(cfg, layer))
    return False


def write_student(
    out: Path,
    source: Checkpoint,
    student: Student,
    stored: Mapping[str, Quantized],
    manifest: dict[str, Any],
    card: str,
) -> list[str]:
    """Write a trained student in BF16, or packed where `stored` has it; returns what the writer noted."""
    weights = student.model.weights
    dropped = {"num_nextn_predict_layers": 0} if source.config.get("num_nextn_predict_layers") else {}
    ignore = source.config["quantization_config"]["ignore"] if stored else []
    size = 0 if stored else sum(2 * weight.numel() for weight in weights.values())
    with CheckpointWriter(out, source, expected_bytes=size, activations=source.activations) as writer:
        for name, weight in weights.items():
            if name in stored:
                writer.add(name, stored[name].to("cpu"))
                continue
            bias = weight.dim() == 1 and not name.endswith(".weight")  # routers balance in float32
            writer.add(name, (weight.float() if bias else weight.to(torch.bfloat16)).cpu())
        return writer.finish({**dropped, **student.config}, manifest, ignore, card)
