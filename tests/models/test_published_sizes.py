"""The dense models that DeepSeek published: read, sized and planned from headers of real shapes, without bytes."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from deepseek_compress import pipeline, resources
from deepseek_compress.models.families.table import family_of
from deepseek_compress.recipe import Changes, read_recipe
from deepseek_compress.survey import survey
from tests.conftest import LLAMA_CONFIG, QWEN2_CONFIG, QWEN3_CONFIG, finish_directory

LONG = 131072
LLAMA3 = {**LLAMA_CONFIG["rope_scaling"], "original_max_position_embeddings": 8192}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "attn_factor": 0.8782488562869419,
    "original_max_position_embeddings": 32768,
}
SIZES: dict[str, tuple[dict[str, Any], tuple[int, ...], float]] = {
    # hidden, blocks, heads, key heads, width of the MLP, vocabulary; parameters in billions
    "R1-Distill-Qwen-1.5B": (QWEN2_CONFIG, (1536, 28, 12, 2, 8960, 151936), 1.777),
    "R1-Distill-Qwen-7B": (QWEN2_CONFIG, (3584, 28, 28, 4, 18944, 152064), 7.616),
    "R1-Distill-Qwen-14B": (QWEN2_CONFIG, (5120, 48, 40, 8, 13824, 152064), 14.770),
    "R1-Distill-Qwen-32B": (QWEN2_CONFIG, (5120, 64, 40, 8, 27648, 152064), 32.764),
    "R1-Distill-Llama-8B": ({**LLAMA_CONFIG, "rope_scaling": LLAMA3}, (4096, 32, 32, 8, 14336, 128256), 8.030),
    "R1-Distill-Llama-70B": ({**LLAMA_CONFIG, "rope_scaling": LLAMA3}, (8192, 80, 64, 8, 28672, 128256), 70.554),
    "R1-0528-Qwen3-8B": ({**QWEN3_CONFIG, "rope_scaling": YARN}, (4096, 36, 32, 8, 12288, 151936), 8.191),
}
KEYS = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size".split()


def published(out: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of these shapes in BF16 whose file has a header, its size, and no bytes."""
    family, header, end = family_of(config), {}, 0
    for name, shape in family.tensors(family.parse(config)).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    path = out / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + end)
    return finish_directory(out, config)


@pytest.mark.parametrize("name", SIZES)
def test_read_sized_and_planned(name: str, tmp_path: Path) -> None:
    base, numbers, billions = SIZES[name]
    config = {**base, **dict(zip(KEYS, numbers, strict=True)), "head_dim": 128, "tie_word_embeddings": False,
              "max_position_embeddings": LONG}  # fmt: skip
    model = published(tmp_path, config)
    found = survey(str(model), verify=False)
    assert found["problems"] == []
    assert found["parameters"] == pytest.approx(billions * 1e9, rel=1e-3)
    for recipe in ("w4a16", "w4a16-fast"):
        planned = pipeline.plan(read_recipe(resources.recipe_path(recipe), Changes(values={"model": str(model)})))
        assert planned.problems == []
        assert planned.bytes is not None
        outside = 4 * config["vocab_size"] * config["hidden_size"]  # embedding and head, 16 bits
        bits = 8 * (planned.bytes - outside) / (found["parameters"] - outside / 2)
        assert 4.15 < bits < 4.2
