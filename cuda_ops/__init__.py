"""Our own kernels, each with a slow reference: packing of 4-bit weights, the loops of GPTQ, softmax.

    from cuda_ops import pack_weights, softmax

Importing this package costs nothing: torch is imported, and native code compiled (once, see `build`), at the first
call. Where it cannot be compiled the reference runs instead and says so once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cuda_ops.ops import (
        Packed,
        WeightError,
        instructions,
        limited_to,
        load,
        pack_weights,
        round_columns,
        search_grid,
        softmax,
        unrounded,
    )

__all__ = [
    "Packed",
    "WeightError",
    "instructions",
    "limited_to",
    "load",
    "pack_weights",
    "round_columns",
    "search_grid",
    "softmax",
    "unrounded",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cuda_ops import ops

    return getattr(ops, name)
