"""What the targets that write an ONNX file share: the graph, its check, and the words beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.errors import DscError
from deepseek_compress.export.target import RAN, WRITTEN, Exported, Job, Target, collected, copy_words, sparsity, staged
from deepseek_compress.models import Architecture

ONNX = "model.onnx"
VERIFIED_BYTES = 2 << 30  # an export streams; comparing needs the whole model in memory
Logits = Literal["all", "last"]


class GraphTarget(Target, frozen=True, extra="forbid"):
    """`verify` runs the file beside the runtime (None: where the model in FP32 fits into 2 GiB), on `samples` texts.

    `precision` auto: float16 for TensorRT, else float32.
    """

    lowering: ClassVar[str]
    loads: ClassVar[str] = ONNX  # the file without which nothing opens the output
    same_bytes: ClassVar[frozenset[str]] = frozenset({"verify", "samples"})
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    verify: bool | None = None
    samples: int = Field(2, ge=0)

    def problems(self, header: Header) -> list[DscError]:
        """A model whose blocks have no emitter."""
        return collected(lambda: _supported(header))

    def dtype(self) -> str:
        """The float type of the graph."""
        return "float32" if self.precision == "auto" else self.precision

    def options(self) -> dict[str, Any]:
        """Knobs of `export_onnx`."""
        return {"last_only": getattr(self, "logits", "all") == "last"}

    def write(self, source: Checkpoint, out: Path, job: Job) -> Exported:
        """Graph, check, words; a target with more to write adds it in `finish`."""
        from deepseek_compress.export.onnx import export_onnx

        dtype = self.dtype()
        with staged(out, self.loads) as folder:
            facts: dict[str, Any] = {"target": self.name, "lowering": self.lowering, "precision": dtype}
            facts |= export_onnx(source, folder / ONNX, self.lowering, dtype=dtype, **self.options())
            facts |= {"status": WRITTEN, "sparsity": sparsity(source)}
            if dtype != "bfloat16" and self._to_verify(source, job):
                facts |= {"verification": self._verified(source, folder / ONNX, job), "status": RAN}
            copy_words(source, folder)
            facts |= self.finish(source, folder, facts, job)
        return Exported("artifact", out / self.loads, facts)

    def finish(self, source: Checkpoint, folder: Path, facts: Mapping[str, Any], job: Job) -> dict[str, Any]:
        """Write what else belongs into the folder; returns more facts."""
        return {}

    def _to_verify(self, source: Checkpoint, job: Job) -> bool:
        if self.verify is not None:
            return self.verify
        size = 4 * sum(info.elements for info in source.header.tensors.values())
        if size > VERIFIED_BYTES:
            job.tell(f"not compared with the runtime: that takes {size / 1e9:.1f} GB (verify: true does it)")
        return size <= VERIFIED_BYTES

    def _verified(self, source: Checkpoint, path: Path, job: Job) -> dict[str, Any]:
        """Compare with the runtime; raise `DscError` where the file is not what the checkpoint computes."""
        from deepseek_compress.export.verify import random_prompts, verify

        vocabulary = Architecture.of(source).cfg.vocab_size
        prompts = job.texts(self.samples) or random_prompts(vocabulary, (7, 32))
        found = verify(path, source, prompts, dtype=self.dtype(), device=job.device)
        job.tell(f"{path.name} in onnxruntime: {found}")
        if not found.holds:
            fix = "report it with the model's configuration; `--set verify=false` writes the file all the same"
            raise DscError(f"{path.name} differs from the runtime, most in {found.differs}: {found}", fix)
        return found.facts()


def _supported(header: Header) -> None:
    from deepseek_compress.export.onnx import check_supported

    check_supported(Architecture.of(header).cfg)
