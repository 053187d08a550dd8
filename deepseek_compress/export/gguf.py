"""A Llama or Qwen2 checkpoint (the R1-Distill models) as one GGUF file, which llama.cpp and what is built on it run.

A packed weight w = (q - z) s keeps its codes; blocks of 32 take the scale of the group they lie in:

| our weight | GGUF type | a block of 32 | w' |
|---|---|---|---|
| 2 to 4 bits | Q4_1 | d, m in FP16, 32 codes of 4 bits | d q + m, d = fp16(s), m = fp16(-z d) |
| 4 bits, symmetric | Q4_0 | d in FP16, 32 codes of 4 bits | d (q - 8) |
| 8 bits, symmetric | Q8_0 | d in FP16, 32 codes of 8 bits | d (q - 128) |

so that |w' - w| <= |q - z| |d - s| + |m + z d|, and FP16 rounds x by at most max(2^-11 |x|, 2^-25): see `bound`.
Nothing is quantised here. Matrices that are not packed keep their 16 bits; vectors are FP32, as llama.cpp wants them.

llama.cpp rotates neighbouring channels of a Llama, so that the rows of q and k change places; Qwen2's stay. llama3's
frequencies are given as a tensor of divisors. Source: the format's description in ggml/docs/gguf.md and llama.cpp's
convert_hf_to_gguf.py. Left out: shards, and every family whose layers have other tensors.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek_compress.checkpoint import Checkpoint, Header, TensorInfo
from deepseek_compress.checkpoint.formats.packed import bits_of
from deepseek_compress.errors import DscError, raise_problems
from deepseek_compress.export.graph import Array
from deepseek_compress.export.vocabulary import Vocabulary, read_vocabulary
from deepseek_compress.models import Architecture
from deepseek_compress.models.config import ModelConfig
from deepseek_compress.models.family import IGNORED
from deepseek_compress.models.rope import frequencies, yarn_mscale
from deepseek_compress.numerics.types import Quantized

ARCHITECTURES = ("llama", "qwen2")
BLOCK = 32
HEAD = "lm_head.weight"


class Part(NamedTuple):
    """One tensor of the file."""

    name: str  # in GGUF
    info: TensorInfo
    kind: str  # GGUF's type
    heads: int  # its rows change places within so many heads; 0: they stay


def export_gguf(source: Checkpoint, path: Path) -> dict[str, Any]:
    """Write `path` tensor by tensor, read it back, and return facts: bytes and how many tensors each type has.

    Raises `Problems` for a model that GGUF, or llama.cpp, has no form for; nothing is left then.
    """
    raise_problems(problems(source.header))
    import gguf

    cfg = Architecture.of(source).cfg
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, cfg.model_type)
    parts = list(_parts(source.header, cfg))
    divisors = _divisors(cfg)
    try:
        _describe(writer, source, cfg, read_vocabulary(source.path, cfg.vocab_size))
        for part in parts:
            kind = gguf.GGMLQuantizationType[part.kind]
            shape = gguf.quant_shape_to_byte_shape(part.info.shape, kind)
            writer.add_tensor_info(part.name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
        if divisors is not None:
            writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        written = {}
        for part in parts:
            data = _bytes(source, part)
            writer.write_tensor_data(data)
            written[part.name] = hashlib.blake2b(data.data).digest()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        writer.close()
        _read_back(partial, written)
        partial.replace(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return {"bytes": path.stat().st_size, "types": dict(sorted(Counter(part.kind for part in parts).items()))}


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
        return [*found, DscError(f"{cfg.model_type}: GGUF is written for {' and '.join(ARCHITECTURES)} only", fix)]
    for check in (lambda: _check_rope(cfg), lambda: read_vocabulary(header.path, cfg.vocab_size)):
        try:
            check()
        except DscError as error:
            found.append(error)
    for info in header.tensors.values():
        try:
            kind_of(info)
        except DscError as error:
            found.append(error)
    return found


def kind_of(info: TensorInfo) -> str:
    """The GGUF type a tensor is stored in. Raises `DscError` for a packed weight that none holds."""
    if info.encoding != "packed":
        wide = {torch.float32: "F32", torch.float16: "F16"}
        return "F32" if len(info.shape) == 1 else wide.get(info.dtype, "BF16")
    columns = info.shape[1]
    bits = bits_of(info.name, info.parts["weight_packed"].shape[1], columns) if "weight_packed" in info.parts else 8
    symmetric = "weight_zero_point" not in info.parts
    size = columns // info.parts["weight_scale"].shape[1]
    if size % BLOCK:
        raise DscError(f"{info.name}: groups of {size} are no multiple of GGUF's {BLOCK}", "quantise with groups of 64")
    if bits > 4 and not (bits == 8 and symmetric):
        what = f"{info.name}: GGUF has no type for {bits} bits" + ("" if symmetric else " with zero points")
        raise DscError(what, "use 4 bits, or 8 symmetric ones, or export compressed-tensors")
    return "Q8_0" if bits == 8 else "Q4_0" if bits == 4 and symmetric else "Q4_1"


def bound(weight: Quantized) -> Tensor:
    """How far a weight in GGUF may be from ours, (rows, columns): FP16 rounds d and m."""

    def half(value: Tensor) -> Tensor:
        return torch.clamp(2.0**-11 * value.abs(), min=2.0**-25)

    rows, columns = weight.codes.shape
    scale, zero = weight.scale.unsqueeze(-1), weight.zero_point.float().unsqueeze(-1)
    steps = (weight.codes.view(rows, weight.scale.shape[1], -1).float() - zero).abs()
    least = half(zero * (scale + half(scale))) if not weight.symmetric or weight.num_bits < 4 else 0.0
    return (steps * half(scale) + least).reshape(rows, columns)


# ---- tensors


def _parts(header: Header, cfg: ModelConfig) -> Iterator[Part]:
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[cfg.model_type.upper()], cfg.num_hidden_layers)
    heads = {"q_proj": cfg.num_attention_heads, "k_proj": cfg.num_key_value_heads}
    for name, info in header.tensors.items():
        if IGNORED.search(name) or (name == HEAD and cfg.tie_word_embeddings):
            continue
        moved = heads.get(name.split(".")[-2], 0) if cfg.model_type == "llama" else 0
        yield Part(names.get_name(name, try_suffixes=(".weight", ".bias")), info, kind_of(info), moved)


def _bytes(source: Checkpoint, part: Part) -> Array:
    """The tensor as GGUF stores it: uint8 (rows, bytes of a row), or (bytes,)."""
    if part.kind in PACKED:
        found = source.read_quantized(part.info.name)
        assert found is not None  # kind_of saw that it is packed
        data: Array = PACKED[part.kind](found)
    else:
        kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        data = source.read(part.info.name, kinds[part.kind]).contiguous().view(torch.uint8).numpy()
    if not part.heads:
        return data
    order = np.arange(len(data)).reshape(part.heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return np.ascontiguousarray(data[order])


def _halves(weight: Quantized) -> tuple[Array, Array]:
    """d of each block, FP16 (rows, blocks, 1), and the codes, uint8 (rows, blocks, 32)."""
    rows = len(weight.codes)
    d = weight.scale.half().repeat_interleave(weight.group_size // BLOCK, dim=1)
    if not bool(torch.isfinite(d).all()):
        raise DscError(f"a scale of {float(weight.scale.max()):g} is too large for FP16", "export compressed-tensors")
    return d.numpy()[..., None], weight.codes.numpy().reshape(rows, -1, BLOCK)


def _nibbles(codes: Array) -> Array:
    """(rows, blocks, 32) -> (rows, blocks, 16): code i of a block in the low half of byte i, 16 + i in the high."""
    packed: Array = codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
    return packed


def _join(*pieces: Array) -> Array:
    """Pieces of each block, (rows, blocks, n) of any type, as uint8 (rows, bytes)."""
    joined = np.concatenate([np.ascontiguousarray(piece).view(np.uint8) for piece in pieces], axis=-1)
    return joined.reshape(len(joined), -1)


def _q4_1(weight: Quantized) -> Array:
    d, codes = _halves(weight)
    zero = weight.zero_point.float().repeat_interleave(weight.group_size // BLOCK, dim=1).numpy()[..., None]
    m = (-zero * d.astype(np.float32)).astype(np.float16)
    if not np.isfinite(m).all():
        raise DscError(f"a scale of {float(d.max()):g} is too large for FP16", "export compressed-tensors")
    return _join(d, m, _nibbles(codes))


def _q4_0(weight: Quantized) -> Array:
    d, codes = _halves(weight)
    return _join(d, _nibbles(codes))


def _q8_0(weight: Quantized) -> Array:
    d, codes = _halves(weight)
    return _join(d, (codes.astype(np.int16) - 128).astype(np.int8))


PACKED = {"Q4_1": _q4_1, "Q4_0": _q4_0, "Q8_0": _q8_0}


def _read_back(path: Path, written: Mapping[str, bytes]) -> None:
    """Raise `DscError` where the file does not hold the bytes that were given."""
    import gguf

    for tensor in gguf.GGUFReader(path).tensors:
        digest = hashlib.blake2b(np.ascontiguousarray(tensor.data).data).digest()
        if written.get(tensor.name, digest) != digest:
            raise DscError(f"{path}: {tensor.name} reads back otherwise than it was written", "check the disk")


# ---- what the model is


def _check_rope(cfg: ModelConfig) -> None:
    rope = cfg.rope
    if rope.kind == "llama3" and cfg.model_type != "llama":
        raise DscError(f"{cfg.model_type} with llama3 rotary scaling has no form in GGUF", "export onnx")
    plain = frequencies(rope)[1] == yarn_mscale(rope.factor, 1.0) and rope.truncate and not rope.mscale_all_dim
    if rope.kind == "yarn" and not plain:
        raise DscError("yarn with its own attention factor has no form in GGUF", "export onnx")


def _divisors(cfg: ModelConfig) -> Array | None:
    """What llama.cpp divides the angle of each channel pair by, float32 (dim / 2,): llama3's scaling."""
    if cfg.rope.kind != "llama3":
        return None
    plain = 1.0 / cfg.rope.theta ** (torch.arange(0, cfg.rope.dim, 2, dtype=torch.float32) / cfg.rope.dim)
    divisors: Array = (plain / frequencies(cfg.rope)[0]).numpy()
    return divisors


def _describe(writer: Any, source: Checkpoint, cfg: ModelConfig, words: Vocabulary) -> None:
    """Metadata: sizes, rotary embedding, tokenizer."""
    import gguf

    packed = any(info.encoding == "packed" for info in source.header.tensors.values())
    writer.add_type("model")
    writer.add_name(source.path.resolve().name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1 if packed else gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_dimension_count(cfg.rope.dim)
    writer.add_rope_freq_base(cfg.rope.theta)
    if cfg.rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[cfg.rope.kind.upper()])
        writer.add_rope_scaling_factor(cfg.rope.factor)
    if cfg.rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(cfg.rope.original_length)
        writer.add_rope_scaling_yarn_beta_fast(cfg.rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(cfg.rope.beta_slow)
    words.describe(writer)
