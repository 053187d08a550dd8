"""Recover: train what may move of a compressed checkpoint against the original model; the format stays.

That is the scales and norms of packed weights; of 2:4 weights in 16 bits the values that are left, and the norms.
`by_block` trains one block after the other towards the original's hidden states, with nothing else of either model in
memory. `passes` over the text by KL, end to end, hold both models in float32: 0 for models that do not fit. `plan`
tells the memory beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field
from torch import Tensor

from deepseek_compress import provenance
from deepseek_compress.checkpoint import Checkpoint, CheckpointWriter, Header, open_checkpoint
from deepseek_compress.checkpoint.files import remove_tree
from deepseek_compress.distillation import blockwise
from deepseek_compress.distillation.recovery import recover
from deepseek_compress.errors import DscError
from deepseek_compress.models import Role
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.types import Quantized
from deepseek_compress.planning.costs import Memory, Work, total
from deepseek_compress.stages.base import Context, Forecast, Output, Stage
from deepseek_compress.stages.resumable import Resumable
from deepseek_compress.stages.text import calibration_text

WORK = ".dsc_recover"  # in the output directory, while a run is unfinished


class ByBlock(BaseModel, frozen=True, extra="forbid"):
    """Each block by itself towards the original's hidden states, before anything end to end."""

    passes: int = Field(1, gt=0)
    learning_rate: float = Field(3e-3, gt=0)  # relative change of a scale in an early step of Adam
    weight_rate: float = Field(0.03, gt=0)  # of 2:4 weights: change in such a step over their root mean square
    batch_tokens: int | None = Field(None, gt=0)  # of a step, whole samples; None: 2,048


class Recover(Stage, frozen=True):
    """Scales, norms and 2:4 weights trained on the original's hidden states or outputs; codes and zeros stay."""

    reference: str = "model"  # the name of the output that holds the original
    samples: int | None = Field(None, gt=0)  # None: as many as the recipe's calibration; more text beats more passes
    by_block: ByBlock | None = None
    passes: int = Field(1, ge=0)  # end to end; 0: block by block alone
    batch_size: int = Field(4, gt=0)  # samples a step, end to end
    learning_rate: float = Field(3e-3, gt=0)  # relative change of a scale in an early step of Adam

    def problems(self, header: Header) -> list[DscError]:
        """No pass, or no packed weight for one end to end: nothing to train."""
        if not self.passes and self.by_block is None:
            return [DscError("recover: nothing to do", "give by_block, or passes of 1 and more")]
        if not self.passes or any(info.encoding == "packed" for info in header.tensors.values()):
            return []
        fix = "put a compress stage with weights before it, or train 2:4 weights: passes: 0 and by_block"
        return [DscError("recover: the checkpoint has no packed weights, which passes end to end train", fix)]

    def reads(self) -> Sequence[str]:
        """Return the original."""
        return (self.reference,)

    def reads_text(self, header: Header) -> bool:
        """Return True, whatever the model."""
        return True

    def forecast(self, header: Header, samples: int, length: int) -> Forecast:
        """One block and its batch; end to end both models in float32, the codes, the largest gradient."""
        sizes = [info.elements for info in header.tensors.values()]
        whole, tokens = sum(sizes), (self.samples or samples) * length
        memory, works = 0, []
        if self.by_block is not None:
            memory, work = blockwise.cost(header, tokens, length, self.by_block.passes)
            works.append(work)
        if self.passes:
            memory = max(memory, 9 * whole + 4 * max(sizes))
            works.append(Work(8.0 * whole * self.passes * tokens))
        return Forecast(
            header,
            tensors=sum(info.encoding == "packed" for info in header.tensors.values()),
            bytes=header.bytes,
            memory=Memory(memory),
            work=total(works),
        )

    def run(self, source: Checkpoint, context: Context) -> Output:
        """Write the checkpoint with its trained scales and norms to `context.out`; finished blocks are kept."""
        if self.reference not in context.outputs:
            raise DscError(f"unknown output {self.reference!r}", f"valid names: {', '.join(context.outputs)}")
        original, work = open_checkpoint(context.outputs[self.reference]), context.out / WORK
        text = calibration_text(source, context, work, self.samples)
        knobs = self.model_dump(mode="json")
        Resumable.of(source, knobs, text.tokens, original, context.seed, device=context.device).claim(context.out, work)
        facts: dict[str, Any] = {}
        blocks = blockwise.Models(source, original, work, context.device)
        if self.by_block is not None:
            blockwise.check_trainable(source)
            schedule = blockwise.Schedule(**self.by_block.model_dump())
            facts["blocks"] = blockwise.recover_blocks(
                blocks, text.tokens, schedule, seed=context.seed, progress=context.progress
            )
        trained: Mapping[str, Quantized | Tensor] = blockwise.Found(blocks)
        if self.passes:
            trained, losses = self._end_to_end(source, original, trained, text.tokens, context)
            facts |= {"first_kl": losses[0], "last_kl": losses[-1], "steps": len(losses)}
        with CheckpointWriter(context.out, source, activations=source.activations) as writer:
            for name in source.header.tensors:
                if name in trained:
                    writer.add(name, trained[name].to("cpu"))
                else:
                    writer.add_raw(name, source.read_raw(name))
            manifest = provenance.build_manifest(
                stage="recover",
                source=source,
                recipe=context.recipe_text,
                seed=context.seed,
                knobs=knobs,
                inputs={"reference": original.path / "config.json"},
                extra={"calibration": text.facts, "facts": facts},
            )
            notes = writer.finish({}, manifest, source.config.get("quantization_config", {}).get("ignore", ()))
        remove_tree(work)
        return Output("checkpoint", context.out, {**facts, "notes": notes})

    def _end_to_end(
        self,
        source: Checkpoint,
        original: Checkpoint,
        found: Mapping[str, Quantized | Tensor],
        tokens: Tensor,
        context: Context,
    ) -> tuple[dict[str, Quantized | Tensor], list[float]]:
        """Trained scales and norms from what was `found` block by block, and the KL of each step."""
        loaded = Model.load(source, device=context.device)
        student = Model(loaded.family, loaded.cfg, loaded.weights)  # without the activation scheme: no gradient
        packed, norms = {}, {}
        for name in student.weights:
            start = found[name] if name in found else source.read_quantized(name)
            if isinstance(start, Quantized):
                packed[name] = start.to(context.device)
            elif loaded.family.role(name) is Role.NORM:
                norms[name] = source.read(name, device=context.device) if start is None else start.to(context.device)
        return recover(
            Model.load(original, device=context.device),
            student,
            packed,
            norms,
            tokens,
            passes=self.passes,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=context.seed,
            progress=context.progress,
        )
