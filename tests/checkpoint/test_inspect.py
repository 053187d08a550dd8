"""The summary counts what is on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
from deepseek_compress.checkpoint.inspect import summarize

Pack = Callable[..., Path]


def role(name: str) -> str:
    return "norm" if "norm" in name else "linear" if "_proj" in name else "other"


def test_roles_bits_and_bytes(tiny_v3: Path, tiny_v3_bf16: Path) -> None:
    found, twin = (summarize(open_checkpoint(path), role) for path in (tiny_v3, tiny_v3_bf16))
    assert found["parameters"] == twin["parameters"] == sum(row["parameters"] for row in found["roles"])
    assert found["bytes"] == sum(file.stat().st_size for file in tiny_v3.glob("*.safetensors"))
    assert found["bits_per_weight"] == 8 * found["bytes"] / found["parameters"]
    assert (found["shards"], found["model_type"], found["lineage"]) == (3, "deepseek_v3", [])
    rows = {(row["role"], row["encoding"], row["dtype"]): row for row in found["roles"]}
    assert set(rows) == {
        ("linear", "fp8_block", "float8_e4m3fn"),
        ("norm", "plain", "bfloat16"),
        ("other", "plain", "bfloat16"),
        ("other", "plain", "float32"),
    }
    linear = rows["linear", "fp8_block", "float8_e4m3fn"]
    assert linear["tensors"] == 5 * 3 + 3 + 2 * (8 + 1) * 3
    assert 8 < linear["bits_per_weight"] < 8.1
    assert linear["sparsity"] is None


def test_sparsity_and_lineage_of_an_output(tiny_qwen2: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_qwen2)
    steps = [{"stage": "distill"}, {"stage": "prune"}]
    with CheckpointWriter(tmp_path / "out", source, activations={"num_bits": 8, "granularity": "token"}) as writer:
        for name in source.header.tensors:
            tensor = source.read(name, torch.bfloat16)
            if "_proj.weight" in name:
                tensor[:, ::2] = 0
            writer.add(name, tensor)
        writer.finish({}, {"lineage": steps}, [])
    found = summarize(open_checkpoint(tmp_path / "out"), role, sparsity=True)
    assert found["lineage"] == steps
    assert found["activations"] == {"num_bits": 8, "granularity": "token"}
    rows = {row["role"]: row["sparsity"] for row in found["roles"]}
    assert 0.49 < rows["linear"] <= 0.5  # its biases are dense
    assert rows["norm"] == 0


def test_packed_bits(tiny_llama: Path, pack: Pack) -> None:
    rows = {row["encoding"]: row for row in summarize(open_checkpoint(pack(tiny_llama)), role)["roles"]}
    # 4 bits, 16 + 4 for each group of 64, and 16 bytes of shape a weight
    assert 4 + 20 / 64 < rows["packed"]["bits_per_weight"] < 4 + 20 / 64 + 0.02
