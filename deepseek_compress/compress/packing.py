"""Four-bit round-to-nearest in one pass: from the stored BF16, FP8 or MXFP4 straight to the packed codes.

The native kernel gives the bits that `numerics.rtn` gives on the decoded weight, which is never made. What rounding
cost is measured on a sample: the first rows of each weight, of routed experts every sixteenth, since the decoding that
a measurement needs takes longer than the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cuda_ops import ops
from deepseek_compress.checkpoint.formats import fp8, mxfp4, packed
from deepseek_compress.checkpoint.header import TensorInfo
from deepseek_compress.compress.job import Job
from deepseek_compress.compress.solver import LinearSolver, measure, packed_bits
from deepseek_compress.errors import DscError
from deepseek_compress.models import Block, Linear
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Statistics

MEASURED_ROWS = 16
MEASURED_EXPERTS = 16  # one of so many


def rounding(job: Job, block: Block, linear: Linear) -> Rtn | None:
    """Return the linear's rounding, if the native kernel supports it from the stored encoding."""
    solver = job.solver
    encoding = _info(job, block, linear).encoding
    if not isinstance(solver, LinearSolver) or encoding not in ("plain", "fp8_block", "mxfp4"):
        return None
    weights = solver.quantizer(block, linear, _fallback(job))
    if solver.sparsity is not None or not isinstance(weights, Rtn):
        return None
    return weights if weights.num_bits == 4 and not weights.mse and weights.group_size else None


def pack(job: Job, block: Block, linear: Linear, how: Rtn) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return stored parts of the new weight, and the facts about it."""
    info = _info(job, block, linear)
    weight, scale, size = _stored(job, info)
    assert how.group_size is not None
    try:
        new = ops.pack_weights(
            weight, scale, group_size=how.group_size, symmetric=how.symmetric, block=size, name=info.name
        )
    except ops.WeightError as error:
        raise DscError(error.what, error.fix) from None
    parts = {"weight_packed": new.packed, "weight_scale": new.scale}
    if new.zero_point is not None:
        parts["weight_zero_point"] = new.zero_point
    parts["weight_shape"] = torch.tensor(info.shape, dtype=torch.int64)
    facts = {
        "name": info.name.removesuffix(".weight"),
        "role": str(linear.role),
        "method": "rtn",
        "tokens": 0,
        "fallback": _fallback(job),
        "bits": packed_bits(4, how.group_size, how.symmetric),
        "weights": info.elements,
    }
    if linear.expert is None or linear.expert % MEASURED_EXPERTS == 0:
        facts |= _measured(info, weight, scale, size, parts)
    else:
        facts |= {"weight_error": None, "output_error": None, "zeros": None}
    return parts, facts


def _fallback(job: Job) -> bool:
    """Whether the method asks for statistics, and there are none."""
    return bool(job.solver.needs) and job.statistics is None


def _info(job: Job, block: Block, linear: Linear) -> TensorInfo:
    return job.source.header.tensors[f"{block.prefix}{linear.name}.weight"]


def _stored(job: Job, info: TensorInfo) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """Weight and scale as they are stored, and the rows and columns of an FP8 block."""
    raw = job.source.read_raw(info.name)
    if info.encoding == "mxfp4":
        return *mxfp4.main_parts(raw), (1, mxfp4.GROUP)
    weight = raw.pop("weight")
    if info.encoding == "plain":
        return weight, None, (1, 1)
    return weight, fp8.finite_scale(next(iter(raw.values())), info.name), fp8.block_of(info.name, job.source.config)


def _measured(
    info: TensorInfo,
    weight: Tensor,
    scale: Tensor | None,
    block: tuple[int, int],
    parts: dict[str, Tensor],
) -> dict[str, Any]:
    """Return the error over the first rows."""
    rows = min(MEASURED_ROWS, info.shape[0])
    words = -(-rows // 8)
    few = {key: part[: words if key == "weight_zero_point" else rows] for key, part in parts.items()}
    new = packed.unpack_weight(info.name, {**few, "weight_shape": torch.tensor([rows, info.shape[1]])})
    if scale is None:
        old = weight[:rows].float()
    elif info.encoding == "mxfp4":
        old = mxfp4.decode_mxfp4(weight[:rows], scale[:rows], torch.float32, info.name)
    else:
        old = fp8.decode_fp8_block(weight[:rows], scale[: -(-rows // block[0])], block, torch.float32, info.name)
    found = measure(old, new, Statistics())
    return {key: found[key] for key in ("weight_error", "output_error", "zeros")}
