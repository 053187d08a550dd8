"""Write a checkpoint in a form that others run: ONNX, a TensorRT engine, GGUF, a packed or a plain checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.errors import DscError
from deepseek_compress.export import BATCH, COMPUTE_CAPABILITIES, GRAPHS, NAMES, NEW, PAST, Range
from deepseek_compress.stages.base import Context, Output, Stage

VERIFIED_TOKENS = 64  # of each calibration text


class Export(Stage, frozen=True, extra="forbid"):
    """ONNX files are run in onnxruntime beside the runtime before they count as written (`verify`).

    `precision` auto: float16 for TensorRT, else float32. `batch`, `new` (tokens of a call) and `past` (tokens in the
    cache) are the ranges of the engine's profile: least, usual, most. `accuracy_level` is that of MatMulNBits: 4 means
    8-bit activations, and a head that onnxruntime rounds to 8 bits at load; 0 float ones. `logits` last: of the last
    token of a call alone, which is what serving needs.
    """

    writes: ClassVar[str] = "artifact"
    target: str = "onnx"
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    compute_capabilities: tuple[str, ...] = COMPUTE_CAPABILITIES
    batch: Range = BATCH
    new: Range = NEW
    past: Range = PAST
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    embedding_bits: Literal[8, 16] = 16
    logits: Literal["all", "last"] = "all"
    verify: bool | None = None  # None: where the model is small enough to be held in FP32
    samples: int = Field(2, ge=0)  # calibration texts to verify with, besides random tokens

    @field_validator("target")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in NAMES:
            raise DscError(f"unknown target {name!r}", f"valid names: {', '.join(NAMES)}")
        return name

    def problems(self, header: Header) -> list[DscError]:
        """A model that has no graph, a builder that is not installed, ranges that do not rise."""
        found: list[DscError] = []
        if self.target in GRAPHS:
            found += _collect(lambda: _supported(header))
        if self.target.startswith("tensorrt"):
            found += _collect(self._builder)
        if self.target == "gguf":
            from deepseek_compress.export import gguf

            found += gguf.problems(header)
        return found

    def _builder(self) -> None:
        from deepseek_compress.export.tensorrt import check

        check(self.target, self.compute_capabilities, batch=self.batch, new=self.new, past=self.past)

    def run(self, source: Checkpoint, context: Context) -> Output:
        """Write into the stage's directory; facts go into the run record."""
        from deepseek_compress.export.targets import Settings, export
        from deepseek_compress.provenance import build_manifest

        manifest = build_manifest(
            stage="export",
            source=source,
            recipe=context.recipe_text,
            seed=context.seed,
            knobs=self.model_dump(mode="json"),
        )
        settings = Settings(
            target=self.target,
            precision=self.precision,
            compute_capabilities=self.compute_capabilities,
            batch=self.batch,
            new=self.new,
            past=self.past,
            accuracy_level=self.accuracy_level,
            embedding_bits=self.embedding_bits,
            last_only=self.logits == "last",
            verify=self.verify,
            prompts=self._prompts(source, context) if self.verify is not False and self.target in GRAPHS else (),
            manifest=manifest,
            tell=context.tell,
        )
        made = export(source, context.out, settings)
        if made.kind == "artifact":
            from deepseek_compress.checkpoint.files import write_json

            write_json(context.out / "dsc_manifest.json", manifest)
        return Output(made.kind, made.path, made.facts)

    def _prompts(self, source: Checkpoint, context: Context) -> list[list[int]]:
        """Calibration tokens to verify with; none where the model has no tokenizer or there is no text."""
        from deepseek_compress.calibration.tokens import read_windows
        from deepseek_compress.models.tokenizer import load_tokenizer

        if not self.samples:
            return []
        wanted = context.text.model_copy(update={"samples": self.samples, "length": VERIFIED_TOKENS})
        try:
            tokens = read_windows(wanted, load_tokenizer(source.path)).tokens
        except DscError as error:
            context.tell(f"verified with random tokens only: {error.what}")
            return []
        return [[int(token) for token in row] for row in tokens]


def _collect(check: Callable[[], None]) -> list[DscError]:
    try:
        check()
    except DscError as error:
        return [error]
    return []


def _supported(header: Header) -> None:
    from deepseek_compress.export.onnx import check_supported
    from deepseek_compress.models import Architecture

    check_supported(Architecture.of(header).cfg)
