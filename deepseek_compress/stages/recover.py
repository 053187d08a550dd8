"""Recover: train the scales and norms of a packed checkpoint by KL against the original model; the format stays.

Two models are held in float32, so this is for models that fit; `plan` tells the memory beforehand.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from deepseek_compress import provenance
from deepseek_compress.checkpoint import Checkpoint, CheckpointWriter, Header
from deepseek_compress.costs import Memory, Work
from deepseek_compress.distillation.recovery import recover
from deepseek_compress.errors import DscError
from deepseek_compress.models import Role, family_of
from deepseek_compress.models.runtime import Model
from deepseek_compress.stages.base import Context, Forecast, Output, Stage
from deepseek_compress.stages.text import calibration_text

WORK = ".dsc_text"


class Recover(Stage, frozen=True):
    """Scales and norms trained by KL on the original's outputs; codes and zero points stay as they are."""

    reference: str = "model"  # the name of the output that holds the original
    samples: int | None = Field(None, gt=0)  # None: as many as the recipe's calibration; more text beats more passes
    passes: int = Field(1, gt=0)
    batch_size: int = Field(4, gt=0)  # samples a step
    learning_rate: float = Field(3e-3, gt=0)  # relative change of a scale in an early step of Adam

    def problems(self, header: Header) -> list[DscError]:
        """No packed weight: nothing to train."""
        if any(info.encoding == "packed" for info in header.tensors.values()):
            return []
        return [
            DscError("recover: the checkpoint has no packed weights", "put a compress stage with weights before it")
        ]

    def reads(self) -> Sequence[str]:
        """The original."""
        return (self.reference,)

    def reads_text(self, header: Header) -> bool:
        """Yes."""
        return True

    def forecast(self, header: Header, samples: int, length: int) -> Forecast:
        """Both models in float32, the codes, the largest gradient; one forward, and one with its gradients."""
        sizes = [math.prod(info.shape) for info in header.tensors.values()]
        total = sum(sizes)
        return Forecast(
            header,
            tensors=sum(info.encoding == "packed" for info in header.tensors.values()),
            bytes=sum(info.bytes for info in header.tensors.values()),
            memory=Memory(9 * total + 4 * max(sizes)),
            work=Work(4.0 * total * self.passes * (512 * self.samples if self.samples else samples * length)),
        )

    def run(self, source: Checkpoint, context: Context) -> Output:
        """Write the checkpoint with its trained scales and norms to `context.out`."""
        if self.reference not in context.outputs:
            raise DscError(f"{self.reference!r} is no earlier output", f"valid names: {', '.join(context.outputs)}")
        family = family_of(source.config)
        cfg = family.parse(source.config)
        text = calibration_text(source, context, context.out / WORK, self.samples)
        shutil.rmtree(context.out / WORK, ignore_errors=True)
        teacher = Model.load(context.outputs[self.reference])
        loaded = Model.load(source)
        student = Model(family, cfg, loaded.weights)  # without the activation scheme: rounding has no gradient
        found = {name: source.read_quantized(name) for name in student.weights}
        packed = {name: weight for name, weight in found.items() if weight is not None}
        norms = {name: source.read(name) for name in student.weights if family.role(name) is Role.NORM}
        trained, losses = recover(
            teacher,
            student,
            packed,
            norms,
            text.tokens,
            passes=self.passes,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=context.seed,
            progress=context.progress,
        )
        facts = {"first_kl": losses[0], "last_kl": losses[-1], "steps": len(losses)}
        with CheckpointWriter(context.out, source, activations=source.activations) as writer:
            for name in source.header.tensors:
                if name in trained:
                    writer.add(name, trained[name])
                else:
                    writer.add_raw(name, source.read_raw(name))
            manifest = provenance.build_manifest(
                stage="recover",
                source=source,
                recipe=context.recipe_text,
                seed=context.seed,
                knobs=self.model_dump(mode="json"),
                inputs=self._inputs(context.outputs[self.reference]),
                extra={"calibration": text.facts, "facts": facts},
            )
            notes = writer.finish({}, manifest, source.config["quantization_config"]["ignore"])
        return Output("checkpoint", context.out, {**facts, "notes": notes})

    def _inputs(self, reference: Path) -> dict[str, Path]:
        return {"reference": reference / "config.json"}
