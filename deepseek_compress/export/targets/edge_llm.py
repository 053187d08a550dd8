"""The checkpoint that the exporter of NVIDIA's TensorRT-Edge-LLM takes: `tensorrt-edgellm-export OUT ENGINE_ONNX`.

ModelOpt's W4A16_AWQ form: `weight` uint8 (rows / 2, columns), nibbles in two's complement, the even row low;
`weight_scale` FP16 (rows, columns / 128); w = (q - 8) s. Its INT4 plugin knows no zero points (others are clamped
without a message), is compiled for groups of 128 and for rows and columns that 64 divides; all else is FP16. Source:
tensorrt-edgellm 0.11, which ignores other packed forms and leaves their linears uninitialised.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepseek_compress.checkpoint import Checkpoint, Header, TensorInfo
from deepseek_compress.checkpoint.files import write_json
from deepseek_compress.checkpoint.formats.packed import stored_bits
from deepseek_compress.checkpoint.header import module_of
from deepseek_compress.checkpoint.reader import INDEX
from deepseek_compress.checkpoint.shards import ShardFile
from deepseek_compress.errors import DscError
from deepseek_compress.export.target import Exported, Job, Target, copy_words, sparsity, staged, words
from deepseek_compress.models import Architecture
from deepseek_compress.models.family import IGNORED
from deepseek_compress.numerics.types import Quantized

TYPES = ("llama", "qwen2")
GROUP, MULTIPLE = 128, 64
SHARD_BYTES = 5_000_000_000
RECIPE = "quantise with `-r w4a16-edge`"


class EdgeLlm(Target, frozen=True, extra="forbid"):
    """4-bit symmetric weights in groups of 128, Llama and Qwen2."""

    name: ClassVar[str] = "edge-llm"

    def problems(self, header: Header) -> list[DscError]:
        """Return a family, a packed weight or a missing chat template that the exporter does not take."""
        found = []
        cfg = Architecture.of(header).cfg
        if cfg.model_type not in TYPES:
            why = "TensorRT-Edge-LLM has no latent attention; " if cfg.mla else ""
            what = f"{cfg.model_type}: {why}what is written for its exporter is {' or '.join(TYPES)}"
            return [DscError(what, "export tensorrt-rtx or onnxruntime")]
        packed = [info for info in header.tensors.values() if info.encoding == "packed"]
        if not packed:
            found.append(DscError(f"{header.path}: holds no packed weights", RECIPE))
        tables = {cfg.names.embedding, cfg.names.head}
        for info in packed:
            found += _misfits(info) if info.name not in tables else [_packed_table(info)]
        if not _has_template(header.path):
            fix = "add chat_template.jinja, or chat_template in tokenizer_config.json"
            found.append(DscError(f"{header.path}: has no chat template, which the exporter requires", fix))
        return found

    def write(self, source: Checkpoint, out: Path, job: Job) -> Exported:
        """Tensors, then the words, `hf_quant_config.json`, and config.json last."""
        if sparsity(source):
            job.tell("2:4 zeros stay zeros; TensorRT-Edge-LLM computes them like all others")
        if source.activations:
            job.tell("8-bit activations are not part of it: TensorRT-Edge-LLM computes with 16-bit ones")
        plain = [module_of(info.name)[0] for info in source.header.tensors.values() if _is_plain_linear(info)]
        with staged(out, "config.json", words(source)) as folder:
            size = _write_tensors(source, folder)
            copy_words(source, folder)
            config = {key: value for key, value in source.config.items() if key not in ("quantization_config", "dtype")}
            write_json(folder / "config.json", {**config, "torch_dtype": "float16"})
            write_json(folder / "hf_quant_config.json", _quant_config(sorted({"lm_head", *plain})))
        return Exported("artifact", out / "config.json", {"target": self.name, "bytes": size, "status": "read back"})


def _misfits(info: TensorInfo) -> list[DscError]:
    """Return what stands against one packed weight."""
    rows, columns = info.shape
    size = columns // info.parts["weight_scale"].shape[1]
    bits = stored_bits(info)
    if bits != 4 or "weight_zero_point" in info.parts:
        form = f"{bits} bits" if bits != 4 else "zero points"
        return [DscError(f"{info.name}: {form}; TensorRT-Edge-LLM takes 4 symmetric bits", RECIPE)]
    if size != GROUP:
        return [DscError(f"{info.name}: groups of {size}; TensorRT-Edge-LLM takes {GROUP}", RECIPE)]
    if rows % MULTIPLE or columns % MULTIPLE:
        what = f"{info.name}: {rows} x {columns}; TensorRT-Edge-LLM takes multiples of {MULTIPLE}"
        return [DscError(what, "leave it 16-bit with `overrides`")]
    return []


def _packed_table(info: TensorInfo) -> DscError:
    """Return an embedding or a head on few bits."""
    return DscError(f"{info.name}: packed; TensorRT-Edge-LLM takes 16 bits", "quantise without embedding and head")


def _has_template(folder: Path) -> bool:
    from deepseek_compress.export.vocabulary import template_of
    from deepseek_compress.models.tokenizer import load_tokenizer

    return template_of(load_tokenizer(folder)) is not None


def _is_plain_linear(info: TensorInfo) -> bool:
    return info.encoding != "packed" and len(info.shape) == 2 and "embed" not in info.name


def _write_tensors(source: Checkpoint, folder: Path) -> int:
    """Shards and their index; returns the bytes of the shards."""
    places: dict[str, int] = {}
    shards, number = [], 1
    open_shard = ShardFile(folder / f"model-{number:05d}.safetensors")
    for info in source.header.tensors.values():
        if IGNORED.search(info.name):
            continue
        if open_shard.bytes >= SHARD_BYTES or open_shard.full:
            shards.append(open_shard.close())
            number += 1
            open_shard = ShardFile(folder / f"model-{number:05d}.safetensors")
        for name, tensor in _stored(source, info):
            open_shard.add(name, tensor)
            places[name] = number
    shards.append(open_shard.close())
    weight_map = {name: f"model-{place:05d}.safetensors" for name, place in places.items()}
    size = sum(shard.bytes for shard in shards)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return size


def _stored(source: Checkpoint, info: TensorInfo) -> Iterator[tuple[str, Tensor]]:
    packed = source.read_quantized(info.name) if info.encoding == "packed" else None
    if packed is None:
        yield info.name, _half(info.name, source.read(info.name, torch.float32))
        return
    yield info.name, paired_rows(packed)
    yield f"{module_of(info.name)[0]}.weight_scale", _half(info.name, packed.scale)


def paired_rows(weight: Quantized) -> Tensor:
    """Codes (rows, columns) as two's complement nibbles, uint8 (rows / 2, columns): the even row in the low half."""
    signed = (weight.codes.to(torch.int16) - 8) & 0xF
    return (signed[0::2] | (signed[1::2] << 4)).to(torch.uint8)


def _half(name: str, value: Tensor) -> Tensor:
    half = value.half()
    if not bool(torch.isfinite(half).all()):
        raise DscError(f"{name}: {float(value.abs().max()):g} is too large for FP16", "export tensorrt in bfloat16")
    return half


def _quant_config(excluded: list[str]) -> dict[str, Any]:
    quantization = {
        "quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None, "group_size": GROUP, "has_zero_point": False,
        "pre_quant_scale": False, "exclude_modules": excluded,
    }  # fmt: skip
    return {"producer": {"name": "deepseek-compress"}, "quantization": quantization}
