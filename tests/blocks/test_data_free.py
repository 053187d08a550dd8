"""Data-free, with shards of one tensor each: what a shard announces is what comes, also of a turned model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_compress.blocks import data_free
from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
from tests.stages.test_compress import context, stage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_tensor_in_a_shard(
    dtype: torch.dtype, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_free, "SHARDS", 1000)
    monkeypatch.setattr(data_free, "SMALLEST", 1)
    published = open_checkpoint(tiny_llama)
    with CheckpointWriter(tmp_path / "wide", published) as writer:
        for name in published.header.tensors:
            writer.add(name, published.read(name).to(dtype))
        writer.finish({}, {}, [])
    source = open_checkpoint(tmp_path / "wide")
    out = stage(weights="rtn", rotation="hadamard").run(source, context(tmp_path / "out", tiny_llama)).path
    done = open_checkpoint(out)
    assert len(list(out.glob("*.safetensors"))) > 10
    assert {info.dtype for info in done.header.tensors.values() if info.encoding == "plain"} == {dtype}
