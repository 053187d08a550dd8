"""`--memory` is kept: the pages of all processes of a run, counted from outside, stay below it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_compress.compress.forecast import TEXT, calibrated_cost
from deepseek_compress.machine import resident
from deepseek_compress.models.families.table import family_of
from deepseek_compress.planning.costs import Memory
from tests.conftest import V3_CONFIG, finish_directory, write_shards

WIDE = {
    **V3_CONFIG, "num_hidden_layers": 2, "hidden_size": 3072, "intermediate_size": 1024, "moe_intermediate_size": 512,
    "q_lora_rank": 256, "kv_lora_rank": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose Hessians are larger than what libraries take more or less."""
    out = tmp_path_factory.mktemp("wide")
    family, generator = family_of(WIDE), torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.02).bfloat16()
        for name, shape in family.tensors(family.parse(WIDE)).items()
    }
    write_shards(out, tensors, shards=2)
    return finish_directory(out, WIDE)


def dsc(*arguments: str) -> tuple[int, dict[str, Any], int]:
    """Exit code, answer, and the largest sum of PSS that was seen."""
    command = [sys.executable, "-m", "deepseek_compress", *arguments, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process.pid) or 0)
        time.sleep(0.02)
    output, _ = process.communicate()
    return process.returncode, json.loads(output), peak


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w4a16-fast", pytest.param("w4a16", marks=pytest.mark.verify)])
def test_the_least_memory_that_plan_names_is_enough_and_kept(recipe: str, wide: Path, tmp_path: Path) -> None:
    options = ["-r", recipe, "--group-size", "128", "--samples", "8", "--length", "128"]
    code, answer, _ = dsc("plan", str(wide), *options, "--memory", "100MB")
    assert code == 1
    ((problem,),) = (answer["problems"],)
    named = re.fullmatch(r"give --memory ([0-9.]+)GiB", problem["fix"])
    assert named is not None
    least = float(named[1])

    code, answer, _ = dsc(
        "quantize", str(wide), "-o", str(tmp_path / "refused"), *options, "--memory", f"{least - 0.2}GiB"
    )
    assert code == 1
    assert problem["what"].split(",")[0] in answer["problems"][0]["what"]

    out = tmp_path / "least"
    code, _, peak = dsc("quantize", str(wide), "-o", str(out), *options, "--memory", f"{least}GiB", "--workers", "2")
    assert code == 0
    assert 0.3 * least < peak / 2**30 < least

    code, planned, _ = dsc("plan", str(wide), *options, "--workers", "2")
    (stage,) = planned["stages"]
    assert (code, stage["workers"]) == (0, 2)
    two = tmp_path / "two"
    code, _, peak = dsc("quantize", str(wide), "-o", str(two), *options, "--workers", "2")
    assert code == 0
    assert 0.3 * stage["memory"] < peak < stage["memory"]
    assert {file.name: file.read_bytes() for file in out.glob("*.safetensors")} == {
        file.name: file.read_bytes() for file in two.glob("*.safetensors")
    }


def test_eight_gibibytes_hold_a_block_of_the_published_v3() -> None:
    """From shapes alone: 128 x 512 tokens, two workers."""
    config = {
        **V3_CONFIG, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 4,
        "moe_intermediate_size": 2048, "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    }  # fmt: skip
    family = family_of(config)
    cfg = family.parse(config)
    for layer in (0, 3):
        linears = family.linears(cfg, layer)
        cost = calibrated_cost(cfg, linears, linears, samples=128, length=512, paired=False)
        peak = Memory(TEXT + cost.alone, TEXT + cost.resident, cost.task).peak(workers=2)
        assert 4 * 2**30 < peak < 8 * 2**30
