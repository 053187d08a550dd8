"""Calls the CUDA kernels one by one, past the operators: on a GPU, or on the CPU emulation with their traffic.

For tests and benchmarks; users call `cuda_ops.softmax`. The jobs of the other kernels are in `harness_weights`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cuda_ops import build

TYPES = {torch.int32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.uint8: 4}
KERNELS = {"automatic": 0, "naive": 1, "warp": 2, "block": 3, "online": 4}
MASK_DIMS = 4


class SoftmaxJob(ctypes.Structure):
    """`dsc::SoftmaxJob` of native/softmax.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "row_scale", "column_scale", "keep", "range")),
        *((name, ctypes.c_void_p) for name in ("out", "out_scale")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "column_scale_stride")),
        ("mask_stride", ctypes.c_int64 * MASK_DIMS),
        ("mask_size", ctypes.c_int32 * MASK_DIMS),
        ("rows_per_matrix", ctypes.c_int32),
        ("in_type", ctypes.c_int32),
        ("out_type", ctypes.c_int32),
    )


class Traffic(NamedTuple):
    """Global memory traffic of an emulated kernel."""

    read_bytes: int  # of the logits
    written_bytes: int  # of the output
    loads: int  # of the logits
    wide_loads: int  # of these, of 16 bytes


class Call(NamedTuple):
    """A job with the tensors its pointers point to."""

    job: SoftmaxJob
    logits: Tensor
    out: Tensor
    out_scale: Tensor
    inputs: list[Tensor]  # scales and masks


def prepare(
    logits: Tensor,  # (..., rows, columns), contiguous
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    mask: Tensor | None,  # bool, broadcastable to the logits; or int32 (rows, 2)
    out_dtype: torch.dtype,
) -> Call:
    """Fill in a job as native/softmax_arguments.h does. Outputs start as 0xff, so that a hole shows."""
    columns = logits.shape[-1]
    rows = logits.numel() // columns
    out = torch.full(logits.shape, 255, dtype=torch.uint8, device=logits.device)
    out = out.to(out_dtype) if out_dtype == torch.uint8 else torch.full_like(out, torch.nan, dtype=out_dtype)
    out_scale = torch.full((*logits.shape[:-1], 1), torch.nan, device=logits.device)
    job = SoftmaxJob(
        rows=rows,
        columns=columns,
        rows_per_matrix=logits.shape[-2] if logits.dim() > 1 else 1,
        in_type=TYPES[logits.dtype],
        out_type=TYPES[out_dtype],
        logits=logits.data_ptr(),
        out=out.data_ptr(),
    )
    if out_dtype == torch.uint8:
        job.out_scale = out_scale.data_ptr()
    inputs = [t for t in (row_scale, column_scale, mask) if t is not None]
    if row_scale is not None:
        job.row_scale = row_scale.data_ptr()
    if column_scale is not None:
        job.column_scale = column_scale.data_ptr()
        job.column_scale_stride = 0 if column_scale.numel() == columns else columns
    if mask is not None and mask.dtype == torch.int32:
        job.range = mask.data_ptr()
    elif mask is not None:
        expanded = mask.expand(logits.shape)
        leading = logits.dim() - 1
        job.keep = mask.data_ptr()
        job.mask_size[:] = [1] * (MASK_DIMS - leading) + list(logits.shape[:-1])
        job.mask_stride[:] = [0] * (MASK_DIMS - leading) + list(expanded.stride()[:-1])
    return Call(job, logits, out, out_scale, inputs)


@functools.cache
def emulation() -> ctypes.CDLL:
    """Return the kernels compiled for the CPU. Raises `build.BuildError`."""
    library = ctypes.CDLL(str(build.emulated_library()))
    library.dsc_emulated_error.restype = ctypes.c_char_p
    return library


def emulate_job(name: str, job: ctypes.Structure, kernel: int, order: int, tensors: Sequence[Tensor]) -> list[int]:
    """Run `dsc_NAME_emulated`, threads in `order` (0 ascending, 1 descending, else a seed).

    The kernel may touch `tensors` only; what it did with each is returned: bytes read, bytes written, loads, loads of
    16 bytes. Raises RuntimeError where it does what a GPU would not forgive, ValueError where it cannot take the job.
    """
    spans = (ctypes.c_uint64 * (2 * len(tensors)))()
    for i, tensor in enumerate(tensors):
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        spans[2 * i] = tensor.data_ptr()
        spans[2 * i + 1] = tensor.data_ptr() + extent * tensor.element_size()
    counts = (ctypes.c_int64 * (4 * len(tensors)))()
    run = getattr(emulation(), f"dsc_{name}_emulated")
    result = run(ctypes.byref(job), kernel, order, spans, len(tensors), counts)
    if result < 0:
        raise RuntimeError(emulation().dsc_emulated_error().decode())
    if result:
        raise ValueError(f"kernel {kernel} of {name} does not take this job")
    return list(counts)


@functools.cache
def cuda(capability: tuple[int, int]) -> ctypes.CDLL:
    """Return the kernels for a GPU of this capability. Raises `build.BuildError`."""
    return ctypes.CDLL(str(build.cuda_kernels(f"{capability[0]}{capability[1]}")))


def launch_job(name: str, job: ctypes.Structure, kernel: int, device: torch.device) -> None:
    """Launch `dsc_NAME_cuda` on the current stream of `device`."""
    library = cuda(torch.cuda.get_device_capability(device))
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    result = getattr(library, f"dsc_{name}_cuda")(ctypes.byref(job), kernel, stream)
    if result:
        raise ValueError(f"kernel {kernel} of {name}: error {result}")


def emulate(call: Call, kernel: str, order: int = 0) -> Traffic:
    """Run a softmax kernel on the emulation; see `emulate_job`."""
    tensors = [call.logits, call.out, call.out_scale, *call.inputs]
    counts = emulate_job("softmax", call.job, KERNELS[kernel], order, tensors)
    return Traffic(counts[0], counts[5], counts[2], counts[3])


def run_on_gpu(call: Call, kernel: str) -> None:
    """Launch a softmax kernel; see `launch_job`."""
    launch_job("softmax", call.job, KERNELS[kernel], call.logits.device)
