"""Base of the targets that write an ONNX file: the graph, its check, and its description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from deepseek_compress import machine
from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.checkpoint.files import remove_tree
from deepseek_compress.errors import DscError
from deepseek_compress.export.target import (
    RAN,
    WRITTEN,
    Exported,
    Job,
    Target,
    collected,
    copy_words,
    sparsity,
    staged,
    words,
)
from deepseek_compress.models import Architecture
from deepseek_compress.planning.costs import useful

if TYPE_CHECKING:
    from deepseek_compress.export.verify import Agreement

ONNX = "model.onnx"
RESIDENT = 2 << 30  # bytes in FP32: a larger model is compared block by block, as it is written
CHECK = "check"  # directory of a comparison block by block
Logits = Literal["all", "last"]


class GraphTarget(Target, frozen=True, extra="forbid"):
    """`verify` compares the file with the runtime on `samples` texts, block by block where the model takes much memory.

    None: unless a block takes more than there is.

    `precision` auto: float16 for TensorRT, else float32.
    """

    lowering: ClassVar[str]
    loads: ClassVar[str] = ONNX  # the file without which nothing opens the output
    same_bytes: ClassVar[frozenset[str]] = frozenset({"verify", "samples"})
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    verify: bool | None = None
    samples: int = Field(2, ge=0)

    def problems(self, header: Header) -> list[DscError]:
        """Refuse a model whose blocks have no emitter."""
        return collected(lambda: _supported(header, self.lowering))

    def dtype(self) -> str:
        """Return the float type of the graph."""
        return "float32" if self.precision == "auto" else self.precision

    def options(self) -> dict[str, Any]:
        """Knobs of `export_onnx`."""
        return {"last_only": getattr(self, "logits", "all") == "last"}

    def write(self, source: Checkpoint, out: Path, job: Job) -> Exported:
        """Graph, check, words; a target with more to write adds it in `finish`."""
        from deepseek_compress.export.onnx import export_onnx

        dtype = self.dtype()
        with staged(out, self.loads, [ONNX, *words(source)]) as folder:
            facts: dict[str, Any] = {"target": self.name, "lowering": self.lowering, "precision": dtype}
            facts |= export_onnx(source, folder / ONNX, self.lowering, dtype=dtype, **self.options())
            facts |= {
                "status": WRITTEN,
                "sparsity": sparsity(source),
                "cache_bytes_per_token": cache_bytes(source, dtype),
            }
            found = None if dtype == "bfloat16" else self._verified(source, folder / ONNX, job)
            facts |= {"verification": found, "status": RAN} if found else {}
            copy_words(source, folder)
            facts |= self.finish(source, folder, facts, job)
        return Exported("artifact", out / self.loads, facts)

    def finish(self, source: Checkpoint, folder: Path, facts: Mapping[str, Any], job: Job) -> dict[str, Any]:
        """Write what else belongs into the folder; returns more facts."""
        return {}

    def _verified(self, source: Checkpoint, path: Path, job: Job) -> dict[str, Any] | None:
        """Compare with the runtime; raise `DscError` where the file is not what the checkpoint computes."""
        if self.verify is False:
            return None
        found = self._compared(source, path, job)
        if found is None:
            return None
        job.tell(f"{path.name} in onnxruntime: {found}")
        if not found.holds:
            fix = "report it with the model's configuration; `--set verify=false` writes the file all the same"
            raise DscError(f"{path.name} differs from the runtime, most in {found.differs}: {found}", fix)
        return found.facts()

    def _compared(self, source: Checkpoint, path: Path, job: Job) -> Agreement | None:
        """In memory, or block by block; None where no block fits, which is reported."""
        from deepseek_compress.evaluation.streamed import WHOLE, room
        from deepseek_compress.export.verify import random_prompts, verify

        prompts = job.texts(self.samples) or random_prompts(Architecture.of(source).cfg.vocab_size, (7, 32))
        size = 4 * sum(info.elements for info in source.header.tensors.values())
        most = room(job.memory)
        if size <= RESIDENT and (most is None or 2 * size + WHOLE <= most):  # onnxruntime may have the weights in FP32
            return verify(path, source, prompts, dtype=self.dtype(), device=job.device)
        return self._streamed(source, path, prompts, job)

    def _streamed(self, source: Checkpoint, path: Path, prompts: Sequence[Sequence[int]], job: Job) -> Agreement | None:
        from deepseek_compress.evaluation.streamed import room
        from deepseek_compress.export.verify_streamed import Limits, needed, verify_streamed

        cost, limit = needed(path, source, prompts, self.dtype()), room(job.memory)
        if limit is not None and cost.peak() > limit:
            what = f"comparing a block with the runtime takes {cost.peak() / 1e9:.1f} GB of {limit / 1e9:.1f}"
            if self.verify:
                raise DscError(what, "give more --memory, or leave `verify` out")
            job.tell(f"not compared with the runtime: {what}")
            return None
        count = cost.workers(job.workers, useful(machine.cores(), source.header.bytes), limit)
        job.tell("compared with the runtime block by block")
        try:
            limits = Limits(count, job.progress)
            return verify_streamed(path, source, prompts, path.parent / CHECK, limits, self.dtype())
        finally:
            remove_tree(path.parent / CHECK)


def cache_bytes(source: Checkpoint, dtype: str) -> int:
    """Return the bytes of a token in all caches: latents and rotated keys, or keys and values of every head.

    An indexer's keys with them; of DeepSeek-V4 its share of the entries, without the window.
    """
    cfg, size = Architecture.of(source).cfg, 4 if dtype == "float32" else 2
    index = cfg.indexer.head_dim if cfg.indexer else 0
    if (kinds := cfg.compressed) is not None:
        pairs = zip(kinds.rates, kinds.overlapping, strict=True)
        return round(sum(size * (cfg.head_dim + index * both) / rate for rate, both in pairs if rate))
    width = 2 * cfg.num_key_value_heads * cfg.head_dim if cfg.mla is None else cfg.mla.kv_lora_rank + cfg.mla.rope
    return cfg.num_hidden_layers * (width + index) * size


def _supported(header: Header, lowering: str) -> None:
    from deepseek_compress.export.onnx import check_supported

    check_supported(Architecture.of(header).cfg, lowering)
