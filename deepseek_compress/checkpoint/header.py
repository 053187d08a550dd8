"""The tensors of a checkpoint, from its headers alone: no tensor byte is read here.

A safetensors file is `u64 little-endian header length | JSON header | data`; the header maps a name to dtype, shape
and `[begin, end)` within the data (https://huggingface.co/docs/safetensors, section Format). Everything is checked
against the size of the file before anything is allocated: the length of the header, every dtype, every shape, and
that the tensors lie one after another without holes or overlaps. Left out: the file's `__metadata__` is not used.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepseek_compress import limits
from deepseek_compress.checkpoint.files import open_regular
from deepseek_compress.checkpoint.verified import Identity, changed, identity
from deepseek_compress.errors import DscError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Location:
    """Where one stored tensor lies."""

    file: Path
    offset: int  # bytes from the start of the file
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]  # as stored, packed
    identity: Identity = (0, 0, 0, 0)  # of the file, when its header was read


def check_same(place: Location, opened: Path | int) -> None:
    """Raise DscError where the file at `place`, by path or descriptor, is another than when its header was read."""
    if place.identity[0] and identity(opened) != place.identity:
        raise changed(place.file)


@dataclass(frozen=True)
class TensorInfo:
    """One logical tensor: a weight together with its scales and zero points.

    `parts` maps what follows the module's name (`weight`, `weight_scale_inv`, `weight_packed`, ...) to its place.
    """

    name: str  # `model.layers.0.mlp.up_proj.weight`
    shape: tuple[int, ...]  # logical: (rows, columns) after unpacking
    encoding: str  # plain, fp8_block, mxfp4 or packed
    dtype: torch.dtype  # of the stored main part
    parts: dict[str, Location] = field(repr=False)

    @property
    def bytes(self) -> int:
        """Size on disk of all parts."""
        return sum(part.bytes for part in self.parts.values())

    @property
    def elements(self) -> int:
        """Logical elements, without scales."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checkpoint's config and its logical tensors, in the order of the files."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def bytes(self) -> int:
        """Size of all tensors on disk."""
        return sum(info.bytes for info in self.tensors.values())

    @property
    def mxfp4(self) -> bool:
        """Whether a tensor is published in MXFP4."""
        return any(info.encoding == "mxfp4" for info in self.tensors.values())


def module_of(name: str) -> tuple[str, str]:
    """`a.b.weight` -> (`a.b`, `weight`); a name without a dot belongs to the module with the empty name."""
    module, _, suffix = name.rpartition(".")
    return module, suffix


def stored_name(name: str, suffix: str) -> str:
    """Return the name on disk of part `suffix` of the logical tensor `name`."""
    module = module_of(name)[0]
    return f"{module}.{suffix}" if module else suffix


def read_shard_header(path: Path) -> tuple[dict[str, Location], list[DscError]]:
    """Every tensor of one safetensors file and everything that is wrong with the file."""
    try:
        with open_regular(path) as file:
            here = identity(file.fileno())
            size = here[1]
            raw = _header_bytes(file.read(8), size, path)
            text = file.read(raw)
    except OSError as error:
        return {}, [DscError(f"{path}: {error.strerror}", "give a complete checkpoint directory")]
    except DscError as error:
        return {}, [error]
    problems: list[DscError] = []
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        return {}, [DscError(f"{path.name}: the header is not valid JSON ({error})", _AGAIN)]
    if not isinstance(entries, dict):
        return {}, [DscError(f"{path.name}: the header is not a JSON object", _AGAIN)]
    if len(entries) > limits.HEADER_TENSORS:
        return {}, [DscError(f"{path.name}: {len(entries)} tensors, {limits.HEADER_TENSORS} at most are read", _AGAIN)]
    tensors: dict[str, Location] = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            tensors[name] = _location(path, name, entry, 8 + raw, here)
        except DscError as error:
            problems.append(error)
    if not problems:
        problems += _layout_problems(path, tensors, 8 + raw, size)
    return tensors, problems


_AGAIN = "download the file again"


def _header_bytes(start: bytes, size: int, path: Path) -> int:
    if len(start) < 8:
        raise DscError(f"{path.name}: {size} bytes are too few for a safetensors file", _AGAIN)
    (length,) = struct.unpack("<Q", start)
    if length > min(limits.HEADER_BYTES, size - 8):
        raise DscError(f"{path.name}: a header of {length} bytes does not fit a file of {size} bytes", _AGAIN)
    return int(length)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _elements(shape: list[int], where: str) -> int:
    """Return the product, checked: no number grows beyond a tensor that could exist."""
    if len(shape) > limits.RANK:
        raise DscError(f"{where}: {len(shape)} dimensions, {limits.RANK} at most are read", _AGAIN)
    if max(shape, default=0) > limits.SIZE:
        raise DscError(f"{where}: a dimension of more than 2^48", _AGAIN)
    return math.prod(shape)


def _location(path: Path, name: str, entry: Any, start: int, here: Identity) -> Location:
    where = f"{path.name}: {name[:200]}"
    if not name.isprintable():
        raise DscError(f"{where}: the name of a tensor has control characters", _AGAIN)
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise DscError(f"{where}: the header lacks dtype, shape or data_offsets", _AGAIN)
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise DscError(f"{where}: unknown dtype {str(dtype_name)[:80]!r}", f"known: {', '.join(DTYPES)}")
    if not _whole(shape):
        raise DscError(f"{where}: shape {str(shape)[:80]} is not a list of integers", _AGAIN)
    if not _whole(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
        raise DscError(f"{where}: data_offsets {str(offsets)[:80]} are not [begin, end]", _AGAIN)
    begin, end = offsets
    dtype = DTYPES[dtype_name]
    needed, given = _elements(shape, where) * dtype.itemsize, min(end - begin, 1 << 64)
    if end > limits.SIZE or end - begin != needed:
        raise DscError(
            f"{where}: shape {shape} of {dtype_name} takes {needed} bytes, the header gives {given}",
            _AGAIN,
        )
    return Location(path, start + begin, needed, dtype, tuple(shape), here)


def _layout_problems(path: Path, tensors: dict[str, Location], start: int, size: int) -> Iterator[DscError]:
    """One line for a truncated file; holes and overlaps, which no honest writer leaves."""
    end = max((place.offset + place.bytes for place in tensors.values()), default=start)
    if end > size:
        yield DscError(f"{path.name}: {size} bytes, but its tensors end at byte {end}; the file is truncated", _AGAIN)
        return
    position, before = start, "the header"
    for name, place in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if place.offset != position:
            word = "overlaps" if place.offset < position else "leaves a hole after"
            yield DscError(f"{path.name}: {name} {word} {before}", _AGAIN)
            return
        position, before = place.offset + place.bytes, name
    if position != size:
        yield DscError(f"{path.name}: {size - position} bytes after the last tensor", _AGAIN)
