"""Distill: a student, made smaller or not, learns the teacher's distribution; 2:4 zeros of the source stay zero.

The student starts as the source with fewer experts or layers. The teacher's most likely tokens at every position are
recorded once, then the student is trained on them. Both models are held in float32, so this is for models that fit;
`plan` tells the memory beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from deepseek_compress import provenance
from deepseek_compress.checkpoint import Checkpoint, CheckpointWriter, Header, open_checkpoint
from deepseek_compress.distillation import shrink as shrinking
from deepseek_compress.distillation.resume import Keeper
from deepseek_compress.distillation.traces import (
    TOKENS_AT_ONCE,
    Document,
    batches_by_length,
    padded,
    read_documents,
    record,
)
from deepseek_compress.distillation.trainer import Schedule, masks_of, train
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture, Family, ModelConfig
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.planning.costs import Memory, Work
from deepseek_compress.stages.base import Context, Forecast, Output, Stage

COUNTED = 256  # documents that show how much each expert is used


class Distill(Stage, frozen=True):
    """A smaller student trained on the teacher's distribution, under its 2:4 mask where it has one."""

    teacher: str = "model"  # the name of the output to learn from
    experts: int | None = Field(None, gt=0)  # routed experts a layer; None keeps all
    layers: int | None = Field(None, gt=0)  # layers; None keeps all
    documents: int = Field(3000, gt=0)  # texts read from the calibration sources
    length: int = Field(512, gt=1)  # tokens; longer texts are cut
    steps: int = Field(150, ge=0)  # 0: the student as it is cut
    batch_tokens: int = Field(2560, gt=0)  # of a step, padding included
    learning_rate: float = Field(5e-4, gt=0)
    temperature: float = Field(4.0, gt=0)
    cross_entropy: float = Field(0.3, ge=0, le=1)  # share of the text itself in the loss; the rest is the teacher
    top_k: int = Field(16, gt=0)  # of the teacher's tokens that are kept at each position
    prompt_weight: float = Field(0.1, ge=0)  # of a prompt's position in the loss; an answer's is 1

    def problems(self, header: Header) -> list[DscError]:
        """A missing, unknown or misshaped tensor; sizes that do not fit; packed weights, which cannot be trained."""
        architecture = Architecture.of(header)
        found = architecture.problems()
        if found:
            return found
        found = shrinking.problems(architecture.family, architecture.cfg, self.experts, self.layers)
        if any(info.encoding == "packed" for info in header.tensors.values()):
            found.append(DscError("distill: the checkpoint has packed weights", "distill before it is quantised"))
        return found

    def reads(self) -> Sequence[str]:
        """The teacher."""
        return (self.teacher,)

    def forecast(self, header: Header, samples: int, length: int) -> Forecast:
        """Teacher, student, its gradients and two moments in float32; BF16 on the disk."""
        architecture = Architecture.of(header)
        plan = self._shrink(architecture.family, architecture.cfg, {})
        total = sum(math.prod(info.shape) for info in header.tensors.values())
        kept = sum(
            math.prod(header.tensors[origin.name].shape)
            for origin in plan.tensors.values()
            if origin.name in header.tensors
        )
        trained = self.steps * self.batch_tokens
        return Forecast(
            shrinking.shrunk_header(header, plan),
            tensors=len(plan.tensors),
            bytes=2 * kept,
            memory=Memory(4 * (total + 5 * kept)),
            work=Work(2.0 * total * min(trained, self.documents * self.length) + 6.0 * kept * trained),
        )

    def run(self, source: Checkpoint, context: Context) -> Output:
        """Write the trained student to `context.out`; an interrupted training goes on."""
        if self.teacher not in context.outputs:
            raise DscError(f"{self.teacher!r} is no earlier output", f"valid names: {', '.join(context.outputs)}")
        teacher = Model.load(open_checkpoint(context.outputs[self.teacher]))
        documents = self._documents(source, teacher.cfg, context)
        student, changes, facts = self._student(source, documents, context)
        names = [name for name in student.weights if _is_linear(student, name)]
        masks = masks_of(student.weights, names)
        schedule = Schedule(
            steps=self.steps,
            batch_tokens=self.batch_tokens,
            learning_rate=self.learning_rate,
            temperature=self.temperature,
            cross_entropy=self.cross_entropy,
            seed=context.seed,
        )
        keeper = Keeper(context.out, [self.model_dump(mode="json"), provenance.fingerprint(source), schedule])
        losses: list[float] = []
        if self.steps:
            traces = record(teacher, documents, self.top_k, self.prompt_weight, context.progress)
            del teacher
            losses = train(student, traces, schedule, masks, context.progress, keeper.load(), keeper.save)
        facts |= {"steps": self.steps, "masked": len(masks)}
        facts |= {"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}
        notes = self._write(source, student, changes, facts, context)
        keeper.clear()
        return Output("checkpoint", context.out, {**facts, "notes": notes})

    def _documents(self, source: Checkpoint, cfg: ModelConfig, context: Context) -> list[Document]:
        tokenizer = load_tokenizer(source.path)
        documents = read_documents(context.text.sources, tokenizer, self.documents, self.length)
        largest = max(max(document.ids) for document in documents)
        if largest >= cfg.vocab_size:
            what = f"{source.path}: the tokenizer gives id {largest}, config.json has a vocabulary of {cfg.vocab_size}"
            raise DscError(what, "check that tokenizer and models belong together")
        return documents

    def _shrink(self, family: Family, cfg: ModelConfig, use: dict[int, torch.Tensor]) -> shrinking.Shrink:
        if not use and self.experts is not None and cfg.moe is not None:  # for sizes alone any experts will do
            layers = range(cfg.num_hidden_layers)
            use = {layer: torch.zeros(cfg.moe.experts, dtype=torch.long) for layer in layers if cfg.is_moe(layer)}
        return shrinking.shrink(family, cfg, use, self.experts, self.layers)

    def _student(
        self, source: Checkpoint, documents: list[Document], context: Context
    ) -> tuple[Model, dict[str, object], dict[str, object]]:
        """The source, cut to size; the keys of config.json that change; facts for the run record."""
        loaded = Model.load(source)
        if self.experts is None and self.layers is None:
            return loaded, {"num_nextn_predict_layers": 0} if loaded.cfg.num_nextn_predict_layers else {}, {}
        use: dict[int, torch.Tensor] = {}
        if self.experts is not None:
            shown = [document.ids for document in documents[:COUNTED]]
            groups = batches_by_length([len(ids) for ids in shown], TOKENS_AT_ONCE)
            use = shrinking.expert_use(loaded, [padded([shown[index] for index in group]) for group in groups])
        plan = self._shrink(loaded.family, loaded.cfg, use)
        weights = {}
        for name, origin in plan.tensors.items():
            tensor = loaded.weights[origin.name]
            weights[name] = tensor.clone() if origin.rows is None else tensor[origin.rows]
        cfg = loaded.family.parse({**source.config, **plan.config})
        kept = {str(layer): experts for layer, experts in plan.experts.items()}
        if kept:
            context.tell(f"{self.experts} experts a layer stay (recipe: distill.experts), the most used of each group")
        return Model(loaded.family, cfg, weights), plan.config, {"experts_kept": kept}

    def _write(
        self,
        source: Checkpoint,
        student: Model,
        changes: dict[str, object],
        facts: dict[str, object],
        context: Context,
    ) -> list[str]:
        total = sum(2 * weight.numel() for weight in student.weights.values())
        with CheckpointWriter(context.out, source, expected_bytes=total) as writer:
            for name, weight in student.weights.items():
                bias = weight.dim() == 1 and not name.endswith(".weight")  # routers balance in float32
                writer.add(name, weight if bias else weight.to(torch.bfloat16))
            manifest = provenance.build_manifest(
                stage="distill",
                source=source,
                recipe=context.recipe_text,
                seed=context.seed,
                knobs=self.model_dump(mode="json"),
                inputs=self._inputs(context.outputs[self.teacher]),
                extra={"facts": facts},
            )
            return writer.finish(changes, manifest, [])

    def _inputs(self, teacher: Path) -> dict[str, Path]:
        return {"teacher": teacher / "config.json"}


def _is_linear(student: Model, name: str) -> bool:
    family, cfg = student.family, student.cfg
    for layer in range(cfg.num_hidden_layers):
        prefix = family.prefix(layer) + "."
        if name.startswith(prefix):
            local = name[len(prefix) :]
            return any(local == linear.name + ".weight" for linear in family.linears(cfg, layer))
    return False
