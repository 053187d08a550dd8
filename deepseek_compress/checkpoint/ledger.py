"""A shard with its ledger: what it holds, how, and what there is to say about it, written next to it once it is safe.

    .dsc_partial/shard-00003.safetensors    grows, is synced and read back
    .dsc_partial/shard-00003.json           comes last; without it the shard is unfinished

Any process may write a shard; the writer of the checkpoint takes up those that have a ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_compress.checkpoint.files import hash_file, kept, remove, write_sealed
from deepseek_compress.checkpoint.formats import mxfp4, packed
from deepseek_compress.checkpoint.header import Location, module_of, stored_name
from deepseek_compress.checkpoint.quantization_config import Stored, describe
from deepseek_compress.checkpoint.reader import Checkpoint, check_finite, read_tensor
from deepseek_compress.checkpoint.shards import ELEMENT, Outline, Shard, ShardFile
from deepseek_compress.numerics.types import Quantized

STREAMED = 32 << 20  # bytes from which a tensor is copied without ever being whole in memory


class Ledger(NamedTuple):
    """A finished shard."""

    shard: Shard
    stored: dict[str, Stored]  # logical name -> how it is stored, in the order written
    facts: list[dict[str, Any]]


class OpenShard:
    """An unfinished shard. `thread` writes while tensors still come; `outline`: all that will come, if it is known."""

    def __init__(self, path: Path, thread: Executor | None = None, outline: Outline | None = None) -> None:
        self.path = path
        remove(path.with_suffix(".json"))
        self.file = ShardFile(path, thread, outline)
        self.stored: dict[str, Stored] = {}

    def add(self, name: str, parts: Mapping[str, Tensor]) -> None:
        """Write the stored parts of the logical tensor `name`."""
        self.stored[name] = describe(name, parts)
        for suffix, tensor in parts.items():
            self.file.add(stored_name(name, suffix), tensor)

    def copy(self, source: Checkpoint, name: str, decode: bool = False) -> None:
        """Write a tensor of `source` unchanged, or decoded to 16 bits where its encoding cannot stay."""
        info = source.header.tensors[name]
        if info.encoding != "plain" and decode:
            self.add(name, parts_of(name, source.read(name, None)))
        elif info.encoding != "plain":
            self.add(name, _finite(name, source.read_raw(name)))
        else:
            ((suffix, place),) = info.parts.items()
            if place.bytes < STREAMED or place.bytes % ELEMENT:
                self.add(name, _finite(name, source.read_raw(name)))
            else:
                self.stored[name] = Stored("plain", place.bytes, len(place.shape))
                self.file.stream(stored_name(name, suffix), place, _finite_pieces(name, place.dtype, source, place))

    def keep(self, source: Checkpoint, name: str) -> None:
        """Write a tensor of `source` with its values, as servers read it with packed weights.

        MXFP4 keeps its bytes under their names for them; what is encoded otherwise becomes BF16.
        """
        if source.header.tensors[name].encoding == "mxfp4":
            codes, scale = mxfp4.main_parts(_finite(name, source.read_raw(name)))
            self.add(name, {"weight_packed": codes, "weight_scale": scale})
        else:
            self.copy(source, name, decode=True)

    def untouched(self, source: Checkpoint, name: str) -> None:
        """Write a tensor of `source` byte for byte, under its own names."""
        info = source.header.tensors[name]
        self.stored[name] = Stored("untouched", info.bytes, len(info.shape))
        small = {suffix for suffix, place in info.parts.items() if place.bytes < STREAMED or place.bytes % ELEMENT}
        raw = _finite(name, source.read_raw(name)) if len(small) == len(info.parts) else {}
        for suffix, place in info.parts.items():
            stored = stored_name(name, suffix)
            if suffix in raw:
                self.file.add(stored, raw[suffix])
            elif suffix in small:
                self.file.add(stored, _finite(name, {suffix: read_tensor(place, name)})[suffix])
            else:
                self.file.stream(stored, place, _finite_pieces(name, place.dtype, source, place))

    def close(self, facts: Iterable[dict[str, Any]] = ()) -> Ledger:
        """Make the file safe, then its ledger."""
        ledger = Ledger(self.file.close(), self.stored, list(facts))
        stored = {name: how._asdict() for name, how in ledger.stored.items()}
        value = {"shard": ledger.shard._asdict(), "stored": stored, "facts": ledger.facts}
        write_sealed(self.path.with_suffix(".json"), value)
        return ledger

    def discard(self) -> None:
        """Close and remove the unfinished file."""
        self.file.discard()


def read_ledger(path: Path, verify: bool = True) -> Ledger | None:
    """Return the ledger of the shard `path`; None where it is unfinished, or either of them is damaged."""
    value = kept(path.with_suffix(".json"))
    if value is None or not path.is_file():
        return None
    shard = Shard(**{**value["shard"], "names": tuple(value["shard"]["names"])})
    if path.stat().st_size != shard.bytes or (verify and hash_file(path) != shard.blake3):
        return None
    return Ledger(shard, {name: Stored(**how) for name, how in value["stored"].items()}, value["facts"])


def _finite(name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return stored parts without a NaN or an infinity; `DscError` where there is one."""
    for tensor in parts.values():
        check_finite(name, tensor)
    return parts


def _finite_pieces(name: str, dtype: torch.dtype, source: Checkpoint, place: Location) -> Iterator[memoryview]:
    """Yield the bytes of a plain tensor, checked like that as they pass by."""
    for piece in source.pieces(place):
        check_finite(name, torch.frombuffer(piece, dtype=torch.uint8).view(dtype))
        yield piece


def input_parts(scale: float, zero_point: int, symmetric: bool) -> dict[str, Tensor]:
    """Return the grid of a linear's input under compressed-tensors' names: BF16 (1,) and, unless `symmetric`, int8
    (1,)."""
    parts = {"input_scale": torch.tensor([scale], dtype=torch.bfloat16)}
    return parts if symmetric else {**parts, "input_zero_point": torch.tensor([zero_point], dtype=torch.int8)}


def parts_of(name: str, tensor: Tensor | Quantized, dynamic_int8: bool = False) -> dict[str, Tensor]:
    """Return the stored parts of a tensor: a plain one in its own type, a quantised one packed.

    `dynamic_int8`: inputs are rounded to 8 bits while it runs; symmetric 8-bit weights with one scale a row are then
    stored as `int-quantized`, the form that servers want.
    """
    if not isinstance(tensor, Quantized):
        return {module_of(name)[1]: tensor}
    if dynamic_int8 and tensor.symmetric and tensor.num_bits == 8 and tensor.scale.shape[1] == 1:
        return packed.int8_parts(tensor)
    return packed.pack_weight(tensor)
