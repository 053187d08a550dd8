"""The operators `torch.ops.deepseek_compress.*`: their schemas, which implementation is loaded, and a typed face.

The schemas and the meta implementations are here; CPU and CUDA implementations come from native/torch_cpu.cpp and
native/torch_cuda.cpp, on torch's stable ABI, or from `reference` where those cannot be built.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cuda_ops import build, reference

NAMESPACE = "deepseek_compress"
SCHEMAS = (
    "pack_weights(Tensor weight, Tensor? scale, int encoding, int block_rows, int block_columns, int group_size, "
    "bool symmetric) -> (Tensor, Tensor, Tensor, Tensor)",
    "softmax(Tensor logits, Tensor? row_scale, Tensor? column_scale, Tensor? mask, ScalarType out_dtype) "
    "-> (Tensor, Tensor)",
    "search_grid(Tensor groups, Tensor? importance, Tensor shrink, int num_bits, bool symmetric) -> (Tensor, Tensor)",
    "round_columns(Tensor base, Tensor target, Tensor feedback, Tensor scale, Tensor zero_point, Tensor group, "
    "Tensor? fixed, int top, Tensor(a!) codes, Tensor(b!) residual) -> ()",
    "unrounded(Tensor base, Tensor target, Tensor feedback) -> Tensor",
    "limit_isa(int level) -> int",
)
ISA = ("scalar", "avx2", "avx512")  # what the CPU kernels can use, in the order of simd.h
PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FP8_BLOCK, MXFP4 = 3, 4

_log = logging.getLogger("cuda_ops")
_torch: Any = torch  # where torch has no types
_library: list[Any] = []  # kept: an operator lives as long as the library that defines it


class WeightError(ValueError):
    """A weight that cannot be packed: what is wrong with it, and the next step to take."""

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix
        super().__init__(f"{what}; {fix}")


class Packed(NamedTuple):
    """A weight in the pack-quantized layout of compressed-tensors."""

    packed: Tensor  # int32 (rows, ceil(columns / 8)): 4-bit codes along columns, low nibble first
    scale: Tensor  # bfloat16 (rows, groups)
    zero_point: Tensor | None  # int32 (ceil(rows / 8), groups): packed along rows; None when symmetric


@functools.cache
def load() -> bool:
    """Define the operators and load the native CPU code; True if it is native, False if the reference serves.

    The reason is logged, once, where it cannot be built. Called by every function here; call it yourself before you
    use `torch.ops.deepseek_compress` directly.
    """
    library = _torch.library.Library(NAMESPACE, "DEF")
    _library.append(library)
    for schema in SCHEMAS:
        library.define(schema)
    torch.library.register_fake(f"{NAMESPACE}::softmax", _softmax_shapes, lib=library)
    try:
        _torch.ops.load_library(str(build.cpu_library()))
        return True
    except (build.BuildError, OSError) as error:
        _log.warning("native kernels not available, the slow reference is used: %s", error)
    _serve_reference("CPU")
    library.impl("limit_isa", lambda level: 0, "CompositeExplicitAutograd")
    return False


def instructions() -> str:
    """Return what the CPU kernels run on here: scalar, avx2, avx512, or "reference" where nothing could be built."""
    return ISA[torch.ops.deepseek_compress.limit_isa(len(ISA) - 1)] if load() else "reference"


@contextmanager
def limited_to(name: str) -> Iterator[bool]:
    """Use at most these instructions inside the block, in the whole process; yields whether this machine has them."""
    load()
    level = ISA.index(name)
    try:
        yield torch.ops.deepseek_compress.limit_isa(level) == level
    finally:
        torch.ops.deepseek_compress.limit_isa(len(ISA) - 1)


def pack_weights(
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    group_size: int,
    symmetric: bool = False,
    block: tuple[int, int] = (128, 128),
    name: str = "weight",
) -> Packed:
    """Round a stored weight to 4 bits, data-free, and pack it, on the device where it is: one pass over the bytes.

    `weight`: float32, float16 or bfloat16 (rows, columns); float8_e4m3fn with `scale` (blocks of rows, blocks of
    columns), the multiplier; or int8/uint8 (rows, columns / 2) with E8M0 `scale` (rows, columns / 32). The result
    equals `numerics.rtn` on the decoded weight, bit for bit. Raises `WeightError`, naming the weight, for NaN,
    infinity, shapes that do not fit and types it does not know.
    """
    weight = weight.contiguous()
    if weight.dtype in PLAIN and scale is None:
        encoding = PLAIN[weight.dtype]
    elif weight.dtype == torch.float8_e4m3fn and scale is not None:
        encoding, scale = FP8_BLOCK, scale.float().contiguous()
        _expect(name, scale, (-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])))
    elif weight.dtype in (torch.int8, torch.uint8) and scale is not None:
        encoding, weight, scale = MXFP4, weight.view(torch.uint8), scale.view(torch.uint8).contiguous()
        _expect(name, scale, (weight.shape[0], weight.shape[1] // (reference.MXFP4_BLOCK // 2)))
    else:
        has = "no scale" if scale is None else f"scale {scale.dtype}"
        raise WeightError(f"{name}: cannot pack {weight.dtype} with {has}", "give BF16, FP8 with scales or MXFP4")
    columns = weight.shape[1] * (2 if encoding == MXFP4 else 1)
    if columns % group_size:
        fits = next((g for g in (128, 64, 32, 16) if columns % g == 0), columns)
        raise WeightError(
            f"{name}: {columns} columns do not divide into groups of {group_size}", f"set group_size: {fits}"
        )
    run = torch.ops.deepseek_compress.pack_weights if _has_kernels(weight) else _reference_pack
    packed, stored, zero, found = run(weight, scale, encoding, *block, group_size, symmetric)
    if (bad := int(found)) >= 0:  # on a GPU this waits for the kernel; the operator itself does not
        raise WeightError(f"{name}: row {bad} holds NaN, infinity or a range beyond float32", "download the file again")
    return Packed(packed, stored, None if symmetric else zero)


def search_grid(
    groups: Tensor, importance: Tensor | None, shrink: Tensor, num_bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point (count, rows) with the least weighted squared error: see `reference.search_grid`.

    `groups` float32 (count, size, rows), all finite, `importance` (count, size) or None, `shrink` (steps,) on any
    device. The kernels give the reference's bits.
    """
    run = torch.ops.deepseek_compress.search_grid if _has_kernels(groups) else reference.search_grid
    own = None if importance is None else importance.contiguous()
    scale, zero = run(groups.contiguous(), own, shrink.to(groups.device), num_bits, symmetric)
    return scale, zero


def round_columns(
    base: Tensor,
    target: Tensor,
    feedback: Tensor,
    grid: tuple[Tensor, Tensor, int],
    group: Tensor,
    fixed: Tensor | None,
    codes: Tensor,
    residual: Tensor,
) -> None:
    """Round columns (columns, rows) one after the other to their `grid` (scale, zero point, largest code).

    Or those of a batch, (matrices, columns, rows), where each matrix is contiguous. See `reference.round_columns`,
    whose bits the kernels give. That `group` names groups that are there is not checked on a GPU, which would wait.
    """
    run = torch.ops.deepseek_compress.round_columns if _has_kernels(base) else reference.round_columns
    run(base, target, feedback.contiguous(), *grid[:2], group, fixed, grid[2], codes, residual)


def unrounded(base: Tensor, target: Tensor, feedback: Tensor) -> Tensor:
    """Feed columns (columns, rows), or those of a batch, to each other without rounding: see `reference.unrounded`."""
    run = torch.ops.deepseek_compress.unrounded if _has_kernels(base) else reference.unrounded
    values: Tensor = run(base.contiguous(), target.contiguous(), feedback.contiguous())
    return values


def softmax(
    logits: Tensor,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    mask: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension in mixed precision: `(out, out_scale)`.

    `logits` (..., rows, columns) int32 products of an 8-bit matrix product, or float16, bfloat16, float32; each is
    multiplied by `row_scale` (..., rows) and `column_scale` (columns,) or (..., columns), float32. `mask` is bool, True
    where a column takes part, broadcastable to the logits; or int32 (..., rows, 2), the first column that takes part
    and the one after the last (causal and padding masks in eight bytes a row). A row that is fully masked gives zeros.
    Maximum and sum are float32. `out` has `out_dtype`: float16 within one unit in the last place; for uint8,
    p = out * out_scale with `out_scale` float32 (..., rows, 1), else `out_scale` is empty.
    """
    _has_kernels(logits)
    return torch.ops.deepseek_compress.softmax(  # type: ignore[no-any-return]
        logits.contiguous(), _flat(row_scale), _flat(column_scale), _rows_of(mask, logits), out_dtype
    )


@functools.cache
def load_cuda(capability: tuple[int, int]) -> bool:
    """Compile (once) and load the CUDA operators for a device; the reference where that fails, said once."""
    try:
        _torch.ops.load_library(str(build.cuda_library(f"{capability[0]}{capability[1]}")))
        return True
    except (build.BuildError, OSError) as error:
        _log.warning("CUDA kernels not available, the slow reference is used: %s", error)
    _serve_reference("CUDA")
    return False


def _serve_reference(device: str) -> None:
    for name in ("softmax", "search_grid", "round_columns", "unrounded"):
        _library[0].impl(name, getattr(reference, name), device)
    _library[0].impl("pack_weights", _reference_pack, device)


def _has_kernels(tensor: Tensor) -> bool:
    """Load the operators for the device of `tensor`; False where it is neither a CPU nor a GPU: the reference runs."""
    load()
    if tensor.is_cuda:
        load_cuda(torch.cuda.get_device_capability(tensor.device))
    return tensor.is_cpu or tensor.is_cuda


def _flat(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.contiguous()


def _rows_of(mask: Tensor | None, logits: Tensor) -> Tensor | None:
    """Return the mask as the kernels want it: bool with contiguous rows as long as the logits', or contiguous
    ranges."""
    if mask is None or mask.dtype != torch.bool or mask.dim() == 0:
        return _flat(mask)
    wide = mask if mask.shape[-1] == logits.shape[-1] else mask.expand(*mask.shape[:-1], logits.shape[-1])
    return wide if wide.stride(-1) == 1 else wide.contiguous()


def _softmax_shapes(
    logits: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, mask: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    scale = (*logits.shape[:-1], 1) if out_dtype == torch.uint8 else (0,)
    return logits.new_empty(logits.shape, dtype=out_dtype), logits.new_empty(scale, dtype=torch.float32)


def _expect(name: str, scale: Tensor, shape: tuple[int, int]) -> None:
    if tuple(scale.shape) != shape:
        raise WeightError(f"{name}: scale has shape {tuple(scale.shape)}, not {shape}", "check the quantization_config")


def _reference_pack(
    weight: Tensor,
    scale: Tensor | None,
    encoding: int,
    block_rows: int,
    block_columns: int,
    group_size: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = reference.pack_weights(weight, scale, (block_rows, block_columns), group_size, symmetric)
    return *made[:3], torch.tensor([made[3]])
