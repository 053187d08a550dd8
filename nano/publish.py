"""Write trained weights the way DeepSeek publishes: FP8 E4M3 with a float32 scale per block of 128 x 128.

    python -m nano.publish runs/nano/best.pt builtin/nano

Projections are FP8; the embedding, the head, the norms and the router are BF16, the router's bias float32. Three
shards; the last scales of a shard lie in the next one, as happens in the published DeepSeek-V3, so that readers must
look there.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepseek_compress.checkpoint.formats.fp8 import encode_fp8_block
from deepseek_compress.tasks import write_tokenizer

SHARDS = 3
MOVED = 3  # scales at the end of a shard that lie in the next one


def unfused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split transformers' stacked experts, (experts, rows, columns), into one tensor for each expert and projection."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                prefix = name.replace("gate_up_proj", str(expert))
                found[f"{prefix}.gate_proj.weight"], found[f"{prefix}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                found[f"{name.replace('down_proj', str(expert))}.down_proj.weight"] = down
        else:
            found[name] = tensor
    return found


def stored(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor as it is stored, in the order of the layers."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().float()
        if name.endswith("e_score_correction_bias"):
            found[name] = tensor
        elif (tensor.ndim == 2 and name.endswith("_proj.weight")) or name.endswith("kv_a_proj_with_mqa.weight"):
            codes, scale = encode_fp8_block(tensor)
            found[name], found[f"{name}_scale_inv"] = codes, scale
        else:
            found[name] = tensor.bfloat16()
    return {name: found[name].contiguous() for name in sorted(found, key=_order)}


def shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """`SHARDS` parts of about the same size; the last `MOVED` scales of a part are moved to the next."""
    total, size, parts = sum(t.nbytes for t in tensors.values()), 0, [{} for _ in range(SHARDS)]  # type: list[dict[str, Tensor]]
    for name, tensor in tensors.items():
        parts[min(SHARDS - 1, size * SHARDS // total)][name] = tensor
        size += tensor.nbytes
    for part, following in itertools.pairwise(parts):
        for name in [name for name in part if name.endswith("_scale_inv")][-MOVED:]:
            following[name] = part.pop(name)
    return parts


def publish(weights: dict[str, Tensor], out: Path) -> None:
    """Write shards, index and tokenizer next to `out/config.json`."""
    out.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    total = 0
    for number, part in enumerate(shards(stored(unfused(weights))), start=1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        save_file(part, out / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, file))
        total += sum(tensor.nbytes for tensor in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    write_tokenizer(out)


def _order(name: str) -> tuple[int, int, str]:
    layer = int(name.split(".")[2]) if ".layers." in name else 0
    return 0 if "embed_tokens" in name else 1 if ".layers." in name else 2, layer, name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    publish(torch.load(options.weights, map_location="cpu"), options.out)
