"""One file for llama.cpp: 4-bit codes as they are where a type fits, scales and minima in FP16."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.errors import DscError
from deepseek_compress.export.target import Exported, Job, Target, sparsity, staged

GGUF = "model.gguf"


class Gguf(Target, frozen=True, extra="forbid"):
    """GGUF for llama.cpp; whatever it has no form for is refused."""

    name: ClassVar[str] = "gguf"

    def problems(self, header: Header) -> list[DscError]:
        """Everything that stands against a GGUF file of this checkpoint."""
        from deepseek_compress.export import gguf

        return gguf.problems(header)

    def write(self, source: Checkpoint, out: Path, job: Job) -> Exported:
        """Write tensor by tensor, and read back."""
        from deepseek_compress.export.gguf import export_gguf

        if sparsity(source):
            fix = "export compressed-tensors, or compress without sparsity"
            raise DscError("GGUF has no 2:4 weights, and its zeros would not be exact", fix)
        if source.activations:
            job.tell("8-bit activations are not part of a GGUF file: llama.cpp rounds inputs in its own way")
        with staged(out, GGUF) as folder:
            facts = export_gguf(source, folder / GGUF)
        if facts["recoded"]:
            kinds = "Q8_0, or BF16 where 32 does not divide the columns"
            job.tell(f"{facts['recoded']} packed tensors have no GGUF type that keeps their codes; written as {kinds}")
        if facts["left_out"]:
            job.tell(f"multi-token prediction is not part of a GGUF file: {facts['left_out']} tensors left out")
        return Exported("artifact", out / GGUF, {"target": self.name, "status": "read back", **facts})
