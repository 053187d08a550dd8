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
from typing import Any, NamedTuple

import torch

from deepseek_compress import provenance
from deepseek_compress.calibration.settings import Source
from deepseek_compress.checkpoint import Checkpoint, open_checkpoint
from deepseek_compress.checkpoint.files import kept, remove_tree, write_sealed
from deepseek_compress.distillation import replicas, report
from deepseek_compress.distillation.cache import CachedTeacher, is_cache, read_index
from deepseek_compress.distillation.curriculum import teacher_loss
from deepseek_compress.distillation.documents import Document, read_documents
from deepseek_compress.distillation.features import even_pairs, projections
from deepseek_compress.distillation.group import Group
from deepseek_compress.distillation.lora import LowRank
from deepseek_compress.distillation.objective import Objective
from deepseek_compress.distillation.record import record_model, text_digest
from deepseek_compress.distillation.resume import Keeper
from deepseek_compress.distillation.rounding import Straight, straight_inputs
from deepseek_compress.distillation.students import Student, check_tokenizers, cut, is_linear, write_student
from deepseek_compress.distillation.teachers import JointTeacher, LiveTeacher, Teacher
from deepseek_compress.distillation.traces import TRACES
from deepseek_compress.distillation.trainer import Schedule, Trainer, masks_of
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture, ModelConfig
from deepseek_compress.models.activations import InputScheme, input_scheme
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.numerics.types import Quantized
from deepseek_compress.stages.base import Context, Output
from deepseek_compress.stages.resumable import Resumable
from deepseek_compress.stages.training import STEPS, Training

WORK = ".dsc_distill"  # in the output directory, while a run is unfinished
HELD_BACK = 2  # steps' worth of tokens at most
CUT_RATE, WHOLE_RATE, LORA_RATE = 1e-4, 2e-5, 1e-3  # of AdamW, see reports/LOG.md
FASTEST = 10_000  # tokens that a training reads in a second, at most
TRIED = 2  # steps that tell how many there are in some minutes


class _Lesson(NamedTuple):
    """Who teaches, on which text, over which tokens; `model`: the teacher where it is here."""

    teacher: Teacher
    documents: list[Document]
    vocabulary: int
    fingerprint: str
    model: Model | None


class _Ready(NamedTuple):
    """A training before its first step."""

    lesson: _Lesson
    student: Student
    packed: dict[str, Quantized]
    presented: Straight | LowRank | None
    trainer: Trainer


class Distill(Training, frozen=True):
    """A smaller student trained on the teacher's distribution, under its 2:4 mask where it has one."""

    def run(self, source: Checkpoint, context: Context) -> Output:
        """Write the trained student to `context.out`; an interrupted training goes on."""
        work = context.out / WORK
        lesson, student, packed, presented, trainer = self._prepare(source, context)
        size = max(self.processes, len(context.devices))
        self._identity(source, lesson, context, size).claim(context.out, work)
        trainer.over(self._steps(trainer, work, context, size))
        steps = trainer.schedule.steps
        facts: dict[str, Any] = {**student.facts, "masked": len(trainer.masks), "steps": steps}
        keeper = Keeper(work)
        state = keeper.load(context.device)
        if steps:
            with replicas.started(self, source.path, context, work, steps, size) as trainer.group:
                state = trainer.run(context.progress, state, keeper.save)
            facts |= report.facts(state)
            context.tell_all(report.notes(state, trainer.schedule))
        state = state or trainer.begin()
        if isinstance(presented, LowRank):
            facts["lora"] = {"linears": len(presented.shapes), "parameters": presented.numbers}
            student.weights.update({name: each.detach() for name, each in trainer.learner(state).weights.items()})
        own = {name: student.model.weights[name] for name in packed}
        stored = {}
        if isinstance(presented, Straight):
            stored = {name: presented.stored(name, weight, state.projections) for name, weight in own.items()}
        notes = self._write(source, student, stored, facts, report.card(state), context)
        remove_tree(work)
        return Output("checkpoint", context.out, {**facts, "notes": notes})

    def replica(self, source: Path, context: Context) -> Trainer:
        """Return the same training in another process; see `replicas`."""
        return self._prepare(open_checkpoint(source), context).trainer

    def _prepare(self, source: Checkpoint, context: Context) -> _Ready:
        lesson, student = self._begin(source, context)
        names = [name for name in student.model.weights if is_linear(student.model, name)]
        masks = masks_of(student.model.weights, names)
        read = ((name, source.read_quantized(name)) for name in student.model.weights if name in source.header.tensors)
        packed = {name: part.to(context.device) for name, part in read if part is not None}  # embedding and head too
        presented: Straight | LowRank | None = None
        if packed:
            presented = Straight(packed)
            near = lesson.model.weights if lesson.model is not None else {}
            student.weights.update(presented.starts(near))
        elif self.lora is not None:
            presented = self.lora.over(student.model.weights, names, masks)
        scheme = straight_inputs(input_scheme(source.activations))
        trainer = self._trainer(lesson, student, masks, presented, scheme, context.seed)
        return _Ready(lesson, student, packed, presented, trainer)

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
        presented: Straight | LowRank | None,
        scheme: InputScheme | None,
        seed: int,
    ) -> Trainer:
        """Return a training of one step; `_steps` says how many there are."""
        count = len(lesson.documents)
        lengths = [len(document.ids) for document in lesson.documents]
        few = sum(total <= HELD_BACK * self.batch_tokens for total in itertools.accumulate(reversed(lengths)))
        held_back = min(max(1, few), math.ceil(self.validation * count), count - 1)
        extra = {} if lesson.model is None else projections(self.losses, student.model.cfg, lesson.model.cfg)
        if isinstance(presented, LowRank):
            extra |= presented.leaves(seed)
        elif presented is not None:
            extra |= presented.scales()
        extra |= lesson.teacher.leaves() if isinstance(lesson.teacher, JointTeacher) else {}
        extra = {name: part.to(student.model.head.device) for name, part in extra.items()}
        mixed = self.precision == "mixed"
        objective = Objective(
            self.losses, self.temperature, lesson.vocabulary, student.pairs, mixed, self.checkpointing, self.joint
        )
        rate = CUT_RATE if student.facts and not self.joint else WHOLE_RATE
        schedule = Schedule(
            steps=1,
            batch_tokens=self.batch_tokens,
            accumulate=self.accumulate,
            learning_rate=self.learning_rate or (LORA_RATE if self.lora else rate),
            optimizer=self.optimizer,
            freeze=self.freeze,
            prompt_weight=self.prompt_weight,
            held_back=held_back,
            patience=self.patience,
            seed=seed,
            on_policy=self.on_policy,
            phases=1 if self.curriculum is None else self.curriculum.phases,
        )
        parts = (student.model, lesson.teacher, lesson.documents, objective, schedule, masks, extra, presented, scheme)
        return Trainer(*parts, self._difficulty(lesson))

    def _difficulty(self, lesson: _Lesson) -> list[float] | None:
        """Of each text, for the curriculum."""
        if self.curriculum is None:
            return None
        if self.curriculum.by == "length" or lesson.model is None:
            return [float(len(document.ids)) for document in lesson.documents]
        return teacher_loss(lesson.model, lesson.documents)

    def _steps(self, trainer: Trainer, work: Path, context: Context, size: int) -> int:
        """Return the number of steps; minutes become steps once, before the first."""
        if self.tokens is not None:
            return trainer.steps_for(self.tokens)
        if self.minutes is None:
            return STEPS if self.steps is None else self.steps
        file = work / "steps.json"
        before = kept(file)
        if before is not None:
            return int(before["steps"])
        trainer.group = Group(0, size, alone=True)
        seconds = trainer.seconds_a_step(TRIED)
        steps = max(1, int(60 * self.minutes / seconds))
        write_sealed(file, {"steps": steps})
        context.tell(f"{steps} steps of {seconds:.1f} s in {self.minutes:g} minutes (recipe: distill.minutes)")
        return steps

    def _identity(self, source: Checkpoint, lesson: _Lesson, context: Context, size: int) -> Resumable:
        """Everything that the bytes follow from; a resume is refused if one of them differs."""
        knobs, text = {**self.model_dump(mode="json"), "processes": size}, text_digest(lesson.documents)
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
        teacher = self._teacher_path(context)
        manifest = provenance.build_manifest(
            stage="distill",
            source=source,
            recipe=context.recipe_text,
            seed=context.seed,
            knobs=self.model_dump(mode="json"),
            inputs={} if teacher is None or is_cache(teacher) else {"teacher": teacher / "config.json"},
            extra={"facts": facts},
        )
        return write_student(context.out, source, student, stored, manifest, card)
