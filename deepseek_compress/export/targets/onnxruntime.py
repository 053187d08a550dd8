"""onnxruntime's own operators: MatMulNBits, routed experts, 8-bit embedding."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from deepseek_compress.export.targets.graph import GraphTarget, Logits


class OnnxRuntime(GraphTarget, frozen=True, extra="forbid"):
    """`accuracy_level` of MatMulNBits 4: 8-bit activations, and a head that is rounded to 8 bits at load; 0: floats.

    `embedding_bits` 8: embedding and head in 8-bit codes. `logits` last: of the last token of a call alone.
    """

    name: ClassVar[str] = "onnxruntime"
    lowering: ClassVar[str] = "matmulnbits"
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    embedding_bits: Literal[8, 16] = 16
    logits: Logits = "all"

    def options(self) -> dict[str, Any]:
        """Those of every graph, and onnxruntime's."""
        return {**super().options(), "accuracy_level": self.accuracy_level, "embedding_bits": self.embedding_bits}
