"""What is read is what was written: each kind of file with one flipped bit, a source that changes, NaN."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
from deepseek_compress.checkpoint.files import kept, read_sealed, write_sealed
from deepseek_compress.checkpoint.verified import check
from deepseek_compress.errors import DscError
from deepseek_compress.provenance import build_manifest


def output(source: Path, out: Path) -> Path:
    checkpoint = open_checkpoint(source)
    with CheckpointWriter(out, checkpoint, resume=True) as writer:
        for name in checkpoint.header.tensors:
            writer.copy(name)
        writer.finish({}, build_manifest(stage="copy", source=checkpoint), [])
    return out


def flip(file: Path, place: float = 0.5, bit: int = 2) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json",
     "tokenizer_config.json", "generation_config.json", "LICENSE", "dsc_manifest.json"],
)  # fmt: skip
def test_a_flipped_bit_is_named(name: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    out = output(tiny_qwen2, tmp_path / "out")
    check(out)
    flip(out / name)
    with pytest.raises(DscError, match=name):
        check(out)


def test_every_bit_of_a_sealed_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    write_sealed(file, {"schema": 1, "a": [1, 0.25], "é": "x"})
    content = file.read_bytes()
    assert read_sealed(file) == {"schema": 1, "a": [1, 0.25], "é": "x"}
    for place in range(len(content)):
        for bit in range(8):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            assert kept(file) is None, (place, bit)
    for size in range(len(content)):
        file.write_bytes(content[:size])
        assert kept(file) is None
    file.write_text('{"schema": 1}')
    assert read_sealed(file, strict=False) == {"schema": 1}  # of a version without checksums
    assert kept(file) is None


def test_a_manifest_with_a_false_hash_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    out = output(tiny_qwen2, tmp_path / "out")
    manifest = read_sealed(out / "dsc_manifest.json")
    manifest["files"]["model-00001-of-00001.safetensors"]["blake3"] = "0" * 64
    write_sealed(out / "dsc_manifest.json", manifest)
    with pytest.raises(DscError, match="not the bytes that were written"):
        check(out)
    write_sealed(out / "dsc_manifest.json", {**manifest, "files": {"../x": {"bytes": 1, "blake3": ""}}})
    with pytest.raises(DscError, match="not a file with its size"):
        check(out)


@pytest.mark.parametrize("how", ["in place", "replaced", "times set back"])
def test_a_source_that_changes_under_the_writer(how: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_qwen2, source)
    file = source / "model.safetensors"
    checkpoint = open_checkpoint(source)
    names = list(checkpoint.header.tensors)

    def write(until: int) -> None:
        with CheckpointWriter(out, checkpoint) as writer:
            for name in names[:until]:
                writer.copy(name)
            before = file.stat()
            if how == "replaced":
                shutil.copyfile(file, tmp_path / "other")
                os.replace(tmp_path / "other", file)
            else:
                flip(file, 0.9)
                if how == "times set back":
                    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
            for name in names[until:]:
                writer.copy(name)
            writer.finish({}, {}, [])

    for until in (3, len(names)):  # seen where the next tensor is read, and at the end where none is
        checkpoint = open_checkpoint(source)
        with pytest.raises(DscError, match="changed while it was read"):
            write(until)
        assert not out.exists()


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_kept_tensor_with_values_that_are_none_is_not_copied(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    state = load_file(source / "model.safetensors")
    state["model.embed_tokens.weight"][5, 7] = float(kind)
    save_file(state, source / "model.safetensors")
    with pytest.raises(DscError, match=r"model.embed_tokens.weight: 1 of 65536 values are NaN or infinite"):
        output(source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_large_tensors_are_checked_as_they_pass(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek_compress.checkpoint.ledger.STREAMED", 1)
    test_a_kept_tensor_with_values_that_are_none_is_not_copied("nan", tiny_llama, tmp_path)


def test_fp8_codes_that_are_none(tiny_v3: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_v3, source)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.0.self_attn.o_proj.weight"
    state = load_file(source / index[name])
    state[name].view(torch.uint8)[3, 4] = 0xFF
    save_file(state, source / index[name])
    with pytest.raises(DscError, match=r"o_proj.weight: 1 of 16384 values are NaN"):
        output(source, tmp_path / "out")


def test_only_recorded_files_are_removed(tiny_qwen2: Path, tmp_path: Path) -> None:
    """And a file of the user's is not overwritten by one of the same name that the source has."""
    out = output(tiny_qwen2, tmp_path / "out")
    mine = {"NOTICE": "mine", "merges.txt": "mine", "notes.txt": "mine", "tokenizer.old.json": "{}"}
    for name, text in mine.items():
        (out / name).write_text(text)
    output(tiny_qwen2, out)
    assert {name: (out / name).read_text() for name in mine} == mine
    source = tmp_path / "source"
    shutil.copytree(tiny_qwen2, source)
    (source / "NOTICE").write_text("of the model")
    with pytest.raises(DscError, match="NOTICE: not written by dsc, and would be overwritten"):
        output(source, out)
    assert (out / "NOTICE").read_text() == "mine"
    check(out)  # the output that was there still is


def test_a_damaged_shard_of_an_interrupted_run_is_made_again(tiny_qwen2: Path, tmp_path: Path) -> None:
    whole = output(tiny_qwen2, tmp_path / "whole")
    checkpoint, out = open_checkpoint(tiny_qwen2), tmp_path / "out"
    for damaged in ("shard-00001.safetensors", "shard-00001.json", "other.json"):

        def interrupted() -> None:
            with CheckpointWriter(out, checkpoint, resume=True) as writer:
                writer.copy(next(iter(checkpoint.header.tensors)))
                writer.flush()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        file = out / ".dsc_partial" / damaged
        flip(file) if file.exists() else file.write_text("damaged")
        with CheckpointWriter(out, checkpoint, resume=True) as writer:
            assert len(writer.written) == (damaged == "other.json")
            for name in checkpoint.header.tensors:
                if name not in writer.written:
                    writer.copy(name)
            writer.finish({}, {}, [])
        assert open_checkpoint(out).header.tensors.keys() == open_checkpoint(whole).header.tensors.keys()
        shutil.rmtree(out)
