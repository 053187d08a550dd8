"""Reading: every published encoding, by value against slow references."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from deepseek_compress.checkpoint import open_checkpoint


def test_fp8_reads_as_the_bf16_twin(tiny_v3: Path, tiny_v3_bf16: Path) -> None:
    fp8, bf16 = open_checkpoint(tiny_v3), open_checkpoint(tiny_v3_bf16)
    assert set(fp8.header.tensors) == set(bf16.header.tensors)
    assert {info.encoding for info in fp8.header.tensors.values()} == {"plain", "fp8_block"}
    for name, info in fp8.header.tensors.items():
        twin = bf16.read(name, torch.bfloat16)
        assert info.shape == tuple(twin.shape)
        assert torch.equal(fp8.read(name, torch.bfloat16), twin), name


def test_a_scale_may_lie_in_another_shard(tiny_v3: Path) -> None:
    parts = open_checkpoint(tiny_v3).header.tensors["model.layers.1.self_attn.kv_b_proj.weight"].parts
    assert parts["weight"].file != parts["weight_scale_inv"].file


def test_plain_tensors_equal_what_safetensors_reads(tiny_v2: Path, tiny_qwen2: Path, tiny_llama: Path) -> None:
    for path in (tiny_v2, tiny_qwen2, tiny_llama):
        checkpoint = open_checkpoint(path)
        with safe_open(path / "model.safetensors", "pt") as file:
            assert set(file.keys()) == set(checkpoint.header.tensors)
            for name in file.keys():  # noqa: SIM118 - not a dict
                assert torch.equal(checkpoint.read(name, None), file.get_tensor(name))
                assert checkpoint.read(name).dtype == torch.float32
