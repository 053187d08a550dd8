"""Knobs of a training, checked on shapes alone, and its memory and work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from deepseek_compress.checkpoint import Header
from deepseek_compress.distillation import shrink
from deepseek_compress.distillation.activations import activations
from deepseek_compress.distillation.cache import is_cache
from deepseek_compress.distillation.curriculum import Curriculum
from deepseek_compress.distillation.features import INSIDE
from deepseek_compress.distillation.lora import Lora
from deepseek_compress.distillation.losses import Loss, losses_of
from deepseek_compress.distillation.record import Kept
from deepseek_compress.distillation.students import Size
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture
from deepseek_compress.planning.costs import Memory, Work
from deepseek_compress.stages.base import Forecast, Stage

STEPS = 150  # where nothing says how long


class Training(Stage, frozen=True):
    """Knobs of a training: what is wrong with them, and what it will take."""

    shares: ClassVar[bool] = True

    teacher: str | None = "model"  # the output to learn from: a checkpoint, or what `record` wrote
    cache: str | None = None  # directory with the teacher's words; recorded there first where it has none
    kept: Kept = Kept()  # of each distribution, in that directory
    text: str | None = None  # the output of `traces` to train on; None: the calibration text
    keep: float | None = Field(None, gt=0, le=1)  # share of the experts, of the layers where there are none, that stays
    experts: int | None = Field(None, gt=0)  # routed experts a layer; None keeps all; goes before keep
    layers: int | None = Field(None, gt=0)  # layers; None keeps all; goes before keep
    layers_by: Literal["influence", "loss", "even"] = "influence"  # which of them stay, see `importance`
    experts_by: Literal["activation", "frequency"] = "activation"
    width: float | None = Field(None, gt=0, lt=1)  # share of the channels of each MLP and expert; None keeps all
    heads: int | None = Field(None, gt=0)  # of attention's queries; those that share keys and values go together
    active: int | None = Field(None, gt=0)  # routed experts that run for a token; None keeps their number
    documents: int | None = Field(None, gt=1)  # texts read from the calibration sources; None: what the steps need
    length: int = Field(512, gt=1)  # tokens; longer texts are cut
    steps: int | None = Field(None, ge=0)  # 0: the student as it is cut
    tokens: int | None = Field(None, gt=0)  # instead of steps
    minutes: float | None = Field(None, gt=0)  # instead of steps; they become steps before the first one
    batch_tokens: int = Field(2048, gt=0)  # of a step, padding included
    accumulate: int = Field(1, gt=0)  # parts of a step, whose gradients add up
    learning_rate: float | None = Field(
        None, gt=0
    )  # None: 1e-4 for a student that was cut, 2e-5 near its teacher, 1e-3 by lora
    loss: dict[str, Any] = Field({"forward_kl": {}}, validate_default=True)  # of `losses`, each with its share
    temperature: float = Field(1.0, gt=0)
    prompt_weight: float = Field(0.1, ge=0)  # of a prompt's position in the loss; an answer's is 1
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    precision: Literal["float32", "mixed", "bfloat16"] = "float32"  # mixed: products in BF16; bfloat16: all of it
    processes: int = Field(1, gt=0, le=64)  # that train together, each on its share of a step; several GPUs: one each
    checkpointing: bool = False  # compute blocks again on the way back instead of keeping what they computed
    freeze: tuple[str, ...] = ()  # shell patterns of tensors that stay
    lora: Lora | None = None  # train changes of low rank alone, added to the weights at the end
    joint: float = Field(0.0, ge=0)  # share of the teacher's own loss on the text; above 0 it is trained too
    on_policy: float = Field(0.0, ge=0, le=1)  # share of the steps that are on what the student itself writes
    curriculum: Curriculum | None = None  # easy texts first; None: all in an order that is drawn
    validation: float = Field(0.05, ge=0, lt=1)  # share of the documents that are held back, few at most
    patience: int | None = Field(None, gt=0)  # validations without gain that end a training

    @field_validator("loss", mode="before")
    @classmethod
    def _named(cls, value: Any) -> dict[str, Any]:
        names = [value] if isinstance(value, str) else value
        return {name: loss.model_dump() for name, loss in zip(names, losses_of(value), strict=True)}

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        given = [name for name in ("steps", "tokens", "minutes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: one of them says how long to train")
        return self

    @property
    def size(self) -> Size:
        """Size of the student relative to the source."""
        return Size(**{name: getattr(self, name) for name in Size.model_fields})

    @property
    def losses(self) -> tuple[Loss, ...]:
        """Training objective of the student."""
        return losses_of(self.loss)

    def problems(self, header: Header) -> list[DscError]:
        """Return a missing, unknown or misshaped tensor; sizes that do not fit; those of packed weights."""
        architecture = Architecture.of(header)
        found = architecture.problems()
        if found:
            return found
        cfg = architecture.cfg
        found = shrink.problems(architecture.family, cfg, self.size.of(cfg))
        packed = any(info.encoding == "packed" for info in header.tensors.values())
        if packed and self.size.of(cfg)._replace(active=None) != shrink.Sizes():
            found.append(DscError("distill: packed weights cannot be made fewer", "cut before the model is quantised"))
        if packed and self.lora is not None:
            what = "distill.lora: packed weights learn their scales and codes, nothing is added to them"
            found.append(DscError(what, "leave lora out, or train before the model is quantised"))
        if self.freeze and self.lora is not None:
            found.append(DscError("distill.freeze: lora freezes every weight", "choose linears by lora.modules"))
        if packed and self.precision == "bfloat16":
            found.append(DscError("distill.precision: bfloat16 cannot hold what packed weights learn", "set mixed"))
        if self.teacher is None and (self.cache is None or not is_cache(Path(self.cache))):
            found.append(DscError("distill: no teacher", "name a finished recording: cache"))
        inside = [name for name, loss in zip(self.loss, self.losses, strict=True) if isinstance(loss, INSIDE)]
        if inside and self.cache is not None:
            found.append(DscError(f"distill.loss: {', '.join(inside)} cannot be recorded", "leave out them, or cache"))
        if self.cache is not None and (live := ", ".join(k for k in ("on_policy", "joint") if getattr(self, k))):
            found.append(DscError(f"distill.{live}: needs the teacher itself, not a cache", "leave one of them out"))
        if self.cache is not None and self.curriculum is not None and self.curriculum.by == "loss":
            what = "distill.curriculum: by loss asks the teacher itself, which a cache is not"
            found.append(DscError(what, "set by: length, or leave cache out"))
        return found

    def reads(self) -> Sequence[str]:
        """Return the teacher, and traces."""
        return tuple(name for name in (self.teacher, self.text) if name is not None)

    def forecast(self, header: Header, samples: int, length: int) -> Forecast:
        """Teacher, student, its gradients, moments and best weights in float32; BF16 on the disk."""
        architecture = Architecture.of(header)
        cfg = architecture.cfg
        plan = shrink.shrink(architecture.family, cfg, self.size.of(cfg), shrink.any_experts(cfg))
        smaller = shrink.shrunk_header(header, plan)
        total = sum(info.elements for info in header.tensors.values())
        kept = sum(info.elements for info in smaller.tensors.values())
        work = Work((2.0 * total + 6.0 * kept) * self._wanted)
        copies = 2 + 2 * (self.optimizer == "adamw") + (self.validation > 0)  # with its moments
        if self.lora is not None:  # as it is, and with what it learns, whose moments are little
            copies = 2
        weights = (2 if self.precision == "bfloat16" else 4) * (total + copies * kept)
        part = self.batch_tokens // (self.accumulate * self.processes)
        return Forecast(
            smaller,
            tensors=len(plan.tensors),
            bytes=2 * kept,
            memory=Memory(self.processes * (weights + activations(cfg, part, self.length, self.checkpointing))),
            work=None if self.minutes else work,
        )

    @property
    def _wanted(self) -> int:
        """Tokens to train on, where no minutes are asked for."""
        return self.tokens or (self.steps if self.steps is not None else STEPS) * self.batch_tokens
