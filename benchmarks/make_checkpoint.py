"""Write a random checkpoint of DeepSeek-V2-Lite's shape: names, sizes and config as published, real bytes in shards.

    python -m benchmarks.make_checkpoint OUT [--layers N] [--form bf16|fp8] [--shards N] [--seed N]

27 layers are 15.7 G parameters, 31.4 GB in BF16; 3 layers 1.67 G (one dense block and two of 64 experts, embeddings,
head). `fp8` stores the linears in blocks of 128 x 128 as V3 is published, under a V3 config of the same sizes. Weights
are normal with standard deviation 0.02 and uneven rows and columns; every value of a pool of 4,096 rows is drawn, each
tensor takes the pool's rows from another place with another factor. Less than 1.5 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT
from deepseek_compress.models import Role
from deepseek_compress.models.families.table import family_of

POOL = 4096  # rows
STD = 0.02
FP8_MAX = 448.0
V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "torch_dtype": "bfloat16",
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "bos_token_id": 1, "eos_token_id": 2,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
AS_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "num_nextn_predict_layers": 0,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
}  # fmt: skip
PUBLISHED_FP8 = (Role.ATTENTION, Role.MLP, Role.EXPERT, Role.SHARED_EXPERT)
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}


def make(out: Path, form: str = "bf16", layers: int = 27, shards: int = 4, seed: int = 0) -> dict[str, Any]:
    """Write the checkpoint to `out`; gives parameters, linears' parameters, bytes."""
    config = {**V2_LITE, **(AS_V3 if form == "fp8" else {}), "num_hidden_layers": layers}
    made = write_checkpoint(out, config, form, shards, seed, {})
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(ROOT / "builtin" / "nano" / file, out / file)
    return made


def write_checkpoint(
    out: Path, config: dict[str, Any], form: str, shards: int, seed: int, given: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Shards, index and config.json to `out`; the tensors of `given` as they are, all others random."""
    family = family_of(config)
    shapes = family.tensors(family.parse(config))
    stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if form == "fp8" and len(shape) == 2 and family.role(name) in PUBLISHED_FP8:
            stored[name] = (torch.float8_e4m3fn, shape)
            stored[name + "_scale_inv"] = (torch.float32, (-(-shape[0] // 128), -(-shape[1] // 128)))
        else:
            stored[name] = (torch.float32 if name.endswith("correction_bias") else torch.bfloat16, shape)
    generator = torch.Generator().manual_seed(seed)
    pools: dict[tuple[torch.dtype, int], Tensor] = {}
    out.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(_split(stored, shards), start=1):
        file = f"model-{i:05d}-of-{shards:06d}.safetensors"
        _write(out / file, {name: stored[name] for name in names}, generator, pools, given)
        weight_map.update(dict.fromkeys(names, file))
    total = sum(_bytes(*entry) for entry in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    linears = [name for name, shape in shapes.items() if len(shape) == 2 and family.role(name) in PUBLISHED_FP8]
    count = {name: int(torch.Size(shape).numel()) for name, shape in shapes.items()}
    return {
        "parameters": sum(count.values()), "linear_parameters": sum(count[name] for name in linears), "bytes": total
    }  # fmt: skip


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel()) * dtype.itemsize


def _split(stored: dict[str, tuple[torch.dtype, tuple[int, ...]]], shards: int) -> list[list[str]]:
    """Names in order, in files of about equal bytes."""
    total, done = sum(_bytes(*entry) for entry in stored.values()), 0
    files: list[list[str]] = [[] for _ in range(shards)]
    for name, entry in stored.items():
        size = _bytes(*entry)
        files[(2 * done + size) * shards // (2 * total + 1)].append(name)
        done += size
    return files


def _write(
    path: Path,
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    generator: torch.Generator,
    pools: dict[tuple[torch.dtype, int], Tensor],
    given: Mapping[str, Tensor],
) -> None:
    """One safetensors file, synced to the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in entries.items():
        size = _bytes(dtype, shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(fd, struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape) in entries.items():
            own = [given[name].to(dtype)] if name in given else _chunks(name, dtype, shape, generator, pools)
            for chunk in own:
                view = chunk.contiguous().view(torch.uint8).reshape(-1).numpy().data
                while view:
                    view = view[os.write(fd, view[: 1 << 20]) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _chunks(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    generator: torch.Generator,
    pools: dict[tuple[torch.dtype, int], Tensor],
) -> Iterator[Tensor]:
    """The values of one tensor, up to 4,096 rows at a time."""
    if len(shape) == 1:
        noise = torch.randn(shape, generator=generator)
        yield (0.1 * noise if name.endswith("bias") else 1 + 0.1 * noise).to(dtype)
        return
    if name.endswith("_scale_inv"):
        yield STD / _CODES_STD * torch.exp(0.2 * torch.randn(shape, generator=generator))
        return
    rows, columns = shape
    pool = pools.get((dtype, columns))
    if pool is None:
        pool = _pool(columns, generator) * (_CODES_STD if dtype == torch.float8_e4m3fn else STD)
        pool = pools[dtype, columns] = pool.clamp(-FP8_MAX, FP8_MAX).to(dtype)
    factor = float(torch.empty(()).uniform_(0.7, 1.4, generator=generator))
    for begin in range(0, rows, POOL):
        start = int(torch.randint(POOL, (), generator=generator))
        taken = min(POOL, rows - begin)
        for part in (pool[start : start + taken], pool[: max(0, start + taken - POOL)]):
            yield part if dtype == torch.float8_e4m3fn else part * factor


_CODES_STD = 90.0  # of the codes of an FP8 block: its largest of 16,384 values lies near 448


def _pool(columns: int, generator: torch.Generator) -> Tensor:
    """Normal rows (4096, columns), some rows and columns larger than others; standard deviation near 1."""
    uneven = torch.exp(0.15 * torch.randn(POOL, 1, generator=generator))
    uneven = uneven * torch.exp(0.15 * torch.randn(1, columns, generator=generator))
    return torch.randn(POOL, columns, generator=generator) * uneven


def main() -> None:
    """Parse, write, print the facts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--form", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(make(options.out, options.form, options.layers, options.shards, options.seed)))


if __name__ == "__main__":
    main()
