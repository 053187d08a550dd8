"""Data-free, with shards of one tensor each: what a shard announces is what comes, also of a turned model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import blake3
import pytest
import torch

from deepseek_compress.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from deepseek_compress.checkpoint.files import read_json
from deepseek_compress.compress import data_free
from deepseek_compress.compress.job import Job
from deepseek_compress.errors import DscError
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


def test_a_weight_that_is_not_finite_is_the_users_error(tiny_llama: Path, tmp_path: Path) -> None:
    """What the kernel refuses names the tensor and the next step."""
    published = open_checkpoint(tiny_llama)
    name = "model.layers.1.mlp.up_proj.weight"
    with CheckpointWriter(tmp_path / "broken", published) as writer:
        for other in published.header.tensors:
            tensor = published.read(other)
            if other == name:
                tensor[3, 5] = torch.nan
            writer.add(other, tensor)
        writer.finish({}, {}, [])
    with pytest.raises(DscError, match=rf"{re.escape(name)}: row 3 holds NaN.*; download the file again"):
        stage(weights="rtn").run(open_checkpoint(tmp_path / "broken"), context(tmp_path / "out", tiny_llama))


def in_shards(published: Checkpoint, out: Path, shard_bytes: int) -> Checkpoint:
    """The same in files of about `shard_bytes` whose hashes nothing tells."""
    with CheckpointWriter(out, published, shard_bytes=shard_bytes) as writer:
        for name in published.header.tensors:
            writer.copy(name)
        writer.finish({}, {}, [])
    (out / "dsc_manifest.json").unlink()
    return open_checkpoint(out)


@pytest.mark.parametrize(("shard_bytes", "smallest"), [(60_000, 1), (60_000, 10**9), (10**9, 1)])
def test_the_files_of_the_source_are_hashed(
    shard_bytes: int, smallest: int, tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many of them from what is read of them, one by itself; what is written is the same."""
    monkeypatch.setattr(data_free, "SMALLEST", smallest)
    published = open_checkpoint(tiny_v3)
    source = in_shards(published, tmp_path / "source", shard_bytes)
    out = stage(weights="rtn").run(source, context(tmp_path / "out", tiny_v3)).path
    files = sorted((tmp_path / "source").glob("*.safetensors"))
    assert (len(list(out.glob("*.safetensors"))) == 1) == (smallest > 1)
    assert (len(files) > 10) == (shard_bytes < 10**9)
    told = read_json(out / "dsc_manifest.json")["source"]["files"]
    assert {name: facts["blake3"] for name, facts in told.items()} == {
        file.name: blake3.blake3(file.read_bytes()).hexdigest() for file in files
    }
    expected = open_checkpoint(stage(weights="rtn").run(published, context(tmp_path / "whole", tiny_v3)).path)
    for name in expected.header.tensors:
        assert torch.equal(open_checkpoint(out).read(name), expected.read(name))


def test_a_stopped_run_hashes_what_it_no_longer_reads(
    tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_free, "SMALLEST", 1)
    source, rounding = in_shards(open_checkpoint(tiny_v3), tmp_path / "source", 200_000), stage(weights="rtn")
    whole = rounding.run(source, context(tmp_path / "whole", tiny_v3)).path
    real, written = data_free._write, []

    def stopping(job: Job, shard: data_free._Shard, each: Callable[[str], None]) -> None:
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(shard.number)
        real(job, shard, each)

    monkeypatch.setattr(data_free, "_write", stopping)
    with pytest.raises(KeyboardInterrupt):
        rounding.run(source, context(tmp_path / "out", tiny_v3))
    monkeypatch.setattr(data_free, "_write", real)
    out = rounding.run(source, context(tmp_path / "out", tiny_v3)).path
    assert [file.name for file in sorted(out.glob("*"))] == [file.name for file in sorted(whole.glob("*"))]
    for file in out.glob("*"):
        assert file.read_bytes() == (whole / file.name).read_bytes(), file.name
