"""Shards of single blocks put into one file: the same tensors, hashed as they lie."""

from __future__ import annotations

from pathlib import Path

import torch

from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
from deepseek_compress.checkpoint.inspect import verify_hashes


def test_joined_shards_hold_the_same_in_one_file_unless_that_is_too_large(tiny_v3: Path, tmp_path: Path) -> None:
    source, found = open_checkpoint(tiny_v3), []
    for name, room in (("apart", 1), ("one", 1 << 30)):
        with CheckpointWriter(tmp_path / name, source, shard_bytes=room) as writer:
            for tensor in source.header.tensors:
                writer.copy(tensor)
                writer.flush()
            writer.join()
            writer.finish({}, {}, [])
        found.append(open_checkpoint(tmp_path / name))
    assert [len(list(out.path.glob("*.safetensors"))) for out in found] == [len(source.header.tensors), 1]
    assert list(found[0].header.tensors) != []
    for tensor in source.header.tensors:
        raw, others = source.read_raw(tensor), found[1].read_raw(tensor)
        assert all(torch.equal(raw[part].view(torch.uint8), others[part].view(torch.uint8)) for part in raw), tensor
    assert list(verify_hashes(found[1])) == []
