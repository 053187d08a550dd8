"""Which tensors a GGUF file has, and how each comes from ours.

llama.cpp rotates neighbouring channels of a Llama, so that the rows of q and k change places; Qwen2's stay. Latent
attention there multiplies the queries by k_b and the sum of latents by v_b: kv_b (heads * (nope + value), rank) becomes
k_b (heads, rank, nope), transposed and therefore without its codes, and v_b (heads, value, rank), with them. The
experts of a block are one tensor (experts, rows, columns) a projection, written expert by expert. Left out:
multi-token prediction. Source: llama.cpp's conversion/llama.py and conversion/deepseek.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from deepseek_compress.checkpoint import Checkpoint, Header, TensorInfo
from deepseek_compress.export.gguf_blocks import PACKED, PLAIN, encode, kept_as, kind_of, recoded
from deepseek_compress.export.graph import Array
from deepseek_compress.models.config import Mla, ModelConfig
from deepseek_compress.models.family import IGNORED

ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2"
}  # fmt: skip
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+\.weight)$")
LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Part(NamedTuple):
    """One tensor of the file."""

    name: str  # in GGUF
    sources: tuple[TensorInfo, ...]  # lie behind each other; one, except for experts
    shape: tuple[int, ...]
    kind: str  # GGUF's type
    rows: Array | None = None  # of each source, in this order; None: all as they are
    transposed: int = 0  # its rows are so many heads, each transposed

    @property
    def recoded(self) -> bool:
        """Whether codes get lost that the checkpoint has."""
        packed = [info for info in self.sources if info.encoding == "packed"]
        return any(self.transposed or kept_as(info) != self.kind for info in packed)


def parts_of(header: Header, cfg: ModelConfig) -> Iterator[Part]:
    """Yield the tensors of the file, in the order of the checkpoint's."""
    import gguf

    arch = gguf.MODEL_ARCH[ARCHITECTURES[cfg.model_type].upper()]
    names = gguf.get_tensor_name_map(arch, cfg.num_hidden_layers)

    def named(name: str) -> str:
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name  # every tensor of these families has one
        return str(found)

    tensors = header.tensors
    for name, info in tensors.items():
        expert = EXPERT.match(name)
        if _left_out(name, cfg) or (expert and int(expert[2])):
            continue
        if expert and cfg.moe is not None:
            stem, _, last = expert.groups()
            sources = tuple(tensors[f"{stem}.{index}.{last}"] for index in range(cfg.moe.experts))
            yield Part(named(f"{stem}.{last}"), sources, (len(sources), *info.shape), _common(sources))
        elif cfg.mla is not None and name.endswith(f"{cfg.names.kv_b}.weight"):
            yield from _halves(named, info, cfg.num_attention_heads, cfg.mla)
        elif name.endswith(cfg.names.ffn.router) and cfg.moe is not None:
            yield Part(named(name), (info,), info.shape, "F32")
        else:
            yield Part(named(name), (info,), info.shape, kind_of(info), _rotated(name, info, cfg))


def left_out(header: Header, cfg: ModelConfig) -> int:
    """Count the tensors of multi-token prediction that the file lacks."""
    return sum(_beyond(name, cfg) for name in header.tensors)


def _beyond(name: str, cfg: ModelConfig) -> bool:
    layer = LAYER.match(name)
    return layer is not None and int(layer[1]) >= cfg.num_hidden_layers


def _left_out(name: str, cfg: ModelConfig) -> bool:
    tied = name == cfg.names.head and cfg.tie_word_embeddings
    return tied or IGNORED.search(name) is not None or _beyond(name, cfg)


def _common(sources: tuple[TensorInfo, ...]) -> str:
    """Return the type of tensors that are stacked: theirs, or one that holds the values of all."""
    kinds = {kind_of(info) for info in sources}
    if len(kinds) == 1:
        return kinds.pop()
    return recoded(sources[0].shape[1]) if any(info.encoding == "packed" for info in sources) else "BF16"


def _halves(named: Callable[[str], str], info: TensorInfo, heads: int, mla: Mla) -> Iterator[Part]:
    """k_b and v_b out of kv_b."""
    rows = np.arange(heads * (mla.nope + mla.value)).reshape(heads, -1)
    kind = recoded(mla.nope) if info.encoding == "packed" else kind_of(info)
    k, v = rows[:, : mla.nope].reshape(-1), rows[:, mla.nope :].reshape(-1)
    rank, stem = mla.kv_lora_rank, info.name.removesuffix("kv_b_proj.weight")
    yield Part(named(stem + "k_b_proj.weight"), (info,), (heads, rank, mla.nope), kind, k, heads)
    yield Part(named(stem + "v_b_proj.weight"), (info,), (heads, mla.value, rank), kind_of(info), v)


def _rotated(name: str, info: TensorInfo, cfg: ModelConfig) -> Array | None:
    """Return the order of the rows of a Llama's q and k: channel i and i + half become neighbours."""
    heads = {"q_proj": cfg.num_attention_heads, "k_proj": cfg.num_key_value_heads}.get(name.split(".")[-2], 0)
    if cfg.model_type != "llama" or not heads:
        return None
    return np.arange(info.shape[0]).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def pieces(source: Checkpoint, part: Part) -> Iterator[Array]:
    """Yield the bytes of a part, source after source: uint8 (rows, bytes of a row), or (bytes,)."""
    for info in part.sources:
        if part.transposed and part.rows is not None:
            weight = source.read(info.name, torch.float32)[torch.from_numpy(part.rows)]
            weight = weight.view(part.transposed, -1, weight.shape[1]).mT
            yield encode(weight.reshape(-1, weight.shape[-1]), part.kind)
            continue
        if info.encoding == "packed" and kept_as(info) == part.kind:
            packed = source.read_quantized(info.name)
            assert packed is not None  # the header says so
            data = PACKED[part.kind](packed)
        else:
            data = encode(source.read(info.name, PLAIN.get(part.kind, torch.float32)), part.kind)
        if part.rows is not None:
            data = data.reshape(info.shape[0], -1)[part.rows]
        yield np.ascontiguousarray(data)
