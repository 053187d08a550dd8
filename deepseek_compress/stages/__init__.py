"""The stages a recipe may name. Each is imported when a recipe asks for it: some need torch, which takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek_compress.registry import Entry

if TYPE_CHECKING:
    from deepseek_compress.stages.base import Stage


STAGES: dict[str, Entry] = {
    "distill": Entry("distill", "Distill", "a smaller student learns from the teacher"),
    "traces": Entry("traces", "Traces", "solutions a teacher writes and a verifier finds right, to train on"),
    "record": Entry("record", "Record", "what a teacher says of a text, kept on disk for distill"),
    "compress": Entry("compress", "Compress", "2:4 sparsity, low-bit weights, 8-bit activations, in one pass"),
    "allocate": Entry(
        "allocate", "Allocate", "bits for each unit by measured KL under a size, as a recipe to compress by"
    ),
    "recover": Entry(
        "recover", "Recover", "scales and norms of a packed model, trained by block, then by the KL of all"
    ),
    "calibrate": Entry("calibrate", "Calibrate", "statistics of each linear's input, to quantise with; coverage"),
    "export": Entry("export", "Export", "compressed-tensors, BF16, ONNX, TensorRT engine, GGUF"),
    "evaluate": Entry("evaluate", "Evaluate", "what was lost and gained against a reference, as a report"),
}


def load(kind: str) -> type[Stage]:
    """Return the class of a stage; `kind` is a key of `STAGES`."""
    stage: type[Stage] = STAGES[kind].load(__name__)
    return stage
