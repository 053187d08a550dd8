"""Calibration statistics on disk: a safetensors file a block, named by the block, and the manifest last.

    statistics-00003.safetensors    "model.layers.3.mlp.in.hessian", ".input_absmax", ".input_absmean", ".tokens", ...

A name is the block's prefix and the input that linears share. Of the symmetric Hessian (n, n) only what stands on and
above the diagonal is stored, row by row: n (n + 1) / 2 numbers of float32. A file is kept in `.dsc_partial`
until all are safe, with its size and hash, so that an interrupted run goes on after the last one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_compress.checkpoint.files import disk_errors, hash_file, kept, sync, write_sealed
from deepseek_compress.checkpoint.header import Location, read_shard_header
from deepseek_compress.checkpoint.ledger import OpenShard
from deepseek_compress.checkpoint.owned import PARTIAL, announce, recorded
from deepseek_compress.checkpoint.reader import read_tensor
from deepseek_compress.checkpoint.shards import ShardFile
from deepseek_compress.checkpoint.verified import check, hash_of, manifest_of
from deepseek_compress.errors import DscError, raise_problems
from deepseek_compress.numerics.hessian import mirror
from deepseek_compress.numerics.types import Statistics

FIELDS = ("hessian", "input_absmax", "input_absmean")
STAGE = "calibrate"  # that writes the manifest
_AGAIN = "collect them again with dsc calibrate"


def parts_of_statistics(statistics: Statistics) -> dict[str, Tensor]:
    """Return the tensors that are stored for an input's statistics."""
    parts = {field: getattr(statistics, field) for field in FIELDS}
    found = {field: tensor for field, tensor in parts.items() if tensor is not None}
    if "hessian" in found:
        found["hessian"] = pack_triangle(found["hessian"])
    return {**found, "tokens": torch.tensor([statistics.tokens])}


def pack_triangle(matrix: Tensor) -> Tensor:
    """(n, n) -> (n (n + 1) / 2,): each row from the diagonal on."""
    n, done = len(matrix), 0
    out = matrix.new_empty(n * (n + 1) // 2)
    for row in range(n):
        out[done : done + n - row] = matrix[row, row:]
        done += n - row
    return out


def unpack_triangle(flat: Tensor) -> Tensor:
    """Restore the symmetric (n, n) from the output of `pack_triangle`."""
    n, done = int(((8 * len(flat) + 1) ** 0.5 - 1) / 2 + 0.5), 0
    out = flat.new_zeros(n, n)
    for row in range(n):
        out[row, row:] = flat[done : done + n - row]
        done += n - row
    return mirror(out)


class StatisticsWriter:
    """Takes what the block loop stores of each block; `flush` ends a block.

    `blocks`: the names of each block's tensors, by which the loop knows what is done.
    """

    def __init__(self, out: Path, blocks: Sequence[Collection[str]]) -> None:
        self.out, self._blocks = out, blocks
        self._open: ShardFile | None = None
        self._shards: list[dict[str, Any]] = []  # of finished blocks: {"bytes", "blake3"}
        (out / PARTIAL).mkdir(parents=True, exist_ok=True)
        while self._done < len(blocks) and (shard := self._taken(self._done)) is not None:
            self._shards.append(shard)

    @property
    def written(self) -> frozenset[str]:
        """Names of tensors of the blocks that are safe on the disk."""
        return frozenset(name for block in self._blocks[: self._done] for name in block)

    def add_raw(self, name: str, parts: Mapping[str, Tensor]) -> None:
        """Write the parts of the input `name`."""
        if self._open is None:
            self._open = ShardFile(self._growing)
        for suffix, tensor in parts.items():
            self._open.add(f"{name}.{suffix}", tensor)

    def keep(self, name: str) -> None:
        """Ignore a tensor of the model, which is not stored."""

    def append(self, name: str, write: Callable[[OpenShard], None]) -> None:
        """Ignore a tensor of the model, which is not stored."""

    def flush(self) -> None:
        """End the block: its file appears."""
        if self._open is not None:
            shard = self._open.close()
            facts = {"bytes": shard.bytes, "blake3": shard.blake3}
            with disk_errors(self._growing):
                os.replace(self._growing, self._path(self._done))
            write_sealed(self._path(self._done).with_suffix(".json"), facts)
            self._open = None
            self._shards.append(facts)

    def in_sequence(self) -> None:
        """Nothing to forget: only what comes before the first damaged file was taken up."""

    def finish(self) -> dict[str, str]:
        """Give the files their places; BLAKE3 of each. The directory they grew in goes with the manifest's writing."""
        files = [self._path(number) for number in range(len(self._blocks))]
        announce(self.out, [file.name for file in files])
        for file in files:
            with disk_errors(file):
                os.replace(file, self.out / file.name)
        sync(self.out)
        return {file.name: shard["blake3"] for file, shard in zip(files, self._shards, strict=True)}

    @property
    def _done(self) -> int:
        return len(self._shards)

    def _taken(self, number: int) -> dict[str, Any] | None:
        """Take a block's file of an interrupted run, if it is intact; also one that has its place already."""
        file, facts = self._path(number), kept(self._path(number).with_suffix(".json"))
        named = self.out / file.name
        if facts is not None and not file.exists() and named.is_file() and named.name in recorded(self.out):
            os.replace(named, file)
        return facts if facts is not None and file.is_file() and hash_file(file) == facts["blake3"] else None

    @property
    def _growing(self) -> Path:
        return self.out / PARTIAL / "growing.tmp"

    def _path(self, number: int) -> Path:
        return self.out / PARTIAL / f"statistics-{number:05d}.safetensors"


@dataclass(frozen=True)
class SavedStatistics:
    """Statistics on disk; plain values, so that any process can read some of them.

    `divided`: scales (columns,) by the name of the input whose channels they divide, as if it had been seen like that.
    """

    path: Path
    manifest: dict[str, Any]
    places: dict[str, Location]
    divided: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def fields(self) -> frozenset[str]:
        """Names of the statistics that exist for each input."""
        return frozenset(self.manifest["statistics"]["fields"])

    def over(self, scales: Mapping[str, Tensor]) -> SavedStatistics:
        """Those of the same inputs with their channels divided by `scales`."""
        return replace(self, divided=scales)

    def read(self, name: str) -> Statistics:
        """Those of the input `name`, "model.layers.3.mlp.in"."""
        tokens, hessian, absmax, absmean = (self._part(f"{name}.{field}") for field in ("tokens", *FIELDS))
        if tokens is None:
            raise DscError(f"{self.path}: has no statistics of {name}", _AGAIN)
        hessian = None if hessian is None else unpack_triangle(hessian)
        if name in self.divided:
            s = self.divided[name]
            hessian = None if hessian is None else hessian / s[:, None] / s
            absmax, absmean = (None if part is None else part / s for part in (absmax, absmean))
        return Statistics(int(tokens), hessian, absmax, absmean)

    def _part(self, name: str) -> Tensor | None:
        place = self.places.get(name)
        return None if place is None else read_tensor(place, name)


def open_statistics(path: Path) -> SavedStatistics:
    """Open the output of `dsc calibrate` at `path`. Raises DscError for anything else, and for damaged files."""
    manifest = manifest_of(path)
    if manifest is None:
        raise DscError(f"{path}: no statistics in it", "give a directory that dsc calibrate wrote")
    check(path, weights=False)
    if manifest.get("stage") != STAGE or "statistics" not in manifest:
        raise DscError(
            f"{path}: made by {manifest.get('stage')!r}, holds no statistics", "give what dsc calibrate wrote"
        )
    places: dict[str, Location] = {}
    problems: list[DscError] = []
    for name, blake3 in manifest["statistics"]["files"].items():
        found, wrong = read_shard_header(path / name)
        places.update(found)
        if not wrong and hash_of(path / name) != blake3:
            wrong = [DscError(f"{path / name}: not the bytes that were written")]
        problems += [DscError(problem.what, _AGAIN) for problem in wrong]
    raise_problems(problems)
    return SavedStatistics(path, manifest, places)
