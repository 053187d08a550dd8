"""Writing: the same bytes back, nothing that loads after a crash, config keys kept, foreign directories refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blake3
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from deepseek_compress.checkpoint import Checkpoint, CheckpointWriter, direct, open_checkpoint, shards
from deepseek_compress.checkpoint.formats.mxfp4 import encode_mxfp4
from deepseek_compress.checkpoint.inspect import verify_hashes
from deepseek_compress.checkpoint.shards import ShardFile
from deepseek_compress.checkpoint.verified import AGAIN
from deepseek_compress.errors import DscError
from deepseek_compress.numerics.types import Quantized

Pack = Callable[..., Path]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.int8, torch.bool]


def copy_all(source: Checkpoint, out: Path, **options: Any) -> Path:
    with CheckpointWriter(out, source, **options) as writer:
        for name in source.header.tensors:
            writer.copy(name)
        writer.finish({}, {"stage": "copy"}, [])
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("model", ["tiny_v3", "tiny_v2", "tiny_qwen2"])
def test_a_copy_holds_the_same_tensors_in_the_published_encoding(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = open_checkpoint(request.getfixturevalue(model))
    copy = open_checkpoint(copy_all(source, tmp_path / "out", shard_bytes=300_000))
    assert len(list(copy.path.glob("*.safetensors"))) > 1
    assert {n: (i.encoding, i.dtype, i.shape) for n, i in copy.header.tensors.items()} == {
        n: (i.encoding, i.dtype, i.shape) for n, i in source.header.tensors.items()
    }
    for name in source.header.tensors:
        mine, theirs = copy.read_raw(name), source.read_raw(name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[s].view(torch.uint8), theirs[s].view(torch.uint8)) for s in mine if mine[s].dim())
    assert copy.config == source.config
    for file in ("LICENSE", "generation_config.json"):
        assert (copy.path / file).read_bytes() == (source.path / file).read_bytes()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.lists(st.tuples(st.lists(st.integers(0, 7), max_size=3), st.sampled_from(DTYPES)), max_size=8),
    limit=st.sampled_from([0, 64, 1 << 20]),
)
def test_any_tensors_survive_and_safetensors_reads_them(tensors: list[Any], limit: int, tmp_path: Path) -> None:
    """`limit`: how many bytes wait in memory; 0 begins the file, with room for its header, at the first tensor."""
    made = {f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, (shape, dtype) in enumerate(tensors)}
    file = tmp_path / "shard.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_IN_MEMORY", limit)
        shard = ShardFile(file)
        for name, tensor in made.items():
            shard.add(name, tensor)
        done = shard.close()
    assert done.bytes == file.stat().st_size
    assert done.blake3 == blake3.blake3(file.read_bytes()).hexdigest()
    theirs = load_file(file)
    assert theirs.keys() == made.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in made.items())


def test_the_same_input_gives_the_same_bytes(tiny_v3: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_v3)
    one, two = copy_all(source, tmp_path / "a" / "out"), copy_all(source, tmp_path / "b" / "out")
    assert contents(one) == contents(two)
    text = b"".join(contents(one)[name] for name in ("dsc_manifest.json", "README.md", "config.json"))
    assert str(tmp_path).encode() not in text


def test_the_manifest_lists_what_the_files_hash_to(tiny_v2: Path, tmp_path: Path) -> None:
    out = copy_all(open_checkpoint(tiny_v2), tmp_path / "out")
    checkpoint = open_checkpoint(out)
    (file,) = out.glob("*.safetensors")
    assert checkpoint.manifest is not None
    digest = blake3.blake3(file.read_bytes()).hexdigest()
    assert checkpoint.manifest["files"][file.name] == {"bytes": file.stat().st_size, "blake3": digest}
    assert {*checkpoint.manifest["files"], "dsc_manifest.json"} == {path.name for path in out.iterdir()}
    assert list(verify_hashes(checkpoint)) == []
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert [str(problem) for problem in verify_hashes(checkpoint)] == [
        f"{file}: not the bytes that were written; {AGAIN}"
    ]


def test_published_keys_survive_and_remote_code_does_not(tiny_v3: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_v3)
    source.config["auto_map"] = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    with CheckpointWriter(tmp_path / "out", source) as writer:
        for name in source.header.tensors:
            writer.copy(name, decode=True)
        notes = writer.finish({"num_nextn_predict_layers": 0, "ep_size": None}, {}, [])
    del source.config["auto_map"]
    expected = {key: value for key, value in source.config.items() if key not in ("ep_size", "quantization_config")}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**expected, "num_nextn_predict_layers": 0}
    assert written["topk_method"] == "noaux_tc"
    assert notes == ["auto_map dropped from config.json: code of the checkpoint is neither run nor copied"]


def test_code_and_links_out_of_the_directory_are_not_copied(tiny_llama: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "in"
    mirror.mkdir()
    for file in tiny_llama.iterdir():
        (mirror / file.name).write_bytes(file.read_bytes())
    (tmp_path / "secret").write_text("secret")
    (mirror / "tokenizer_secret.json").symlink_to(tmp_path / "secret")
    (mirror / "modeling_llama.py").write_text("raise SystemExit")
    (mirror / "chat_template.jinja").write_text("{{ messages }}")
    out = copy_all(open_checkpoint(mirror), tmp_path / "out")
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not [*out.glob("*secret*"), *out.glob("*.py")]


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("when", ["adding", "naming", "index", "config"])
def test_left_by_an_exception_nothing_remains(
    error: type[BaseException], when: str, tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(tiny_qwen2)
    names = {"naming": "_name_shards", "index": "_write_index"}
    if when in names:
        original = getattr(CheckpointWriter, names[when])

        def broken(self: Any, *args: Any) -> None:
            original(self, *args)
            raise error

        monkeypatch.setattr(CheckpointWriter, names[when], broken)
    if when == "config":
        replace = os.replace

        def stop(path: Path, target: Path) -> None:
            if target.name == "config.json":
                raise error
            replace(path, target)

        monkeypatch.setattr(os, "replace", stop)

    def write() -> None:
        with CheckpointWriter(tmp_path / "out", source, shard_bytes=100_000) as writer:
            for i, name in enumerate(source.header.tensors):
                if when == "adding" and i == 9:
                    raise error
                writer.copy(name)
            writer.finish({}, {}, [])

    with pytest.raises(error):
        write()
    assert not (tmp_path / "out").exists()


def test_an_earlier_output_is_replaced_and_a_foreign_directory_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_qwen2)
    out = copy_all(source, tmp_path / "out", shard_bytes=100_000)
    (out / "notes.txt").write_text("mine")
    before = len(list(out.glob("*.safetensors")))
    copy_all(source, out)
    assert before > 1 == len(list(out.glob("*.safetensors")))
    assert (out / "notes.txt").read_text() == "mine"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    with pytest.raises(DscError, match=r"holds config\.json, which dsc did not write; give another output"):
        CheckpointWriter(foreign, source)
    assert contents(foreign) == {"config.json": b"{}"}
    with pytest.raises(DscError, match="input and output are the same"):
        CheckpointWriter(tiny_qwen2, source)
    with pytest.raises(DscError, match="a file; give another"):
        CheckpointWriter(foreign / "config.json", source)


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(tiny_qwen2: Path, tmp_path: Path) -> None:
    with pytest.raises(DscError, match=r"1\.00 EiB|GiB to write, .* GiB free; free .* GiB"):
        CheckpointWriter(tmp_path / "out", open_checkpoint(tiny_qwen2), expected_bytes=1 << 60)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(direct.os, "fsync", full)
    with pytest.raises(DscError, match="No space left on device; free some space"):
        copy_all(open_checkpoint(tiny_qwen2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [5, 100_000], ids=["header", "data"])
def test_a_disk_that_returns_other_bytes_is_caught(
    place: int, tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shards.read_back

    def flipped(path: Path) -> Iterator[memoryview]:
        for i, block in enumerate(real(path)):
            if i == 0:
                block[place] ^= 16
            yield block

    monkeypatch.setattr(shards, "read_back", flipped)
    with pytest.raises(DscError, match="reads back other bytes than were written"):
        copy_all(open_checkpoint(tiny_qwen2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
    source, out, stop = open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
    replace = os.replace
    def die(path, target):
        if Path(target).name == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(path, target)
    os.replace = die
    with CheckpointWriter(out, source, resume=True) as w:
        for i, name in enumerate(source.header.tensors):
            w.copy(name)
            if i % 4 == 3:
                w.flush()
            if stop == str(i):
                os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[4] == "joined":
            w.join()
        w.finish({}, {"stage": "copy"}, [])
"""


@pytest.mark.parametrize(
    ("stop", "how"),
    [("9", ""), ("9", "joined"), ("model.safetensors.index.json", ""), ("dsc_manifest.json", "joined"),
     ("config.json", ""), ("config.json", "joined")],
)  # fmt: skip
def test_kill_and_resume_give_the_bytes_of_an_uninterrupted_run(
    stop: str, how: str, tiny_qwen2: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_qwen2)
    out, whole = tmp_path / "out", tmp_path / "whole"
    code = textwrap.dedent(KILLED)
    done = subprocess.run([sys.executable, "-c", code, str(tiny_qwen2), str(out), stop, how], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (out / "config.json").exists()
    again = 0
    for path in (out, whole):
        with CheckpointWriter(path, source, resume=True) as writer:
            for i, name in enumerate(source.header.tensors):
                if name not in writer.written:
                    writer.copy(name)
                    again += path == out
                if i % 4 == 3:
                    writer.flush()
            if how == "joined":
                writer.join()
            writer.finish({}, {"stage": "copy"}, [])
    assert contents(out) == contents(whole)
    assert again == (len(source.header.tensors) - 8 if stop == "9" else 0)


def test_resume_keeps_finished_shards_after_an_exception(tiny_qwen2: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_qwen2)
    names = list(source.header.tensors)

    def write() -> None:
        with CheckpointWriter(tmp_path / "out", source, resume=True) as writer:
            for name in names[:3]:
                writer.copy(name)
            writer.flush()
            writer.copy(names[3])
            raise Stop

    with pytest.raises(Stop):
        write()
    assert sorted(contents(tmp_path / "out")) == [
        ".dsc_partial/shard-00001.json",
        ".dsc_partial/shard-00001.safetensors",
    ]
    with pytest.raises(DscError):
        open_checkpoint(tmp_path / "out")
    with CheckpointWriter(tmp_path / "out", source, resume=True) as writer:
        assert writer.written == set(names[:3])


def test_v4_experts_stay_mxfp4_beside_packed_weights(tiny_llama: Path, tmp_path: Path) -> None:
    """`mixed-precision`: what is requantised is pack-quantized, the experts keep their values and bytes."""
    source = open_checkpoint(tiny_llama)
    codes, scale = encode_mxfp4(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
    weight = Quantized(torch.full((8, 64), 3, dtype=torch.uint8), torch.ones(8, 2), torch.ones(8, 2).byte())
    with CheckpointWriter(tmp_path / "out", source) as writer:
        writer.add_raw("layers.0.ffn.experts.0.w1.weight", {"weight_packed": codes, "weight_scale": scale})
        writer.add("layers.0.attn.wq_a.weight", weight)
        writer.finish({}, {}, [])
    out = open_checkpoint(tmp_path / "out")
    quantization = out.config["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    kinds = {group["format"]: group["targets"] for group in quantization["config_groups"].values()}
    assert kinds == {
        "pack-quantized": ["layers.0.attn.wq_a"],
        "mxfp4-pack-quantized": [r"re:^(?:.+\.)?layers\.0\.ffn\.experts\.\d+\.w1$"],
    }
    assert out.header.tensors["layers.0.ffn.experts.0.w1.weight"].encoding == "mxfp4"
    assert torch.equal(out.read("layers.0.attn.wq_a.weight"), torch.full((8, 64), 2.0))


def test_mistakes_of_the_caller_are_refused(tiny_v3: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_v3)
    weight = Quantized(torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 2), torch.ones(8, 2).byte())
    fp8 = next(name for name, info in source.header.tensors.items() if info.encoding == "fp8_block")

    def write(copied: list[str], added: list[str], ignore: list[str]) -> None:
        with CheckpointWriter(tmp_path / "out", source) as writer:
            for name in copied:
                writer.copy(name)
            for name in added:
                writer.add(name, weight)
            writer.finish({}, {}, ignore)

    up = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match="keeps its published encoding"):
        write([fp8], [up], [])
    with pytest.raises(ValueError, match=r"in ignore: model\.layers\.0\.mlp\.up_proj"):
        write([], [up], ["re:.*up_proj$"])
    with pytest.raises(ValueError, match="written twice"):
        write([], [up, up], [])
    with pytest.raises(ValueError, match="nothing was written"):
        write([], [], [])
    assert os.listdir(tmp_path) == []


def test_linears_that_leave_fp8_are_named(tiny_v3: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_v3)
    changed = "model.layers.0.mlp.up_proj.weight"
    with CheckpointWriter(tmp_path / "out", source) as writer:
        for name in source.header.tensors:
            writer.copy(name, decode=name == changed)
        writer.finish({}, {}, [])
    quantization = open_checkpoint(tmp_path / "out").config["quantization_config"]
    assert quantization.pop("modules_to_not_convert") == ["model.layers.0.mlp.up_proj"]
    assert quantization == source.config["quantization_config"]


def test_memory_of_the_caller_may_be_reused(tiny_llama: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_llama)
    buffer = torch.empty(16)
    with CheckpointWriter(tmp_path / "out", source) as writer:
        for i in range(3):
            buffer.fill_(i)
            writer.add(f"t{i}.weight", buffer)
        writer.finish({}, {}, [])
    with safe_open(tmp_path / "out" / "model-00001-of-00001.safetensors", "pt") as file:
        assert [float(file.get_tensor(f"t{i}.weight")[0]) for i in range(3)] == [0.0, 1.0, 2.0]
