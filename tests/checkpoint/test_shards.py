"""A shard whose header is known first is the shard whose header is known last, but for the header's room."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import pytest
import torch
from safetensors.torch import load_file

from deepseek_compress.checkpoint.shards import ShardFile

TENSORS = {
    "a": torch.arange(3, dtype=torch.int32),  # 12 bytes: would misalign what follows
    "b": torch.randn(40_000, 60, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c": torch.arange(5, dtype=torch.uint8),
    "d": torch.randn(2, 1, 3),
}
OUTLINE = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("threaded", [False, True])
def test_with_and_without_an_outline(threaded: bool, tmp_path: Path) -> None:
    found = []
    for outline in (None, OUTLINE):
        path = tmp_path / f"{outline is None}.safetensors"
        with ThreadPoolExecutor(1) as thread:
            file = ShardFile(path, thread if threaded else None, outline)
            for name, tensor in TENSORS.items():
                file.add(name, tensor)
            found.append(file.close())
        loaded = load_file(path)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
        assert found[-1].blake3 == blake3.blake3(path.read_bytes()).hexdigest()
        assert found[-1].bytes == path.stat().st_size
    assert found[0] == found[1]


@pytest.mark.parametrize("names", ["ab", "abdc", "abcde"])
def test_what_was_not_announced_is_a_defect(names: str, tmp_path: Path) -> None:
    file = ShardFile(tmp_path / "x.safetensors", None, OUTLINE)
    for name in names:
        file.add(name, TENSORS.get(name, torch.zeros(2)))
    if names == "abdc":  # both are kept for the end, where the order is the type's
        file.close()
    else:
        with pytest.raises(ValueError, match="what came is not what was announced"):
            file.close()
    file.discard()
