"""Engram tables in four bits: rounded to nearest some rows at a time, since a table of 95 GiB fits into no memory.

One pass over the rows: codes go to the shard as they are made, scales and zero points wait in files and follow. A
lookup multiplies nothing, so there is nothing to calibrate; a run with text looks up the rows as the output has them.
What it costs is measured on rows spread over the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from cuda_ops import ops
from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.checkpoint.files import disk_errors
from deepseek_compress.checkpoint.formats import fp8
from deepseek_compress.checkpoint.header import Location, TensorInfo, stored_name
from deepseek_compress.checkpoint.ledger import OpenShard
from deepseek_compress.checkpoint.quantization_config import Stored
from deepseek_compress.checkpoint.shards import ELEMENT
from deepseek_compress.compress.layout import packed
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Statistics

PIECE = 1 << 24  # weights of rows that are rounded at a time
SAMPLES, SAMPLE_ROWS = 256, 64  # pieces of a table on which the error is measured, and rows of each
COPIED = 1 << 22  # bytes


class Engram(BaseModel, frozen=True, extra="forbid"):
    """Scheme of Engram tables. Servers read them only as published; `dsc` reads both."""

    num_bits: Literal[4] = 4
    group_size: int = Field(32, gt=0)
    symmetric: bool = False

    def rounding(self) -> Rtn:
        """Round to nearest with these knobs."""
        return Rtn(num_bits=self.num_bits, group_size=self.group_size, symmetric=self.symmetric)


def changed(architecture: Architecture, engram: Engram | None) -> dict[str, Rtn]:
    """Return the tables that change, by name."""
    if engram is None:
        return {}
    return {name: engram.rounding() for name in names(architecture)}


def names(architecture: Architecture) -> list[str]:
    """All tables of a model whose rows are gathered."""
    return [name for name in architecture.tensors if name.endswith(tuple(architecture.family.gathered))]


def problems(architecture: Architecture, engram: Engram | None) -> Iterator[DscError]:
    """Yield a model without tables, and groups that do not fit."""
    if engram is None:
        return
    cfg = architecture.cfg.engram
    if cfg is None:
        yield DscError(f"engram: {architecture.cfg.model_type} has no Engram tables", "leave engram out")
    elif cfg.head_dim % engram.group_size or engram.group_size % 8:
        what = f"engram: rows of {cfg.head_dim} columns do not divide into groups of {engram.group_size}"
        yield DscError(what, "set group_size: 32")
    for name in names(architecture):
        info = architecture.header.tensors.get(name)
        if info is not None and info.encoding not in ("plain", "fp8_block"):
            yield DscError(f"{name}: {info.encoding} already", "start from the published model")


def decisions(architecture: Architecture, engram: Engram | None) -> list[str]:
    """Say how Engram tables are stored, and who reads that."""
    there = [architecture.header.tensors[name] for name in names(architecture) if name in architecture.header.tensors]
    if not there:
        return []
    before = f"{sum(info.bytes for info in there) / 1e6:,.2f} MB"
    if engram is None:
        return [f"Engram tables kept byte for byte, {before}, as servers read them (engram: {{num_bits: 4}})"]
    parts = [part for info in there for part in packed(info, engram.rounding()).parts.values()]
    after = f"{sum(part.bytes for part in parts) / 1e6:,.2f} MB"
    return [f"Engram tables in 4 bits: {before} become {after}; read by dsc, by no server yet"]


def write(shard: OpenShard, source: Checkpoint, name: str, how: Rtn, work: Path) -> None:
    """Append the table `name` in four bits to `shard`; what waits lies in `work`."""
    info = source.header.tensors[name]
    parts = packed(info, how).parts
    assert how.group_size is not None
    size = sum(part.bytes for part in parts.values())
    shard.stored[name] = Stored(
        "pack-quantized", size, 2, how.num_bits, info.shape[1], info.shape[1] // how.group_size, how.symmetric
    )
    later = [suffix for suffix in parts if suffix not in ("weight_packed", "weight_shape")]
    with _waiting(work, later) as waiting:
        _append(shard, name, "weight_packed", parts["weight_packed"], _codes(source, info, how, waiting))
        for suffix in later:
            waiting[suffix].seek(0)
            _append(shard, name, suffix, parts[suffix], _copied(waiting[suffix], work))
    shard.file.add(stored_name(name, "weight_shape"), torch.tensor(info.shape, dtype=torch.int64))


def _codes(source: Checkpoint, info: TensorInfo, how: Rtn, waiting: Mapping[str, IO[bytes]]) -> Iterator[memoryview]:
    """Yield the packed codes, piece by piece, while the other parts of each piece go to `waiting`."""
    step = max(8, PIECE // info.shape[1] // 8 * 8)  # eight rows share a word of zero points
    assert how.group_size is not None
    for start in range(0, info.shape[0], step):
        weight, scale = slice_of(source, info, start, min(step, info.shape[0] - start))
        block = (1, 1) if scale is None else fp8.block_of(info.name, source.config)
        try:
            new = ops.pack_weights(
                weight, scale, group_size=how.group_size, symmetric=how.symmetric, block=block, name=info.name
            )
        except ops.WeightError as error:
            raise DscError(error.what, error.fix) from None
        waiting["weight_scale"].write(_bytes(new.scale))
        if new.zero_point is not None:
            waiting["weight_zero_point"].write(_bytes(new.zero_point))
        yield _bytes(new.packed)


def slice_of(source: Checkpoint, info: TensorInfo, start: int, count: int) -> tuple[Tensor, Tensor | None]:
    """Rows [start, start + count) as they are stored, and their scales in float32."""
    found = {suffix: source.read_slice(info.name, suffix, start, count) for suffix in info.parts}
    weight = found.pop("weight")  # the kernel refuses what is not finite
    return weight, fp8.finite_scale(next(iter(found.values())), info.name) if found else None


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def _waiting(work: Path, suffixes: list[str]) -> Iterator[Mapping[str, IO[bytes]]]:
    """Give a file without a name for each part that comes later: nothing is left of it, whatever happens."""
    with disk_errors(work), ExitStack() as stack:
        yield {suffix: stack.enter_context(TemporaryFile(dir=work)) for suffix in suffixes}


def _append(shard: OpenShard, name: str, suffix: str, place: Location, pieces: Iterator[memoryview]) -> None:
    if place.bytes % ELEMENT:  # small: only tables of a few rows have such a size
        raw = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8)
        shard.file.add(stored_name(name, suffix), raw.view(place.dtype).view(place.shape))
    else:
        shard.file.stream(stored_name(name, suffix), place, pieces)


def _copied(file: IO[bytes], work: Path) -> Iterator[memoryview]:
    while piece := file.read(COPIED):
        yield memoryview(piece)


@dataclass
class _Sums:
    apart: float = 0.0
    whole: float = 0.0


def facts(source: Checkpoint, name: str, how: Rtn) -> dict[str, Any]:
    """Return what there is to say about a table, as about a linear; the error over rows spread over all of it."""
    info = source.header.tensors[name]
    sums, rows = _Sums(), info.shape[0]
    step = max(SAMPLE_ROWS, rows // SAMPLES)
    for start in range(0, rows, step):
        places = torch.arange(start, min(start + SAMPLE_ROWS, rows))
        old = source.read_rows(name, places)
        new = how(old, Statistics()).dequantize()
        sums.apart += float((new - old).double().square().sum())
        sums.whole += float(old.double().square().sum())
    assert how.group_size is not None
    after = sum(part.bytes for part in packed(info, how).parts.values())
    return {
        "name": name.removesuffix(".weight"), "role": "engram", "method": "rtn", "tokens": 0, "fallback": False,
        "weight_error": sums.apart / sums.whole if sums.whole else 0.0, "output_error": None, "zeros": None,
        "bits": 8 * after / math.prod(info.shape), "weights": math.prod(info.shape), "bytes_before": info.bytes,
        "bytes_after": after,
    }  # fmt: skip
