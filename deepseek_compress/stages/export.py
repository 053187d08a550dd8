"""Write a checkpoint in a form that others run: ONNX, a TensorRT engine, GGUF, a packed or a plain checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import SerializeAsAny, model_serializer, model_validator

from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.errors import DscError
from deepseek_compress.export import TARGETS, load
from deepseek_compress.export.target import Job, Target
from deepseek_compress.registry import pick
from deepseek_compress.stages.base import Context, Output, Stage

VERIFIED_TOKENS = 64  # of each calibration text
DEFAULT = "onnx"


class Export(Stage, frozen=True, extra="forbid"):
    """`{target: NAME, knob: value, ...}`, the knobs being the target's own."""

    writes: ClassVar[str] = "artifact"
    tag: ClassVar[str | None] = "target"
    target: SerializeAsAny[Target]

    @model_validator(mode="before")
    @classmethod
    def _pick(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or isinstance(given.get("target"), Target):
            return given
        knobs = {key: value for key, value in given.items() if key != "target"}
        name = given.get("target", DEFAULT)
        if isinstance(name, Mapping) and len(name) == 1:  # {onnxruntime: {accuracy_level: 0}}
            name, inner = next(iter(name.items()))
            knobs |= inner or {}
        known = {name: load(name)} if name in TARGETS else dict.fromkeys(TARGETS, Target)
        return {"target": pick(known, {str(name): knobs}, "target")}

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        return {"target": self.target.name, **self.target.model_dump(mode="json")}

    @property
    def same_bytes(self) -> frozenset[str]:
        """Knobs that change nothing in what is written."""
        return self.target.same_bytes

    def problems(self, header: Header) -> list[DscError]:
        """Those of the target."""
        return self.target.problems(header)

    def run(self, source: Checkpoint, context: Context) -> Output:
        """Write into the stage's directory; facts go into the run record."""
        from deepseek_compress.provenance import build_manifest

        manifest = build_manifest(
            stage="export", source=source, recipe=context.recipe_text, seed=context.seed, knobs=self.model_dump()
        )
        job = Job(
            manifest,
            context.tell,
            lambda count: _texts(source, context, count),
            context.memory,
            context.workers,
            context.progress,
            context.device,
        )
        made = self.target.write(source, context.out, job)
        if made.kind == "artifact":
            from deepseek_compress.checkpoint.files import write_sealed
            from deepseek_compress.checkpoint.verified import MANIFEST

            write_sealed(context.out / MANIFEST, manifest)
        return Output(made.kind, made.path, made.facts)


def _texts(source: Checkpoint, context: Context, count: int) -> list[list[int]]:
    """Calibration tokens to verify with, of unequal lengths; none where there is no tokenizer or no text."""
    from deepseek_compress.calibration.tokens import read_windows
    from deepseek_compress.models.tokenizer import load_tokenizer

    if not count:
        return []
    wanted = context.text.model_copy(update={"samples": count, "length": VERIFIED_TOKENS})
    try:
        tokens = read_windows(wanted, load_tokenizer(source.path)).tokens
    except DscError as error:
        context.tell(f"verified with random tokens only: {error.what}")
        return []
    return [[int(token) for token in row[: len(row) - 7 * place]] for place, row in enumerate(tokens[:8])]
