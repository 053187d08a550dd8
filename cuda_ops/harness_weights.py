"""Jobs of the CUDA kernels that make 4-bit weights, past the operators, for tests and benchmarks; see `harness`.

Each function takes what the operator takes, and gives the same from one kernel that is named.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cuda_ops import harness, ops

PACK = {"automatic": 0, "naive": 1, "warp": 2, "block": 3}
GPTQ = {"automatic": 0, "naive": 1, "tile": 2}
POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _fields(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for name in names.split())


class PackJob(ctypes.Structure):
    """`dsc::PackJob` of native/pack.h, field by field."""

    _fields_ = (
        *_fields(POINTER, "weight block_scale exponent"),
        *_fields(INT, "encoding rows columns block_rows block_columns group_size"),
        ("symmetric", ctypes.c_bool),
        *_fields(POINTER, "packed scale zero_point bad"),
    )


class SearchJob(ctypes.Structure):
    """`dsc::SearchJob` of native/gptq.h, field by field."""

    _fields_ = (
        *_fields(POINTER, "groups importance shrink"),
        *_fields(INT, "count size rows steps num_bits"),
        ("symmetric", ctypes.c_bool),
        *_fields(POINTER, "scale zero_point"),
    )


class FeedJob(ctypes.Structure):
    """`dsc::FeedJob` of native/gptq.h, field by field."""

    _fields_ = (
        *_fields(POINTER, "base target feedback"),
        *_fields(INT, "matrices columns rows base_step target_step feedback_step"),
    )


class RoundJob(FeedJob):
    """`dsc::RoundJob` of native/gptq.h, field by field."""

    _fields_ = (
        *_fields(POINTER, "scale zero_point group fixed codes residual"),
        *_fields(INT, "scale_step zero_point_step group_step fixed_step codes_step residual_step"),
        ("top", FLOAT),
    )


class UnroundedJob(FeedJob):
    """`dsc::UnroundedJob` of native/gptq.h, field by field."""

    _fields_ = (("values", POINTER), ("values_step", INT))


class Call(NamedTuple):
    """A job, the tensors its pointers point to, and those of them that it fills: a hole in these shows."""

    name: str
    job: ctypes.Structure
    inputs: list[Tensor]
    outputs: list[Tensor]

    def emulate(self, kernel: int, order: int = 0) -> list[int]:
        """Bytes read, bytes written, loads, loads of 16 bytes for each input, then for each output."""
        return harness.emulate_job(self.name, self.job, kernel, order, [*self.inputs, *self.outputs])

    def launch(self, kernel: int) -> None:
        """On the current stream of the GPU that holds the tensors."""
        harness.launch_job(self.name, self.job, kernel, self.outputs[0].device)


def _call(name: str, job: ctypes.Structure, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Call:
    return Call(name, job, [tensor for tensor in inputs if tensor is not None], list(outputs))


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def pack(
    weight: Tensor,  # as `ops.pack_weights` takes it; MXFP4 as uint8
    scale: Tensor | None,  # float32 of blocks, or uint8 exponents
    group_size: int,
    symmetric: bool = False,
    block: tuple[int, int] = (128, 128),
) -> Call:
    """Return outputs: packed, scale, zero points, first bad row (-1 before and after a good run)."""
    rows, columns = weight.shape
    encoding = ops.PLAIN.get(weight.dtype, ops.FP8_BLOCK if weight.dtype == torch.float8_e4m3fn else ops.MXFP4)
    columns *= 2 if encoding == ops.MXFP4 else 1
    groups, device = columns // group_size, weight.device
    outputs = [
        torch.full((rows, -(-columns // 8)), -1, dtype=torch.int32, device=device),
        torch.full((rows, groups), torch.nan, dtype=torch.bfloat16, device=device),
        torch.full((-(-rows // 8), groups), -1, dtype=torch.int32, device=device),
        torch.full((1,), -1, dtype=torch.int64, device=device),
    ]
    job = PackJob(
        weight=_at(weight),
        block_scale=_at(scale) if encoding == ops.FP8_BLOCK else None,
        exponent=_at(scale) if encoding == ops.MXFP4 else None,
        encoding=encoding,
        rows=rows,
        columns=columns,
        block_rows=block[0],
        block_columns=block[1],
        group_size=group_size,
        symmetric=symmetric,
        **dict(zip(("packed", "scale", "zero_point", "bad"), map(_at, outputs), strict=True)),
    )
    return _call("pack", job, [weight, scale], outputs)


def search(groups: Tensor, importance: Tensor | None, shrink: Tensor, num_bits: int, symmetric: bool) -> Call:
    """Return outputs: scale and zero point."""
    count, size, rows = groups.shape
    outputs = [groups.new_full((count, rows), torch.nan) for _ in range(2)]
    job = SearchJob(
        groups=_at(groups),
        importance=_at(importance),
        shrink=_at(shrink),
        count=count,
        size=size,
        rows=rows,
        steps=len(shrink),
        num_bits=num_bits,
        symmetric=symmetric,
        scale=_at(outputs[0]),
        zero_point=_at(outputs[1]),
    )
    return _call("search", job, [groups, importance, shrink], outputs)


def _feed(base: Tensor, target: Tensor, feedback: Tensor) -> dict[str, Any]:
    """Each (matrices, ...), each matrix contiguous."""
    parts = {"base": base, "target": target, "feedback": feedback}
    pointers = {name: _at(tensor) for name, tensor in parts.items()}
    steps = {f"{name}_step": tensor.stride(0) for name, tensor in parts.items()}
    return {"matrices": len(base), "columns": base.shape[1], "rows": base.shape[2], **pointers, **steps}


def rounding(
    base: Tensor,
    target: Tensor,
    feedback: Tensor,
    grid: tuple[Tensor, Tensor, int],
    group: Tensor,
    fixed: Tensor | None,
    codes: Tensor,
    residual: Tensor,
) -> Call:
    """As `ops.round_columns`, each tensor with its leading dimension. Outputs: codes and residual."""
    own = {
        "scale": grid[0],
        "zero_point": grid[1],
        "group": group,
        "fixed": fixed,
        "codes": codes,
        "residual": residual,
    }
    pointers = {name: _at(tensor) for name, tensor in own.items()}
    steps = {f"{name}_step": 0 if tensor is None else tensor.stride(0) for name, tensor in own.items()}
    job = RoundJob(top=grid[2], **_feed(base, target, feedback), **pointers, **steps)
    return _call("round", job, [base, target, feedback, *grid[:2], group, fixed], [codes, residual])


def unrounded(base: Tensor, target: Tensor, feedback: Tensor) -> Call:
    """As `ops.unrounded`, each tensor with its leading dimension. Output: the values."""
    values = torch.full_like(base, torch.nan, memory_format=torch.contiguous_format)
    job = UnroundedJob(values=_at(values), values_step=values[0].numel(), **_feed(base, target, feedback))
    return _call("unrounded", job, [base, target, feedback], [values])
