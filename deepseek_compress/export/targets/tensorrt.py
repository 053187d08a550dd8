"""The graph in TensorRT's types, its engine, and what the engine's plan says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.checkpoint.owned import announce
from deepseek_compress.errors import DscError, raise_problems
from deepseek_compress.export import BATCH, COMPUTE_CAPABILITIES, NEW, PAST, Range
from deepseek_compress.export.target import Job, collected
from deepseek_compress.export.targets.graph import ONNX, GraphTarget, Logits

ENGINE, TIMING = "model.engine", "timing.cache"


class TensorRt(GraphTarget, frozen=True, extra="forbid"):
    """`batch`, `new` (tokens of a call) and `past` (tokens in the cache): least, usual, most of the engine's profile.

    `logits` last: of the last token of a call alone, which is what serving needs.
    """

    name: ClassVar[str] = "tensorrt"
    lowering: ClassVar[str] = "tensorrt"
    loads: ClassVar[str] = ENGINE
    batch: Range = BATCH
    new: Range = NEW
    past: Range = PAST
    logits: Logits = "all"

    @property
    def capabilities(self) -> tuple[str, ...]:
        """GPU generations that the engine is built for."""
        return ("current",)

    def problems(self, header: Header) -> list[DscError]:
        """Return a builder that is not installed, ranges that do not rise."""
        return [*super().problems(header), *collected(self._check)]

    def _check(self) -> None:
        from deepseek_compress.export.tensorrt import check

        check(self.name, self.capabilities, batch=self.batch, new=self.new, past=self.past)

    def dtype(self) -> str:
        """FP16 where none is asked for."""
        return "float16" if self.precision == "auto" else self.precision

    def finish(self, source: Checkpoint, folder: Path, facts: Mapping[str, Any], job: Job) -> dict[str, Any]:
        """Build the engine, and read its plan where that can be done."""
        from deepseek_compress.export.tensorrt import build_engine

        job.tell(f"building an engine for {', '.join(self.capabilities)}")
        ranges = {"batch": self.batch, "new": self.new, "past": self.past}
        cache = folder.parent / TIMING if self.name == "tensorrt" else None
        if cache is not None:
            announce(folder.parent, [TIMING])
        built = build_engine(
            folder / ONNX, folder / ENGINE, target=self.name, compute_capabilities=self.capabilities,
            timing_cache=cache, **ranges,
        )  # fmt: skip
        return {"onnx_bytes": facts["bytes"], **built, **self.plan(folder, str(built["version"]))}

    def plan(self, folder: Path, version: str) -> dict[str, Any]:
        """Return facts about the plan that `version` built; raises for one that is not what the graph says."""
        return {}


class TensorRtRtx(TensorRt, frozen=True, extra="forbid"):
    """Built without a GPU, for several `compute_capabilities` at once; the other knobs as those of tensorrt."""

    name: ClassVar[str] = "tensorrt-rtx"
    compute_capabilities: tuple[str, ...] = COMPUTE_CAPABILITIES

    @property
    def capabilities(self) -> tuple[str, ...]:
        """GPU generations that the engine is built for."""
        return self.compute_capabilities

    def plan(self, folder: Path, version: str) -> dict[str, Any]:
        """Check that 4-bit weights are kept, 8-bit products in integers; report a version whose plans are unknown."""
        import onnx

        from deepseek_compress.export import plan

        if version != plan.KNOWN and not version.startswith(f"{plan.KNOWN}."):
            return {"plan": None, "plan_not_read": f"TensorRT-RTX {version}: plans are read of {plan.KNOWN} alone"}
        found = plan.read_plan(folder / ENGINE)
        wanted = plan.expected(onnx.load(str(folder / ONNX), load_external_data=False))
        raise_problems(plan.check_plan(found, wanted))
        return {"plan": found.facts()}
