"""A checkpoint as it would be with some of its tensors changed; the changes are made whenever one is read.

Nothing is written: whoever streams tensors through memory (the block loop, the writer) sees the changed ones. They are
stored as 16-bit values, or wider where the source is plain and wider.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deepseek_compress.checkpoint.header import Header, TensorInfo, module_of
from deepseek_compress.checkpoint.reader import Checkpoint
from deepseek_compress.numerics.types import Quantized

Change = Callable[[Tensor], Tensor]  # float32 -> float32 of the same shape; sent to other processes


@dataclass(frozen=True)
class Transformed(Checkpoint):
    """`source` with `changes` by tensor name; `header` is that of the outcome.

    `origins`: tensors that the source does not have, by the name of the one each is made of.
    """

    source: Checkpoint
    changes: Mapping[str, Change] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    def read(self, name: str, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Return the changed tensor, computed in float32 and rounded once to `dtype`; None: to the type it is stored
        in."""
        if name not in self.changes:
            return self.source.read(name, dtype, device)
        made = self.changes[name](self.source.read(self.origins.get(name, name)))
        return made.to(dtype or self.header.tensors[name].dtype).to(device)

    def read_raw(self, name: str) -> dict[str, Tensor]:
        """Return the stored parts; of a changed tensor, its 16-bit values."""
        return {module_of(name)[1]: self.read(name, None)} if name in self.changes else self.source.read_raw(name)

    def read_quantized(self, name: str) -> Quantized | None:
        """None for changed tensors."""
        return None if name in self.changes else self.source.read_quantized(name)


def transformed(
    source: Checkpoint,
    changes: Mapping[str, Change],
    header: Header | None = None,
    origins: Mapping[str, str] | None = None,
) -> Transformed:
    """`source` with `changes`. `header`: that of the outcome, where more than its values differs."""
    known = header or source.header
    tensors = {name: _changed(info) if name in changes else info for name, info in known.tensors.items()}
    return Transformed(replace(known, tensors=tensors), source, changes, origins or {})


def _changed(info: TensorInfo) -> TensorInfo:
    stored = info.dtype if info.encoding in ("plain", "transformed") else torch.bfloat16
    return replace(info, encoding="transformed", dtype=stored)
