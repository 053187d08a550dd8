"""Make a checkpoint of DeepSeek-V4.1's widths that this machine can hold, stored as published, with random values.

    .venv/bin/python -m benchmarks.make_v41 OUT                    # 12 GB
    .venv/bin/python -m benchmarks.make_v41 OUT --layers 7 --experts 32 --engram-gb 2

Every width, encoding and kind of block of V4.1-Flash: window alone, Full with two tokens an entry and with one, Reuse,
Reindex inside candidates; FP8 in blocks of 32 x 32, FP4 experts, an Engram table, a drafting block and the image
encoder. Fewer blocks, experts and rows. Values are drawn with the spread of trained weights, from a table of 65,536, so
that a disk is filled as fast as it takes them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import v41_layout
from deepseek_compress.models.config import Engram
from deepseek_compress.models.engram import primes
from deepseek_compress.tasks import write_tokenizer

WORDS = 512  # of the built-in tasks' tokenizer, no two of which differ in case alone
DRAWN = 1 << 16
PIECE = 1 << 25  # elements
KINDS = {
    "F8_E4M3": (torch.float8_e4m3fn, torch.uint8),
    "BF16": (torch.bfloat16, torch.int16),
    "F32": (torch.float32, torch.int32),
}
ROW = 264  # bytes of a row of an Engram table


def config(layers: int, experts: int, engram_bytes: int) -> dict[str, Any]:
    """The published config.json with fewer blocks, experts and rows."""
    found = copy.deepcopy(v41_layout.CONFIG)
    text = found["text_config"]
    text |= {
        "num_hidden_layers": layers, "compress_ratios": [0, 2, 2, *[1] * (layers - 3), 0],
        "kv_source_layer_ids": [1, 3], "index_source_layer_ids": [1, 3, layers - 2], "candidate_source_layer_id": 3,
        "n_routed_experts": experts, "engram_layer_ids": [1], "engram_compressed_vocab_size": WORDS,
        "num_nextn_predict_layers": 1, "dspark_target_layer_ids": [layers - 3, layers - 2, layers - 1],
        "dspark_n_routed_experts": experts, "eos_token_id": 2,
    }  # fmt: skip
    found["eos_token_id"] = 2
    columns = (text["engram_max_ngram_size"] - 1) * text["engram_n_heads"]
    text["engram_vocab_size"] = max(2, engram_bytes // ROW // columns)
    sizes = (text["engram_max_ngram_size"], text["engram_vocab_size"], text["engram_n_heads"])
    engram = Engram((1,), (), *sizes, text["engram_head_dim"], text["engram_pad_token_id"], WORDS)
    text["engram_num_embeddings"] = [sum(primes(engram)[0])]
    return found


def make(out: Path, given: dict[str, Any], seed: int = 0) -> None:
    """Write the checkpoint: headers first, then values at their places, config.json last."""
    out.mkdir(parents=True, exist_ok=True)
    v41_layout.write_headers(out, given)
    text = (out / "config.json").read_text()
    (out / "config.json").unlink()
    write_tokenizer(out)
    random = np.random.default_rng(seed)
    for file in sorted(out.glob("*.safetensors")):
        draw(file, random)
    (out / "config.json").write_text(text)


def draw(file: Path, random: np.random.Generator) -> None:
    """Write values at the places that the header of a shard names."""
    with open(file, "r+b") as shard:
        start = 8 + int.from_bytes(shard.read(8), "little")
        for name, entry in json.loads(shard.read(start - 8)).items():
            shard.seek(start + entry["data_offsets"][0])
            for piece in drawn(name, entry["dtype"], tuple(entry["shape"]), random):
                shard.write(piece)


def drawn(name: str, dtype: str, shape: tuple[int, ...], random: np.random.Generator) -> Iterator[memoryview]:
    """The bytes of a stored tensor, piece by piece."""
    count = math.prod(shape)
    if dtype == "F8_E8M0":
        table = np.array([_power(name.removesuffix("scale") + "weight", shape)], dtype=np.uint8)
    elif dtype == "I8":
        table = random.integers(0, 256, DRAWN, dtype=np.uint8)
    else:
        spread, mean = (1.0, 0.0) if dtype == "F8_E4M3" else v41_layout.spread(name, shape)
        kind, bits = KINDS[dtype]
        values = torch.from_numpy(random.standard_normal(DRAWN)) * spread + mean
        table = values.to(kind).view(bits).numpy()
    for start in range(0, count, PIECE):
        places = random.integers(0, len(table), min(PIECE, count - start), dtype=np.uint16)
        yield memoryview(table[places]).cast("B")


def _power(weight: str, shape: tuple[int, ...]) -> int:
    """The biased exponent that gives codes of unit spread (FP4: of a mean square of 7.7) a weight's own."""
    fp4 = v41_layout.FP4.search(weight) is not None
    columns = shape[1] * v41_layout.BLOCK
    spread, _ = v41_layout.spread(weight, (shape[0], columns))
    return 127 + round(math.log2(spread / (7.7**0.5 if fp4 else 1.0)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make a checkpoint of DeepSeek-V4.1's widths")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--engram-gb", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    given = config(options.layers, options.experts, int(options.engram_gb * 1e9))
    make(options.out, given, options.seed)
    stored = v41_layout.stored(given)
    print(json.dumps({"tensors": len(stored), "bytes": v41_layout.size(stored), "seed": options.seed}))


if __name__ == "__main__":
    main()
