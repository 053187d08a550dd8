"""A checkpoint as one GGUF file, which llama.cpp and what is built on it run: Llama, Qwen2, Qwen3, DeepSeek-V2 and V3.

Codes stay where GGUF has a type for them (`gguf_blocks`); what loses its codes becomes Q8_0, or BF16 where 32 does not
divide its columns, and is counted. Matrices that are not packed keep their 16 bits; vectors and routers are FP32, as
llama.cpp wants them. Which tensors: `gguf_tensors`; what is said of the model: `gguf_metadata`. Left out: shards.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.checkpoint.files import remove
from deepseek_compress.errors import DscError, raise_problems
from deepseek_compress.export.gguf_metadata import check_model, describe, divisors_of
from deepseek_compress.export.gguf_tensors import ARCHITECTURES, Part, left_out, parts_of, pieces
from deepseek_compress.export.graph import Array
from deepseek_compress.export.vocabulary import read_vocabulary
from deepseek_compress.models import Architecture


def export_gguf(source: Checkpoint, path: Path) -> dict[str, Any]:
    """Write `path` piece by piece, read it back, and return facts: bytes, how many tensors each type has, and so on.

    Raises `Problems` for a model that GGUF, or llama.cpp, has no form for; nothing is left then.
    """
    raise_problems(problems(source.header))
    import gguf

    cfg = Architecture.of(source).cfg
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURES[cfg.model_type])
    parts, divisors = list(parts_of(source.header, cfg)), divisors_of(cfg)
    kinds = Counter(part.kind for part in parts)
    try:
        describe(writer, source, cfg, read_vocabulary(source.path, cfg.vocab_size), kinds)
        sizes = [_announce(writer, part) for part in parts]
        if divisors is not None:
            writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        written = {}
        for part, size in zip(parts, sizes, strict=True):
            data = _Pieces(size, pieces(source, part))
            writer.write_tensor_data(data)
            written[part.name] = data.digest.digest()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        writer.close()
        _read_back(partial, written)
        partial.replace(path)
    finally:
        writer.close()
        remove(partial)
    return {
        "bytes": path.stat().st_size,
        "types": dict(sorted(kinds.items())),
        "recoded": sum(part.recoded for part in parts),
        "left_out": left_out(source.header, cfg),
    }


def problems(header: Header) -> list[DscError]:
    """Everything that stands against a GGUF file of this checkpoint, from headers and the tokenizer's file."""
    found: list[DscError] = []
    try:
        import gguf  # noqa: F401
    except ImportError:
        found.append(DscError("gguf is not installed", "pip install 'deepseek-compress[gguf]'"))
    cfg = Architecture.of(header).cfg
    if cfg.model_type not in ARCHITECTURES:
        fix = "export compressed-tensors and serve with vLLM, or export onnx"
        return [*found, DscError(f"{cfg.model_type}: GGUF is written for {', '.join(ARCHITECTURES)} only", fix)]
    found += check_model(cfg)
    try:
        read_vocabulary(header.path, cfg.vocab_size)
    except DscError as error:
        found.append(error)
    return found


class _Pieces:
    """A tensor for `GGUFWriter`, made piece by piece while it is written."""

    def __init__(self, nbytes: int, data: Iterator[Array]) -> None:
        self.nbytes, self.data, self.digest = nbytes, data, hashlib.blake2b()

    def tofile(self, file: BinaryIO) -> None:
        """Write all pieces."""
        before = file.tell()
        for piece in self.data:
            self.digest.update(piece.data)
            file.write(piece.data)
        if file.tell() - before != self.nbytes:
            raise ValueError(f"{file.tell() - before} bytes were written, {self.nbytes} announced")


def _announce(writer: Any, part: Part) -> int:
    """Add name, type and shape to the header; returns the tensor's bytes."""
    import gguf

    kind = gguf.GGMLQuantizationType[part.kind]
    shape = gguf.quant_shape_to_byte_shape(part.shape, kind)
    size = int(np.prod(shape))
    writer.add_tensor_info(part.name, shape, np.dtype(np.uint8), size, kind)
    return size


def _read_back(path: Path, written: Mapping[str, bytes]) -> None:
    """Raise `DscError` where the file does not hold the bytes that were given."""
    import gguf

    for tensor in gguf.GGUFReader(path).tensors:
        digest = hashlib.blake2b(np.ascontiguousarray(tensor.data).data).digest()
        if written.get(tensor.name, digest) != digest:
            raise DscError(f"{path}: {tensor.name} reads back otherwise than it was written", "check the disk")
