"""Lowering of a linear to ONNX nodes: `Lowering(build, x, weight) -> y`, one table for all targets.

A quantised weight is W[k, n] = s[g, n] (q[k, n] - z[g, n]), k in group g; k is the input channel and n the output
channel, the transpose of the checkpoint's rows. c = 2^(b-1) centres the codes, so that q - c fits a signed type.

| lowering | quantised weights | and with 8-bit activations x = t d, t = max|x| / 127 per token, d whole |
|---|---|---|
| `plain` | decoded to the float type of the graph | x replaced by t d |
| `standard` | DequantizeLinear in blocks, with zero points | (d . W) t |
| `tensorrt` | x . DQ(q - c) - groupsum(x) . (s (z - c)) | t (sum_g s_g (d_g . (q - c)_g) - groupsum(d) . (s (z - c))) |
| `matmulnbits` | onnxruntime's MatMulNBits | inside MatMulNBits at accuracy level 4, else (d . W) t |

TensorRT takes no zero points; its two forms are exact. In the second, d_g . (q - c)_g is a product of integers whose
operands both have the constant scale 1, and every real scale is an explicit FP32 multiplication, which leaves nothing
that could be applied to the wrong group (see `hazards`). 4-bit codes are stored in 4 bits and widened by one kernel.

Static activations have the same forms with a constant t and a zero point (see `inputs`), and Q/DQ around MatMul where
the weight has 8 bits and one scale a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from deepseek_compress.errors import DscError
from deepseek_compress.export.build import Build, Grids, Lowering, Weight
from deepseek_compress.export.graph import CONTRIB, FLOATS, Array, pack_nibbles
from deepseek_compress.export.inputs import fraction, on_integers, qdq_grid, qdq_product, round_tokens, whole
from deepseek_compress.numerics.types import Quantized

NBITS_BLOCKS = (16, 32, 64, 128, 256)  # what MatMulNBits takes


# ---- weights from the checkpoint


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return a torch tensor as numpy, BF16 through float32."""
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
    return array


def is_quantized(build: Build, weight: Weight) -> bool:
    """Whether the checkpoint holds this weight as codes."""
    return build.checkpoint.header.tensors[weight.names[0] + ".weight"].encoding == "packed"


def is_rounded(build: Build, weight: Weight) -> bool:
    """Whether the linear's input is rounded to integers."""
    return weight.names[0] in build.rounded


def read(build: Build, weight: Weight) -> Iterator[Quantized]:
    """Yield the quantised weight of each expert in turn (one for a plain linear), all on grids of one shape."""
    shape = None
    for name in weight.names:
        found = build.checkpoint.read_quantized(name + ".weight")
        if found is None or shape not in (None, (found.num_bits, found.scale.shape)):
            raise DscError(
                f"{name}.weight is not quantised like the other experts of its layer", "use one scheme for all experts"
            )
        shape = (found.num_bits, found.scale.shape)
        yield found


def write_codes(build: Build, weight: Weight, signed: bool, split: bool = False) -> Grids:
    """Stream the codes as ([E,] K, N), 4 or 8 bits, and keep the (16 to 128 times smaller) scales in memory.

    `signed`: codes are stored minus the centre 2^(b-1); else as they are. `split`: 8-bit codes of several groups get
    the shape ([E,] groups, group_size, N).
    """
    scales: list[Array] = []
    zeros: list[Array] = []
    sums: list[Array] = []
    given = read(build, weight)
    first = next(given)
    rows, columns = first.codes.shape
    centre = 1 << (first.num_bits - 1)
    narrow = first.num_bits <= 4

    def parts() -> Iterator[bytes]:
        for found in itertools.chain((first,), given):
            codes = to_numpy(found.codes).T.astype(np.int16) - (centre if signed else 0)
            scales.append(to_numpy(found.scale).T)
            zeros.append(to_numpy(found.zero_point).T.astype(np.float32) - centre)
            codes = np.ascontiguousarray(codes)
            if build.inputs:
                sums.append(found.dequantize().sum(1, keepdim=True).T.numpy())
            yield pack_nibbles(codes) if narrow else codes.astype(np.int8 if signed else np.uint8).tobytes()

    kinds = {True: (TensorProto.INT4, TensorProto.UINT4), False: (TensorProto.INT8, TensorProto.UINT8)}
    lead = (len(weight.names),) if weight.stacked else ()
    kind = kinds[narrow][0 if signed else 1]
    groups = first.scale.shape[1]
    inner = (groups, first.group_size) if split and not narrow and groups > 1 else (columns,)
    codes = build.graph.stream(f"{weight.label}.weight", kind, (*lead, *inner, rows), parts())
    sums = sums or [np.zeros((1, rows), np.float32)]
    scale, zero, total = (np.stack(a) if weight.stacked else a[0] for a in (scales, zeros, sums))
    return Grids(codes, scale.astype(np.float32), zero, total, first.num_bits, first.group_size, rows)


# ---- activations


def attention_product(build: Build, left: str, right: str, nonnegative: bool = False) -> str:
    """left (..., M, K) @ right (..., K, N) of attention; `nonnegative`: the left is.

    In 8 bits where the scheme has it, as models.attention8: a scale for each row of the left and each column of the
    right, so that the product is one of integers, Q/DQ with constant scale 1.
    """
    g = build.graph
    if not build.attention8:
        return g.op("MatMul", left, right)
    one, wide = g.scalar(1, np.float32), nonnegative and build.unsigned
    kinds = (np.uint8 if wide else np.int8), np.int8
    found = round_tokens(build, left, -1, 255 if wide else 127), round_tokens(build, right, -2, 127)
    codes = (
        g.op("QuantizeLinear", fraction, one, g.constant(np.array(0, kind)))
        for (fraction, _), kind in zip(found, kinds, strict=True)
    )
    y = g.op("MatMul", *(g.op("DequantizeLinear", code, one) for code in codes))
    return g.op("Cast", g.op("Mul", g.op("Mul", y, found[0][1]), found[1][1]), to=g.elem_type)


# ---- lowerings


def plain(build: Build, x: str, weight: Weight) -> str:
    """Float weights: Gemm with the checkpoint's own (rows, columns) layout, MatMul with ([E] K, N) for experts."""
    g = build.graph
    if is_rounded(build, weight):
        found = fraction(build, x, weight)
        x = g.op("Cast", g.op("Mul", whole(g, found), found.scale), to=g.elem_type)
    if not weight.stacked:
        return g.op("Gemm", x, float_weight(build, weight), transB=1)
    return g.op("MatMul", x, float_weight(build, weight))


def float_weight(build: Build, weight: Weight, cast: bool = True) -> str:
    """Return the weight in the graph's float type: (rows, columns), or (E, columns, rows) of experts.

    An FP32 graph stores a 16-bit weight of the checkpoint as it is and casts it, which run-times do once, at load
    (not `cast`: the stored tensor).
    """
    g, name = build.graph, f"{weight.label}.weight"
    info = build.checkpoint.header.tensors[weight.names[0] + ".weight"]
    exact = g.dtype == "float32" and info.encoding == "plain" and info.dtype in (torch.bfloat16, torch.float16)
    dtype = info.dtype if exact else getattr(torch, g.dtype)
    if not g.has(name):
        shape = (len(weight.names), *info.shape[::-1]) if weight.stacked else info.shape
        tensors = (build.checkpoint.read(f"{n}.weight", dtype) for n in weight.names)
        parts = (to_bytes(tensor.T if weight.stacked else tensor) for tensor in tensors)
        g.stream(name, FLOATS[str(dtype).removeprefix("torch.")][0], shape, parts)
    return g.op("Cast", name, to=g.elem_type) if exact and cast else name


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor of any type, row by row."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def standard(build: Build, x: str, weight: Weight) -> str:
    """Use standard operators only: DequantizeLinear in blocks, with zero points, then MatMul."""
    g = build.graph
    if grid := qdq_grid(build, weight, read(build, weight), zero_points=True):
        return qdq_product(build, x, weight, grid, write_codes(build, weight, signed=True))
    grids = write_codes(build, weight, signed=False)
    centre = 1 << (grids.num_bits - 1)
    zero = grids.zero + centre
    name = f"{weight.label}.weight_zero_point"
    if grids.num_bits <= 4:
        g.weight4(name, zero, signed=False)
    else:
        g.weight(name, zero.astype(np.uint8))
    scale = g.weight(f"{weight.label}.weight_scale", grids.scale.astype(g.numpy))
    axis = grids.scale.ndim - 2
    w = g.op("DequantizeLinear", grids.codes, scale, name, axis=axis, block_size=grids.group_size)
    if is_rounded(build, weight):
        return on_integers(build, x, weight, lambda d: g.op("MatMul", d, w))
    return g.op("MatMul", x, w)


def tensorrt(build: Build, x: str, weight: Weight) -> str:
    """TensorRT's types: signed codes without zero points, the zero points as a correction by group sums."""
    if grid := qdq_grid(build, weight, read(build, weight), zero_points=False):
        return qdq_product(build, x, weight, grid, write_codes(build, weight, signed=True))
    return _integer_product(build, x, weight) if is_rounded(build, weight) else _corrected_product(build, x, weight)


def _corrected_product(build: Build, x: str, weight: Weight) -> str:
    g = build.graph
    grids = write_codes(build, weight, signed=True)
    scale = g.weight(f"{weight.label}.weight_scale", grids.scale.astype(g.numpy))
    axis = grids.scale.ndim - 2
    w = g.op("DequantizeLinear", grids.codes, scale, axis=axis, block_size=grids.group_size)
    return _correct(build, g.op("MatMul", x, w), x, weight, grids, g.numpy)


def _correct(build: Build, y: str, x: str, weight: Weight, grids: Grids, numpy: Any) -> str:
    """y - groupsum(x) . (s (z - c)); nothing to do for symmetric weights."""
    if not grids.zero.any():
        return y
    g = build.graph
    correction = g.weight(f"{weight.label}.weight_correction", (grids.scale * grids.zero).astype(numpy))
    sums = g.op("ReduceSum", _in_groups(build, x, weight, grids), g.ints(-1), keepdims=0)
    return g.op("Sub", y, g.op("MatMul", sums, correction))


def _in_groups(build: Build, x: str, weight: Weight, grids: Grids) -> str:
    """([E,] tokens, K) -> ([E,] tokens, groups, group_size)."""
    groups = grids.scale.shape[-2]
    lead = (0,) if weight.stacked else ()  # 0: keep this dimension
    return build.graph.op("Reshape", x, build.graph.ints(*lead, -1, groups, grids.group_size))


def _integer_product(build: Build, x: str, weight: Weight) -> str:
    g = build.graph
    one = g.scalar(1, np.float32)
    grids = write_codes(build, weight, signed=True, split=True)
    value, t, zero = fraction(build, x, weight)
    d = g.op("QuantizeLinear", value, one, g.constant(np.array(0, np.int8)))
    w = _widen(build, grids) if grids.num_bits <= 4 else grids.codes
    groups = grids.scale.shape[-2]
    lead = grids.scale.shape[:-2]
    operand = d
    if groups > 1:
        operand = g.op("Transpose", _in_groups(build, d, weight, grids), perm=[0, 2, 1, 3] if lead else [1, 0, 2])
        if grids.num_bits <= 4:
            w = g.op("Reshape", w, g.ints(*lead, groups, grids.group_size, grids.rows))
    y = g.op("MatMul", g.op("DequantizeLinear", operand, one), g.op("DequantizeLinear", w, one))
    scale = grids.scale[..., :, None, :] if groups > 1 else grids.scale
    y = g.op("Mul", y, g.weight(f"{weight.label}.weight_scale", scale))
    y = g.op("ReduceSum", y, g.ints(-3), keepdims=0) if groups > 1 else y
    y = _correct(build, y, g.op("DequantizeLinear", d, one), weight, grids, np.float32)
    if zero is not None and zero.any():
        y = g.op("Sub", y, g.weight(f"{weight.label}.input_correction", zero * grids.sums))
    return g.op("Cast", g.op("Mul", y, t), to=g.elem_type)


def _widen(build: Build, grids: Grids) -> str:
    """4-bit codes as int8, by one kernel. The scales of ones come in a block, not as a scalar: TensorRT-RTX 1.7.1
    folds a scalar 1 into a no-op and then refuses the types."""
    g = build.graph
    columns = grids.scale.shape[-2] * grids.group_size
    ones = g.constant(np.ones((*grids.scale.shape[:-2], 1, grids.rows), np.float32))
    wide = g.op("DequantizeLinear", grids.codes, ones, axis=grids.scale.ndim - 2, block_size=columns)
    return g.op("QuantizeLinear", wide, g.scalar(1, np.float32), g.constant(np.array(0, np.int8)))


def matmulnbits(build: Build, x: str, weight: Weight) -> str:
    """onnxruntime's MatMulNBits, with zero points. Group sizes that it does not take go the standard way."""
    found = next(read(build, weight))
    qdq = qdq_grid(build, weight, iter([found]), zero_points=True)
    if weight.stacked or found.group_size not in NBITS_BLOCKS or qdq:
        return standard(build, x, weight)

    def product(value: str) -> str:
        return nbits_product(build, value, f"{weight.label}.weight", found)

    if is_rounded(build, weight) and build.accuracy_level < 4:
        return on_integers(build, x, weight, product)
    return product(x)


def nbits_product(build: Build, x: str, name: str, found: Quantized) -> str:
    """x . W^T by MatMulNBits."""
    rows, columns = found.codes.shape
    knobs: dict[str, Any] = {
        "K": columns,
        "N": rows,
        "bits": 4 if found.num_bits <= 4 else 8,
        "block_size": found.group_size,
        "accuracy_level": build.accuracy_level,
    }
    return build.graph.op("MatMulNBits", x, *nbits_weight(build, name, found), domain=CONTRIB, **knobs)


def nbits_weight(build: Build, name: str, found: Quantized) -> tuple[str, str, str]:
    """Codes uint8 (rows, groups, group_size * bits / 8), scale, zero point; even ones in the low nibble."""
    g = build.graph
    bits = 4 if found.num_bits <= 4 else 8
    rows, groups = found.scale.shape
    if g.has(name):
        return name, f"{name}_scale", f"{name}_zero_point"
    codes: Array = to_numpy(found.codes)
    zero: Array = to_numpy(found.zero_point).astype(np.uint8)
    if bits == 4:
        zero = np.pad(zero, ((0, 0), (0, groups % 2)))
        zero = zero[:, 0::2] | (zero[:, 1::2] << 4)
        codes = np.frombuffer(pack_nibbles(codes), np.uint8)
    return (
        g.weight(name, codes.reshape(rows, groups, -1)),
        g.weight(f"{name}_scale", to_numpy(found.scale).astype(g.numpy)),
        g.weight(f"{name}_zero_point", zero),
    )


LOWERINGS: dict[str, Lowering] = {
    "plain": plain,
    "standard": standard,
    "tensorrt": tensorrt,
    "matmulnbits": matmulnbits,
}


def linear(build: Build, name: str, x: str) -> str:
    """x (tokens, columns) -> (tokens, rows) by the linear `name` of the checkpoint, with its bias where it has one."""
    return _apply(build, Weight(name, (name,)), x)


def expert_linear(build: Build, stem: str, count: int, part: str, x: str) -> str:
    """x (1 or E, tokens, columns) -> (E, tokens, rows) by the linear `part` of every expert of `stem`."""
    return _apply(build, Weight(f"{stem}.*.{part}", tuple(f"{stem}.{e}.{part}" for e in range(count))), x)


def _apply(build: Build, weight: Weight, x: str) -> str:
    with build.graph.scope(weight.label):
        y = (build.lower if is_quantized(build, weight) else plain)(build, x, weight)
        bias = f"{weight.names[0]}.bias"
        if bias in build.checkpoint.header.tensors:
            value = to_numpy(build.checkpoint.read(bias)).astype(build.graph.numpy)
            y = build.graph.op("Add", y, build.graph.weight(bias, value))
        return y
