"""Open a checkpoint directory and read its tensors, decoded, one at a time.

Headers are checked first and everything wrong is reported together. A tensor is read with `pread` into fresh memory,
never through mmap: pages of a mapped file count as resident, and a streamed run promises a bound on that. Pickle
files are never opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_compress.checkpoint.files import blocks, disk_errors, ended, fill, inside, open_regular, read_json
from deepseek_compress.checkpoint.fold import fold
from deepseek_compress.checkpoint.formats import fp8, mxfp4, packed
from deepseek_compress.checkpoint.header import Header, Location, TensorInfo, check_same, read_shard_header
from deepseek_compress.checkpoint.owned import CONFIG
from deepseek_compress.checkpoint.rows import read_rows
from deepseek_compress.checkpoint.verified import check, manifest_of
from deepseek_compress.errors import DscError, Problems, raise_problems
from deepseek_compress.numerics.types import Quantized

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_INTEGERS = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64),
)
_NAN_CODES = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C, torch.float8_e8m0fnu: 0xFF}  # and above: none


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. Holds headers only; safe to send to other processes."""

    header: Header

    @property
    def path(self) -> Path:
        """The directory."""
        return self.header.path

    @property
    def config(self) -> dict[str, Any]:
        """config.json as published."""
        return self.header.config

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """dsc_manifest.json, or None where `dsc` did not write this checkpoint."""
        return manifest_of(self.path)

    @property
    def activations(self) -> dict[str, Any] | None:
        """The activation scheme of the manifest (`{"num_bits": 8, "granularity": "token"}`), or None."""
        return (self.manifest or {}).get("activations")

    @property
    def manifest_activations(self) -> dict[str, Any] | None:
        """The same to be shown: without the grid of each input that a static scheme has."""
        found = self.activations
        return found and {key: value for key, value in found.items() if key != "inputs"}

    @property
    def kv_cache(self) -> dict[str, Any] | None:
        """Scheme of keys and values in the manifest (`{"num_bits": 8, ...}`); None: 16 bits."""
        return (self.manifest or {}).get("kv_cache")

    def read(self, name: str, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Read the logical tensor `name` into fresh memory of `device`, where it is decoded.

        Decoded in float32 and rounded once to `dtype`; None keeps the stored type of a plain tensor (BF16 for an
        encoded one). Whole-number tensors keep their type. Raises `DscError` for NaN or infinity.
        """
        return self.decoded(name, {suffix: part.to(device) for suffix, part in self.read_raw(name).items()}, dtype)

    def decoded(self, name: str, parts: dict[str, Tensor], dtype: torch.dtype | None = torch.float32) -> Tensor:
        """`read` of parts that were read before, where they lie."""
        info = self._info(name)
        if info.encoding == "plain":
            (tensor,) = parts.values()
            if tensor.dtype in _INTEGERS:
                return tensor
            decoded = tensor if dtype is None else tensor.to(dtype)
        else:
            decoded = _decode(info, parts, self.config, dtype or torch.bfloat16)
        check_finite(name, decoded)
        return decoded

    def read_rows(
        self,
        name: str,
        places: Tensor,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Read the rows `places`, int64 (n,), of a matrix, decoded like `read`; no others are read from the disk."""
        rows = read_rows(self._info(name), places, self.config, dtype or torch.bfloat16)
        check_finite(name, rows)
        return rows.to(device)

    def read_raw(self, name: str) -> dict[str, Tensor]:
        """Read the stored parts of `name` as they are, into new memory: `{"weight": ..., "weight_scale_inv": ...}`."""
        return {suffix: read_tensor(place, f"{name} ({suffix})") for suffix, place in self._info(name).parts.items()}

    def read_slice(self, name: str, suffix: str, start: int, count: int) -> Tensor:
        """Rows [start, start + count) of the stored part `suffix` of `name`, as they are."""
        place = self._info(name).parts[suffix]
        width, shape = place.bytes // place.shape[0], (count, *place.shape[1:])
        part = Location(place.file, place.offset + start * width, count * width, place.dtype, shape, place.identity)
        return read_tensor(part, f"{name} ({suffix})")

    def pieces(self, place: Location) -> Iterator[memoryview]:
        """Yield the bytes of one stored tensor, unchanged; each piece is valid until the next is asked for."""
        done = 0
        with disk_errors(place.file), open_regular(place.file) as file:
            check_same(place, file.fileno())
            file.seek(place.offset)
            for piece in blocks(file.fileno(), place.bytes):
                done += len(piece)
                yield piece
        if done != place.bytes:
            raise ended(str(place.file))

    def read_quantized(self, name: str) -> Quantized | None:
        """Codes, scale and zero point of a packed weight; None for every other encoding."""
        info = self._info(name)
        if info.encoding != "packed":
            return None
        return packed.unpack_weight(name, self.read_raw(name))

    def check_unchanged(self) -> None:
        """Raise DscError where a shard is another than when its header was read."""
        places = {part.file: part for info in self.header.tensors.values() for part in info.parts.values()}
        for file, place in places.items():
            check_same(place, file)

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.header.tensors[name]
        except KeyError:
            raise DscError(f"{self.path}: no tensor {name}", "see `dsc inspect` for the names") from None


def is_checkpoint(path: Path) -> bool:
    """Whether a checkpoint lies in the directory `path`, as far as its files tell."""
    return (path / CONFIG).is_file() and any(path.glob("*.safetensors"))


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Read config and headers of the checkpoint directory `path`.

    Raises `Problems` with everything that is wrong: missing or damaged files, tensors that the index and the shards
    do not agree on, scales without weights and weights without scales.
    """
    path = Path(path)
    if not path.is_dir():
        raise DscError(f"{path}: no such directory", "give a directory with config.json and *.safetensors")
    problems = list(_irregular(path))
    config: dict[str, Any] = {}
    try:
        check(path, weights=False)
        config = _config(path)
    except Problems as error:
        problems += error.problems
    except DscError as error:
        problems.append(error)
    try:
        stored, promised, found = _stored(path)
        problems += found
        tensors, found = fold(stored, config, absent=promised - stored.keys())
        problems += found
    except DscError as error:
        problems.append(error)
    raise_problems(problems)
    return Checkpoint(Header(path, config, tensors))


def _irregular(path: Path) -> Iterator[DscError]:
    """Yield pipes, directories and links to nowhere in the place of small files, which would count as not there."""
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".jinja") and file.name not in (CONFIG, INDEX) and not file.is_file():
            yield DscError(f"{file}: not a regular file", "put the file itself there, or remove it")


def read_tensor(place: Location, what: str, pinned: bool = False) -> Tensor:
    """One stored tensor in fresh memory; `pinned`: which a GPU reads by itself."""
    buffer = torch.empty(place.bytes, dtype=torch.uint8, pin_memory=pinned)
    view = buffer.numpy().data
    fd = -1
    try:
        fd = os.open(place.file, os.O_RDONLY)
        check_same(place, fd)
        fill(fd, view, place.offset, f"{what}: {place.file}")
    except OSError as error:
        raise DscError(f"{what}: {place.file}: {error.strerror}", "check the disk, then start again") from None
    finally:
        if fd >= 0:
            os.close(fd)
    return buffer.view(place.dtype).view(place.shape)


def _config(path: Path) -> dict[str, Any]:
    config = read_json(path / CONFIG)
    if not isinstance(config.get("quantization_config") or {}, dict):
        raise DscError(f"{path / 'config.json'}: quantization_config is not an object", "download the file again")
    return config


def _stored(path: Path) -> tuple[dict[str, Location], set[str], list[DscError]]:
    """Every stored tensor by name, the names that should be there, and what is wrong with the files."""
    if (path / INDEX).exists():
        return _indexed(path)
    if (path / SINGLE).exists():
        if not inside(path, path / SINGLE):
            raise DscError(f"{path / SINGLE}: a link that leads out of the directory", "put the file itself there")
        tensors, problems = read_shard_header(path / SINGLE)
        return ({}, set(), problems) if problems else (tensors, set(tensors), [])
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    if shards:
        raise DscError(f"{path}: {len(shards)} safetensors files without {INDEX}", "copy the index too")
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise DscError(
            f"{path}: only pickle files ({', '.join(pickles[:3])})",
            "pickle checkpoints are never opened; convert to safetensors",
        )
    raise DscError(f"{path}: no {SINGLE} and no {INDEX}", "give a complete checkpoint directory")


def _indexed(path: Path) -> tuple[dict[str, Location], set[str], list[DscError]]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise DscError(f"{path / INDEX}: no weight_map of names to files", "download the file again")
    problems: list[DscError] = []
    stored: dict[str, Location] = {}
    by_shard: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        by_shard.setdefault(shard, set()).add(name)
    for shard, expected in sorted(by_shard.items()):
        tensors, found = _shard(path, shard)
        problems += found or _disagreements(shard, expected, set(tensors), weight_map)
        stored.update({name: place for name, place in tensors.items() if name in expected})
    strays = sorted({file.name for file in path.glob("model*.safetensors")} - set(by_shard))
    problems += [DscError(f"{path / name}: not named in the index", "remove it, or copy its index") for name in strays]
    return stored, set(weight_map), problems


def _shard(path: Path, shard: str) -> tuple[dict[str, Location], list[DscError]]:
    if "\0" in shard or Path(shard).name != shard or not inside(path, path / shard):
        return {}, [
            DscError(f"{path / INDEX}: {shard!r} leads out of the directory", "name files of the directory only")
        ]
    if not shard.endswith(".safetensors"):
        return {}, [
            DscError(
                f"{path / INDEX}: {shard} is not a safetensors file",
                "pickle checkpoints are never opened; convert to safetensors",
            )
        ]
    if not (path / shard).is_file():
        return {}, [DscError(f"{path / shard}: named in the index, but not there", "download the file")]
    return read_shard_header(path / shard)


def _disagreements(shard: str, expected: set[str], found: set[str], weight_map: dict[str, str]) -> Iterator[DscError]:
    fix = "index and shards are of different checkpoints; download them again"
    for name in sorted(expected - found):
        yield DscError(f"{name}: in the index, but not in {shard}", fix)
    for name in sorted(found - expected):
        other = weight_map.get(name)
        yield DscError(f"{name}: in {shard}, but " + (f"the index says {other}" if other else "not in the index"), fix)


def _decode(info: TensorInfo, parts: dict[str, Tensor], config: dict[str, Any], dtype: torch.dtype) -> Tensor:
    if info.encoding == "fp8_block":
        scale = next(part for suffix, part in parts.items() if suffix != "weight")
        return fp8.decode_fp8_block(parts["weight"], scale, fp8.block_of(info.name, config), dtype, name=info.name)
    if info.encoding == "mxfp4":
        return mxfp4.decode_mxfp4(*mxfp4.main_parts(parts), dtype, name=info.name)
    return packed.unpack_weight(info.name, parts).dequantize(dtype)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise DscError for NaN and infinity in stored floats; integers are what they are.

    One cheap sum first: it is finite unless an element is not, or the sum itself overflows.
    """
    if tensor.dtype in _INTEGERS or not tensor.numel():
        return
    if tensor.dtype.itemsize == 1:  # FP8 has few codes that are none, and no sum of its own
        nan = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor.view(torch.uint8) & 0x7F
        bad = int((nan >= _NAN_CODES[tensor.dtype]).sum())
    elif bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return
    else:
        bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise DscError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite", "download the file again")
