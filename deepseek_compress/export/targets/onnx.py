"""Standard operators only: UINT4 weights with zero points in DequantizeLinear."""

from __future__ import annotations

from typing import ClassVar

from deepseek_compress.export.targets.graph import GraphTarget, Logits


class Onnx(GraphTarget, frozen=True, extra="forbid"):
    """`logits` last: of the last token of a call alone, which is what serving needs."""

    name: ClassVar[str] = "onnx"
    lowering: ClassVar[str] = "standard"
    logits: Logits = "all"
