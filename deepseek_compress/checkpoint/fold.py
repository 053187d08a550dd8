"""Fold stored tensors into logical ones: a weight's scales, zero points and shape belong to the weight.

| stored | logical |
|---|---|
| `P.weight` F8_E4M3 + `P.weight_scale_inv` (V3) or `P.scale` (V4) | `P.weight`, fp8_block |
| `P.weight` I8 (rows, columns / 2) + `P.scale` F8_E8M0 (V4 experts) | `P.weight`, mxfp4 |
| `P.weight_packed` U8 + `P.weight_scale` U8 (mxfp4-pack-quantized) | `P.weight`, mxfp4 |
| `P.weight_packed` I32 + `P.weight_scale`, `P.weight_shape`, `P.weight_zero_point` | `P.weight`, packed |
| `P.weight` I8 + `P.weight_scale` of a float type (int-quantized) | `P.weight`, packed |
| `P.input_scale`, `P.input_zero_point` with one of the last two | for servers: the grid of its input |
| anything else of an ordinary type | itself, plain |

Parts may lie in different shards. Nothing is guessed: a scale without its weight, a weight without its scale, and
shapes that do not fit each other are errors that name the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch

from deepseek_compress.checkpoint.formats import fp8, mxfp4, packed
from deepseek_compress.checkpoint.header import Location, TensorInfo, module_of, stored_name
from deepseek_compress.errors import DscError

SIZES = (16, 32, 64, 128, 256)  # of square FP8 blocks that somebody might publish
_INPUT = ("input_scale", "input_zero_point")
_PARTS = ("weight_scale_inv", "weight_scale", "scale", "weight_packed", "weight_zero_point", "weight_shape", *_INPUT)
_PACKED_PARTS = ("weight_scale", "weight_zero_point", "weight_shape", *_INPUT)
_ENCODED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


def fold(
    stored: Mapping[str, Location], config: dict[str, Any], absent: Set[str] = frozenset()
) -> tuple[dict[str, TensorInfo], list[DscError]]:
    """Logical tensors in the order of `stored`, and every part that does not fit.

    absent: names that the index promises and no shard holds. They are reported already, so a tensor that lacks one of
    them is not reported again.
    """
    tensors: dict[str, TensorInfo] = {}
    problems: list[DscError] = []
    fp8.block_size(config)  # refuses an invalid size
    for name, place in stored.items():
        suffix = module_of(name)[1]
        main = stored_name(name, "weight")
        try:
            if suffix == "weight_packed":
                tensors[main] = _packed(main, _siblings(stored, main))
            elif suffix == "weight" and place.dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8):
                tensors[main] = _scaled(main, _siblings(stored, main), fp8.block_of(main, config))
            elif suffix in _PARTS and _is_part(stored, main, suffix):
                continue  # its weight's turn
            elif suffix in _PARTS and (suffix != "scale" or place.dtype == torch.float8_e8m0fnu):
                raise DscError(f"{name}: a part without its weight", f"no encoded {main} goes with it")
            elif place.dtype in _ENCODED:
                raise DscError(
                    f"{name}: {place.dtype} without a scale is not a known encoding",
                    "dsc reads FP8 blocks, MXFP4 and pack-quantized",
                )
            else:
                tensors[name] = TensorInfo(name, place.shape, "plain", place.dtype, {suffix: place})
        except DscError as error:
            if absent.isdisjoint(stored_name(name, part) for part in ("weight", *_PARTS)):
                problems.append(error)
    return tensors, _one_cause(problems, config)


class _OtherBlock(DscError):
    """A scale that fits its FP8 weight in blocks of other sizes, `fits`."""

    def __init__(self, error: DscError, fits: frozenset[int]) -> None:
        super().__init__(error.what, error.fix)
        self.fits = fits


def _one_cause(problems: list[DscError], config: dict[str, Any]) -> list[DscError]:
    """`problems`, those of many scales as one where another block size explains them all."""
    apart = [problem for problem in problems if isinstance(problem, _OtherBlock)]
    fits = frozenset[int].intersection(*(problem.fits for problem in apart)) if apart[1:] else frozenset[int]()
    if not fits:
        return problems
    height, width = fp8.block_size(config)
    named = f"weight_block_size is {height} x {width}"
    if not (config.get("quantization_config") or {}).get("weight_block_size"):
        named = f"no quantization_config.weight_block_size, so {height} x {width} is meant"
    size = max(fits)
    what = f"config.json: {named}, but the scales of {len(apart)} FP8 weights are those of {size} x {size}"
    one = DscError(f"{what} ({apart[0].what.split(':')[0]}, ...)", "give the config.json of these shards")
    return [one, *(problem for problem in problems if not isinstance(problem, _OtherBlock))]


def _siblings(stored: Mapping[str, Location], main: str) -> dict[str, Location]:
    start = main.removesuffix("weight")  # of a hundred thousand names
    return {suffix: stored[start + suffix] for suffix in ("weight", *_PARTS) if start + suffix in stored}


def _is_part(stored: Mapping[str, Location], main: str, suffix: str) -> bool:
    """Whether an encoded weight claims this part; a scale of a BF16 weight has no meaning that we know."""
    if stored_name(main, "weight_packed") in stored:
        return suffix in _PACKED_PARTS
    weight = stored.get(main)
    encoded = weight is not None and weight.dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8)
    if suffix in _INPUT:
        return weight is not None and weight.dtype == torch.int8
    return encoded and suffix in ("weight_scale_inv", "weight_scale", "scale")


def _scaled(name: str, parts: dict[str, Location], block: tuple[int, int]) -> TensorInfo:
    """FP8 with block scales, or bytes of two FP4 values with a scale for each 32."""
    scales = [suffix for suffix in ("weight_scale_inv", "weight_scale", "scale") if suffix in parts]
    weight = parts["weight"]
    if len(scales) != 1:
        found = f"{len(scales)} scales ({', '.join(scales)})" if scales else "no weight_scale_inv and no scale"
        raise DscError(f"{name}: {weight.dtype} with {found}", "download the checkpoint again, every shard of it")
    scale = parts[scales[0]]
    kept = {"weight": weight, scales[0]: scale}
    if len(weight.shape) != 2:
        raise DscError(f"{name}: shape {list(weight.shape)} of an encoded weight is not (rows, columns)")
    if weight.dtype == torch.float8_e4m3fn:
        _check_fp8(name, weight, scale, block)
        return TensorInfo(name, weight.shape, "fp8_block", weight.dtype, kept)
    if weight.dtype == torch.int8 and scale.dtype in packed.SCALE_TYPES:
        groups = scale.shape[-1] if len(scale.shape) == 2 else 0
        if not groups or scale.shape[0] != weight.shape[0] or weight.shape[1] % groups:
            raise DscError(f"{name}: scale {list(scale.shape)} does not fit {list(weight.shape)}", "download it again")
        kept |= {suffix: parts[suffix] for suffix in _INPUT if suffix in parts}
        return TensorInfo(name, weight.shape, "packed", weight.dtype, kept)
    shape = (weight.shape[0], weight.shape[1] * 2)
    _check_mxfp4(name, scale, shape)
    return TensorInfo(name, shape, "mxfp4", weight.dtype, kept)


def _check_fp8(name: str, weight: Location, scale: Location, block: tuple[int, int]) -> None:
    size = " x ".join(map(str, block))
    fix = f"give the config.json of these shards (weight_block_size: blocks of {size} here), or download them again"
    kinds = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
    try:
        _check_scale(name, scale, fp8.scale_shape(weight.shape, block), kinds, fix)
    except DscError as error:
        fits = frozenset(
            n for n in SIZES if scale.dtype in kinds and fp8.scale_shape(weight.shape, (n, n)) == scale.shape
        )
        raise _OtherBlock(error, fits) from None


def _packed(name: str, parts: dict[str, Location]) -> TensorInfo:
    codes = parts["weight_packed"]
    if "weight_scale" not in parts:
        raise DscError(
            f"{name}: weight_packed without weight_scale", "download the checkpoint again, every shard of it"
        )
    if len(codes.shape) != 2:
        raise DscError(f"{name}: weight_packed of shape {list(codes.shape)} is not (rows, words)")
    kept = {suffix: place for suffix, place in parts.items() if suffix in ("weight_packed", *_PACKED_PARTS)}
    if codes.dtype == torch.uint8:
        shape: tuple[int, ...] = (codes.shape[0], codes.shape[1] * 2)
        _check_mxfp4(name, parts["weight_scale"], shape)
    else:
        shape = packed.logical_shape(name, kept)
    return TensorInfo(name, shape, "mxfp4" if codes.dtype == torch.uint8 else "packed", codes.dtype, kept)


def _check_mxfp4(name: str, scale: Location, shape: tuple[int, ...]) -> None:
    if shape[1] % mxfp4.GROUP:
        raise DscError(f"{name}: {shape[1]} columns are not whole groups of {mxfp4.GROUP}")
    _check_scale(name, scale, (shape[0], shape[1] // mxfp4.GROUP), (torch.float8_e8m0fnu, torch.uint8))


def _check_scale(
    name: str,
    scale: Location,
    shape: tuple[int, int],
    dtypes: tuple[torch.dtype, ...],
    fix: str = "download the checkpoint again",
) -> None:
    if scale.shape != shape or scale.dtype not in dtypes:
        raise DscError(
            f"{name}: scale is {scale.dtype} {list(scale.shape)}, not {list(shape)} of {' or '.join(map(str, dtypes))}",
            fix,
        )
