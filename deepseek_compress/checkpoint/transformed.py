"""A checkpoint as it would be with some of its tensors changed; the changes are made whenever one is read.

Nothing is written: whoever streams tensors through memory (the block loop, the writer) sees the changed ones. They are
stored as 16-bit values, or wider where the source is plain and wider.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deepseek_compress.checkpoint.header import module_of
from deepseek_compress.checkpoint.reader import Checkpoint
from deepseek_compress.numerics.types import Quantized

Change = Callable[[Tensor], Tensor]  # float32 -> float32 of the same shape; sent to other processes


@dataclass(frozen=True)
class Transformed(Checkpoint):
    """`source` with `changes` by tensor name."""

    source: Checkpoint
    changes: Mapping[str, Change] = field(default_factory=dict)

    def read(self, name: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """The changed tensor, computed in float32 and rounded once to `dtype`; None: to the type it is stored in."""
        if name not in self.changes:
            return self.source.read(name, dtype)
        info = self.source.header.tensors[name]
        stored = info.dtype if info.encoding == "plain" else torch.bfloat16
        return self.changes[name](self.source.read(name)).to(dtype or stored)

    def read_raw(self, name: str) -> dict[str, Tensor]:
        """The stored parts; of a changed tensor, its 16-bit values."""
        return {module_of(name)[1]: self.read(name, None)} if name in self.changes else self.source.read_raw(name)

    def read_quantized(self, name: str) -> Quantized | None:
        """None for changed tensors."""
        return None if name in self.changes else self.source.read_quantized(name)


def transformed(source: Checkpoint, changes: Mapping[str, Change]) -> Checkpoint:
    """`source` with `changes`; `source` itself where there are none."""
    if not changes:
        return source
    tensors = {
        name: replace(info, encoding="transformed") if name in changes else info
        for name, info in source.header.tensors.items()
    }
    return Transformed(replace(source.header, tensors=tensors), source, changes)
