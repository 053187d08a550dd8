"""Distill: a student learns the teacher's distribution; 2:4 zeros of the source stay zero.

The student is the source, with fewer experts or layers where the recipe says so. Its teacher is a checkpoint in memory,
which says all of its distribution at every step, or what one said before and is kept on disk (`record`, or `cache`).
Weights are held in memory: this is for models that fit; `plan` tells the memory beforehand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator

from deepseek_compress import provenance
from deepseek_compress.calibration.settings import Source
from deepseek_compress.checkpoint import Checkpoint, CheckpointWriter, Header, open_checkpoint
from deepseek_compress.checkpoint.files import kept, remove_tree, write_sealed
from deepseek_compress.distillation import report, shrink
from deepseek_compress.distillation.cache import CachedTeacher, is_cache, read_index
from deepseek_compress.distillation.curriculum import Curriculum, teacher_loss
from deepseek_compress.distillation.documents import Document, read_documents
from deepseek_compress.distillation.features import INSIDE, even_pairs, projections
from deepseek_compress.distillation.losses import Loss, losses_of
from deepseek_compress.distillation.objective import PIECE, Objective
from deepseek_compress.distillation.record import Kept, record_model, text_digest
from deepseek_compress.distillation.resume import Keeper
from deepseek_compress.distillation.rounding import Straight, straight_inputs
from deepseek_compress.distillation.students import Size, Student, check_tokenizers, cut, is_linear
from deepseek_compress.distillation.teachers import JointTeacher, LiveTeacher, Teacher
from deepseek_compress.distillation.traces import TRACES
from deepseek_compress.distillation.trainer import Schedule, Trainer, masks_of
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture, ModelConfig
from deepseek_compress.models.activations import InputScheme, input_scheme
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.numerics.types import Quantized
from deepseek_compress.planning.costs import Memory, Work
from deepseek_compress.stages.base import Context, Forecast, Output, Stage
from deepseek_compress.stages.resumable import Resumable

WORK = ".dsc_distill"  # in the output directory, while a run is unfinished
STEPS = 150  # where nothing says how long
HELD_BACK = 2  # steps' worth of tokens at most
CUT_RATE, WHOLE_RATE = 1e-4, 2e-5  # of AdamW, see reports/LOG.md
FASTEST = 10_000  # tokens that a training reads in a second, at most
TRIED = 2  # steps that tell how many there are in some minutes


class _Lesson(NamedTuple):
    """Who teaches, on which text, over which tokens; `model`: the teacher where it is here."""

    teacher: Teacher
    documents: list[Document]
    vocabulary: int
    fingerprint: str
    model: Model | None


class Distill(Stage, frozen=True):
    """A smaller student trained on the teacher's distribution, under its 2:4 mask where it has one."""

    teacher: str | None = "model"  # the output to learn from: a checkpoint, or what `record` wrote
    cache: str | None = None  # directory with the teacher's words; recorded there first where it has none
    kept: Kept = Kept()  # of each distribution, in that directory
    text: str | None = None  # the output of `traces` to train on; None: the calibration text
    keep: float | None = Field(None, gt=0, le=1)  # share of the experts, of the layers where there are none, that stays
    experts: int | None = Field(None, gt=0)  # routed experts a layer; None keeps all; goes before keep
    layers: int | None = Field(None, gt=0)  # layers; None keeps all; goes before keep
    layers_by: Literal["influence", "loss", "even"] = "influence"  # which of them stay, see `importance`
    experts_by: Literal["activation", "frequency"] = "activation"
    documents: int | None = Field(None, gt=1)  # texts read from the calibration sources; None: what the steps need
    length: int = Field(512, gt=1)  # tokens; longer texts are cut
    steps: int | None = Field(None, ge=0)  # 0: the student as it is cut
    tokens: int | None = Field(None, gt=0)  # instead of steps
    minutes: float | None = Field(None, gt=0)  # instead of steps; they become steps before the first one
    batch_tokens: int = Field(2048, gt=0)  # of a step, padding included
    accumulate: int = Field(1, gt=0)  # parts of a step, whose gradients add up
    learning_rate: float | None = Field(None, gt=0)  # None: 1e-4 for a student that was cut, 2e-5 near its teacher
    loss: dict[str, Any] = Field({"forward_kl": {}}, validate_default=True)  # of `losses`, each with its share
    temperature: float = Field(1.0, gt=0)
    prompt_weight: float = Field(0.1, ge=0)  # of a prompt's position in the loss; an answer's is 1
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    precision: Literal["float32", "mixed", "bfloat16"] = "float32"  # mixed: products in BF16; bfloat16: all of it
    checkpointing: bool = False  # compute blocks again on the way back instead of keeping what they computed
    freeze: tuple[str, ...] = ()  # shell patterns of tensors that stay
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
    def _one_length(self) -> Distill:
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
        found = shrink.problems(architecture.family, cfg, *self.size.of(cfg))
        packed = any(info.encoding == "packed" for info in header.tensors.values())
        if packed and self.size.of(cfg) != (None, None):
            found.append(DscError("distill: packed weights cannot be made fewer", "cut before the model is quantised"))
        if packed and self.precision == "bfloat16":
            found.append(DscError("distill.precision: bfloat16 cannot hold what packed weights learn", "set mixed"))
        if self.teacher is None and (self.cache is None or not is_cache(Path(self.cache))):
            found.append(DscError("distill: no teacher", "name a finished recording: cache"))
        inside = [name for name, loss in zip(self.loss, self.losses, strict=True) if isinstance(loss, INSIDE)]
        if inside and self.cache is not None:
            found.append(DscError(f"distill.loss: {', '.join(inside)} cannot be recorded", "leave out them, or cache"))
        live = ", ".join(name for name in ("on_policy", "joint") if getattr(self, name))
        if self.cache is not None and live:
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
        plan = shrink.shrink(architecture.family, cfg, shrink.any_experts(cfg), *self.size.of(cfg))
        total = sum(info.elements for info in header.tensors.values())
        kept = sum(
            header.tensors[origin.name].elements for origin in plan.tensors.values() if origin.name in header.tensors
        )
        work = Work((2.0 * total + 6.0 * kept) * self._wanted)
        weight = 2 if self.precision == "bfloat16" else 4
        copies = 2 + 2 * (self.optimizer == "adamw") + (self.validation > 0)  # with its moments
        return Forecast(
            shrink.shrunk_header(header, plan),
            tensors=len(plan.tensors),
            bytes=2 * kept,
            memory=Memory(weight * (total + copies * kept) + self._activations(cfg)),
            work=None if self.minutes else work,
        )

    @property
    def _wanted(self) -> int:
        """Tokens to train on, where no minutes are asked for."""
        return self.tokens or (self.steps if self.steps is not None else STEPS) * self.batch_tokens

    def _activations(self, cfg: ModelConfig) -> int:
        """Bytes that a part of a step keeps for the way back, and the logits of a piece of it."""
        tokens = self.batch_tokens // self.accumulate
        wide = cfg.moe.intermediate * cfg.moe.top_k if cfg.moe else cfg.intermediate_size
        scores = 3 * cfg.num_attention_heads * min(self.length, tokens)
        block = 4 * tokens * (16 * cfg.hidden_size + 4 * wide + scores)
        blocks = 1 if self.checkpointing else cfg.num_hidden_layers
        return blocks * block + 4 * cfg.num_hidden_layers * tokens * cfg.hidden_size + 6 * 4 * PIECE

    def run(self, source: Checkpoint, context: Context) -> Output:
        """Write the trained student to `context.out`; an interrupted training goes on."""
        work = context.out / WORK
        lesson, student = self._begin(source, context)
        self._identity(source, lesson, context).claim(context.out, work)
        names = [name for name in student.model.weights if is_linear(student.model, name)]
        masks = masks_of(student.model.weights, names)
        read = ((name, source.read_quantized(name)) for name in student.model.weights if name in source.header.tensors)
        packed = {name: part.to(context.device) for name, part in read if part is not None}  # embedding and head too
        straight = Straight(packed) if packed else None
        if straight is not None:
            near = lesson.model.weights if lesson.model is not None else {}
            student.weights.update(straight.starts(near))
        scheme = straight_inputs(input_scheme(source.activations))
        trainer = self._trainer(lesson, student, masks, straight, scheme, context.seed)
        trainer.over(self._steps(trainer, work, context))
        facts: dict[str, Any] = {**student.facts, "masked": len(masks), "steps": trainer.schedule.steps}
        keeper = Keeper(work)
        state = keeper.load(context.device)
        if trainer.schedule.steps:
            state = trainer.run(context.progress, state, keeper.save)
            facts |= report.facts(state)
            context.tell_all(report.notes(state, trainer.schedule))
        state = state or trainer.begin()
        own = {name: student.model.weights[name] for name in packed}
        stored = {} if straight is None else {n: straight.stored(n, w, state.projections) for n, w in own.items()}
        notes = self._write(source, student, stored, facts, report.card(state), context)
        remove_tree(work)
        return Output("checkpoint", context.out, {**facts, "notes": notes})

    def _begin(self, source: Checkpoint, context: Context) -> tuple[_Lesson, Student]:
        """Return the teacher with its text, and the student it begins with."""
        path = self._teacher_path(context)
        words = Path(self.cache) if self.cache else path if path is not None and is_cache(path) else None
        if words is not None:
            if not is_cache(words):
                assert path is not None
                self._record(source, open_checkpoint(path), words, context)
            return self._from_cache(source, words, context)
        assert path is not None
        opened = open_checkpoint(path)
        teacher = self._load(opened, context)
        same = path.resolve() == source.path.resolve()
        loaded = teacher if same else self._load(source, context)
        documents = self._documents(source, teacher.cfg, context)
        student = self._cut(loaded, source, documents, context, same)
        sizes = (teacher.cfg.vocab_size, student.model.cfg.vocab_size)
        check_tokenizers(load_tokenizer(source.path).digest, load_tokenizer(path).digest, sizes)
        if not same:
            student = student._replace(pairs=even_pairs(student.model.cfg, teacher.cfg))
        live = (JointTeacher if self.joint else LiveTeacher)(teacher, min(sizes), self.temperature)
        return _Lesson(live, documents, min(sizes), provenance.fingerprint(opened), teacher), student

    def _from_cache(self, source: Checkpoint, words: Path, context: Context) -> tuple[_Lesson, Student]:
        """Return a teacher that is not there; its text is the one that was recorded."""
        teacher = CachedTeacher(words, context.device)
        if teacher.temperature != self.temperature:
            what = f"recorded at temperature {teacher.temperature:g}, distill.temperature is {self.temperature:g}"
            raise DscError(f"{words}: {what}", f"set distill.temperature to {teacher.temperature:g}, or record again")
        loaded, documents = self._load(source, context), teacher.documents()
        student = self._cut(loaded, source, documents, context)
        sizes = (teacher.vocabulary, student.model.cfg.vocab_size)
        check_tokenizers(load_tokenizer(source.path).digest, teacher.index["tokenizer"], sizes)
        if sizes[1] < sizes[0]:
            what = f"{words}: words of a vocabulary of {sizes[0]}, the student has {sizes[1]}"
            raise DscError(what, "give a student with all tokens of its tokenizer")
        return _Lesson(teacher, documents, teacher.vocabulary, provenance.digest(teacher.index), None), student

    def _record(self, source: Checkpoint, teacher: Checkpoint, words: Path, context: Context) -> None:
        """Write the teacher's words into `words`, after those that are there."""
        tokenizer = load_tokenizer(teacher.path)
        documents = self._documents(source, Architecture.of(teacher).cfg, context)
        known = (documents, self.kept, self.temperature, words, context.seed, context.progress, context.device)
        record_model(teacher, tokenizer, *known)
        index = read_index(words)
        context.tell(f"{words}: {index['form']} words of {index['tokens']} tokens, {index['bytes_a_token']} bytes each")

    def _documents(self, source: Checkpoint, cfg: ModelConfig, context: Context) -> list[Document]:
        tokenizer = load_tokenizer(source.path)
        wanted = int(60 * self.minutes * FASTEST) if self.minutes else self._wanted
        tokens = round(wanted / (1 - self.validation))
        documents = read_documents(self._sources(context), tokenizer, self.length, self.documents, tokens)
        largest = max(max(document.ids) for document in documents)
        if largest >= cfg.vocab_size:
            what = f"{source.path}: the tokenizer gives id {largest}, config.json has a vocabulary of {cfg.vocab_size}"
            raise DscError(what, "check that tokenizer and models belong together")
        return documents

    def _sources(self, context: Context) -> Sequence[Source]:
        """Return the text that is trained on."""
        if self.text is None:
            return context.text.sources
        file = context.outputs.get(self.text, Path()) / TRACES
        if not file.is_file():
            raise DscError(f"distill.text: {self.text!r} is not an output of traces", "name a stage traces: before it")
        return (Source(path=str(file)),)

    def _cut(
        self, loaded: Model, source: Checkpoint, documents: list[Document], context: Context, shared: bool = False
    ) -> Student:
        """Return the source, cut to size, with tensors of its own."""
        student = cut(loaded, source.config, self.size, documents, shared)
        context.tell_all(report.kept(student, self.size))
        return student

    def _teacher_path(self, context: Context) -> Path | None:
        if self.teacher is not None and self.teacher not in context.outputs:
            raise DscError(f"distill.teacher: unknown output {self.teacher!r}", f"known: {', '.join(context.outputs)}")
        return None if self.teacher is None else context.outputs[self.teacher]

    def _load(self, checkpoint: Checkpoint, context: Context) -> Model:
        low = self.precision == "bfloat16"
        return Model.load(checkpoint, dtype=torch.bfloat16 if low else torch.float32, device=context.device)

    def _trainer(
        self,
        lesson: _Lesson,
        student: Student,
        masks: Mapping[str, torch.Tensor],
        straight: Straight | None,
        scheme: InputScheme | None,
        seed: int,
    ) -> Trainer:
        """Return a training of one step; `_steps` says how many there are."""
        count = len(lesson.documents)
        lengths = [len(document.ids) for document in lesson.documents]
        few = sum(total <= HELD_BACK * self.batch_tokens for total in itertools.accumulate(reversed(lengths)))
        held = min(max(1, few), math.ceil(self.validation * count), count - 1)
        extra = {} if lesson.model is None else projections(self.losses, student.model.cfg, lesson.model.cfg)
        extra |= {} if straight is None else straight.scales()
        extra |= lesson.teacher.leaves() if isinstance(lesson.teacher, JointTeacher) else {}
        extra = {name: part.to(student.model.head.device) for name, part in extra.items()}
        mixed = self.precision == "mixed"
        objective = Objective(
            self.losses, self.temperature, lesson.vocabulary, student.pairs, mixed, self.checkpointing, self.joint
        )
        schedule = Schedule(
            steps=1,
            batch_tokens=self.batch_tokens,
            accumulate=self.accumulate,
            learning_rate=self.learning_rate or (CUT_RATE if student.facts and not self.joint else WHOLE_RATE),
            optimizer=self.optimizer,
            freeze=self.freeze,
            prompt_weight=self.prompt_weight,
            held_back=held,
            patience=self.patience,
            seed=seed,
            on_policy=self.on_policy,
            phases=1 if self.curriculum is None else self.curriculum.phases,
        )
        parts = (student.model, lesson.teacher, lesson.documents, objective, schedule, masks, extra, straight, scheme)
        return Trainer(*parts, self._difficulty(lesson))

    def _difficulty(self, lesson: _Lesson) -> list[float] | None:
        """Of each text, for the curriculum."""
        if self.curriculum is None:
            return None
        if self.curriculum.by == "length" or lesson.model is None:
            return [float(len(document.ids)) for document in lesson.documents]
        return teacher_loss(lesson.model, lesson.documents)

    def _steps(self, trainer: Trainer, work: Path, context: Context) -> int:
        """Return the number of steps; minutes become steps once, before the first."""
        if self.tokens is not None:
            return trainer.steps_for(self.tokens)
        if self.minutes is None:
            return STEPS if self.steps is None else self.steps
        file = work / "steps.json"
        before = kept(file)
        if before is not None:
            return int(before["steps"])
        seconds = trainer.seconds_a_step(TRIED)
        steps = max(1, int(60 * self.minutes / seconds))
        write_sealed(file, {"steps": steps})
        context.tell(f"{steps} steps of {seconds:.1f} s in {self.minutes:g} minutes (recipe: distill.minutes)")
        return steps

    def _identity(self, source: Checkpoint, lesson: _Lesson, context: Context) -> Resumable:
        """Everything that the bytes follow from; a resume is refused if one of them differs."""
        knobs, text = self.model_dump(mode="json"), text_digest(lesson.documents)
        identity = Resumable.of(source, knobs, text, seed=context.seed, device=context.device)
        return replace(identity, teacher=lesson.fingerprint, threads=torch.get_num_threads())

    def _write(
        self,
        source: Checkpoint,
        student: Student,
        stored: Mapping[str, Quantized],
        facts: dict[str, Any],
        card: str,
        context: Context,
    ) -> list[str]:
        model, teacher = student.model, self._teacher_path(context)
        total = sum(2 * weight.numel() for weight in model.weights.values())
        inputs = {} if teacher is None or is_cache(teacher) else {"teacher": teacher / "config.json"}
        dropped = {"num_nextn_predict_layers": 0} if source.config.get("num_nextn_predict_layers") else {}
        ignore = source.config["quantization_config"]["ignore"] if stored else []
        size = 0 if stored else total
        with CheckpointWriter(context.out, source, expected_bytes=size, activations=source.activations) as writer:
            for name, weight in model.weights.items():
                if name in stored:
                    writer.add(name, stored[name].to("cpu"))
                    continue
                bias = weight.dim() == 1 and not name.endswith(".weight")  # routers balance in float32
                writer.add(name, (weight.float() if bias else weight.to(torch.bfloat16)).cpu())
            manifest = provenance.build_manifest(
                stage="distill",
                source=source,
                recipe=context.recipe_text,
                seed=context.seed,
                knobs=self.model_dump(mode="json"),
                inputs=inputs,
                extra={"facts": facts},
            )
            return writer.finish({**dropped, **student.config}, manifest, ignore, card)
