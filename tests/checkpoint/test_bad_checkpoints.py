"""Damaged and hostile checkpoints: one line for each problem, names and values in it, nothing allocated first."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError, Problems

Mutable = Callable[[str], Path]
WEIGHT = "model.layers.1.self_attn.kv_b_proj.weight"


@pytest.fixture
def copy_of(tmp_path: Path, request: pytest.FixtureRequest) -> Mutable:
    def _copy(model: str) -> Path:
        out = tmp_path / model
        out.mkdir()
        for file in request.getfixturevalue(model).iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        return out

    return _copy


def problems(path: Path) -> list[str]:
    with pytest.raises(Problems) as caught:
        open_checkpoint(path)
    assert all(isinstance(problem, DscError) and problem.fix for problem in caught.value.problems)
    return [problem.what.replace(f"{path}/", "") for problem in caught.value.problems]


def safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype: Any, shape: Any, offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "expected"),
    [
        (b"{", b"", "the header is not valid JSON"),
        (b"[]", b"", "the header is not a JSON object"),
        (b"[" * 50_000, b"", "the header is not valid JSON"),
        (b'{"\xff": 1}', b"", "the header is not valid JSON"),
        (b'{"a": {}, "a": {}}', b"", "the key 'a' stands twice"),
        ({"a": 3}, b"", "a: the header lacks dtype, shape or data_offsets"),
        ({"a": entry("F7", [1], [0, 4])}, b"1234", "a: unknown dtype 'F7'"),
        ({"a": entry(["F32"], [1], [0, 4])}, b"1234", "a: unknown dtype \"['F32']\""),
        ({"a": entry("F32", [-1], [0, 4])}, b"1234", "a: shape [-1] is not a list of integers"),
        ({"a": entry("F32", [True], [0, 4])}, b"1234", "a: shape [True] is not a list of integers"),
        ({"a": entry("F32", 1, [0, 4])}, b"1234", "a: shape 1 is not a list of integers"),
        ({"a": entry("F32", [1], [4, 0])}, b"1234", "a: data_offsets [4, 0] are not [begin, end]"),
        ({"a": entry("F32", [1], [0.0, 4])}, b"1234", "a: data_offsets [0.0, 4] are not [begin, end]"),
        ({"a": entry("F32", [2], [0, 4])}, b"1234", "shape [2] of F32 takes 8 bytes, the header gives 4"),
        ({"a": entry("F32", [1 << 62, 4], [0, 4])}, b"1234", "a dimension of more than 2^48"),
        (
            {"a": entry("F32", [1 << 40], [0, 1 << 42])},
            b"1234",
            "97 bytes, but its tensors end at byte 4398046511197; the file is truncated",
        ),
        ({"a": entry("U8", [4], [0, 4]), "b": entry("U8", [4], [2, 6])}, b"123456", "b overlaps a"),
        ({"a": entry("U8", [2], [0, 2]), "b": entry("U8", [2], [4, 6])}, b"123456", "b leaves a hole after a"),
        ({"a": entry("U8", [2], [2, 4])}, b"1234", "a leaves a hole after the header"),
        ({"a": entry("U8", [2], [0, 2])}, b"1234", "2 bytes after the last tensor"),
    ],
)
def test_headers_that_lie(header: Any, data: bytes, expected: str, copy_of: Mutable) -> None:
    path = copy_of("tiny_llama")
    safetensors(path / "model.safetensors", header, data)
    (found,) = problems(path)
    assert found.startswith("model.safetensors: ")
    assert expected in found


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 100_000_001, 3])
def test_a_header_longer_than_the_file(length: int, copy_of: Mutable) -> None:
    path = copy_of("tiny_llama")
    safetensors(path / "model.safetensors", b"{}", length=length)
    assert problems(path) == [f"model.safetensors: a header of {length} bytes does not fit a file of 10 bytes"]


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_without_a_header(size: int, copy_of: Mutable) -> None:
    path = copy_of("tiny_llama")
    (path / "model.safetensors").write_bytes(b"1234567"[:size])
    assert problems(path) == [f"model.safetensors: {size} bytes are too few for a safetensors file"]


def test_a_truncated_shard(copy_of: Mutable) -> None:
    path = copy_of("tiny_v3")
    shard = sorted(path.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    size = shard.stat().st_size
    expected = f"{shard.name}: {size} bytes, but its tensors end at byte {size + 1}; the file is truncated"
    assert problems(path) == [expected]


def test_everything_wrong_is_told_together(copy_of: Mutable) -> None:
    path = copy_of("tiny_v3")
    first, second, third = sorted(path.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(b"")
    state = load_file(third)
    state["surplus"] = torch.zeros(1)
    state.pop("model.norm.weight")
    save_file(state, third)
    (path / "config.json").write_text("{")
    assert [problem.split(" (")[0] for problem in problems(path)] == [
        "config.json: not valid JSON",
        f"{first.name}: named in the index, but not there",
        f"{second.name}: 0 bytes are too few for a safetensors file",
        f"model.norm.weight: in the index, but not in {third.name}",
        f"surplus: in {third.name}, but not in the index",
    ]


def test_a_missing_scale_is_told_beside_a_missing_shard(copy_of: Mutable) -> None:
    """And the parts that the missing shard should hold are not told one by one."""
    path = copy_of("tiny_v3")
    first, _, third = sorted(path.glob("*.safetensors"))
    first.unlink()
    index = json.loads((path / "model.safetensors.index.json").read_text())
    lost = "model.layers.2.mlp.shared_experts.up_proj.weight_scale_inv"
    assert index["weight_map"].pop(lost) == third.name
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    state = load_file(third)
    del state[lost]
    save_file(state, third)
    assert problems(path) == [
        f"{first.name}: named in the index, but not there",
        f"{lost.removesuffix('_scale_inv')}: torch.float8_e4m3fn with no weight_scale_inv and no scale",
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_is_an_error_of_ours_or_harmless(data: st.DataObject, tiny_qwen2: Path, tmp_path: Path) -> None:
    content = bytearray((tiny_qwen2 / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "model.safetensors").write_bytes(
        content[: data.draw(st.sampled_from([len(content), header, header + 99]))]
    )
    (tmp_path / "config.json").write_bytes((tiny_qwen2 / "config.json").read_bytes())
    with contextlib.suppress(DscError):
        checkpoint = open_checkpoint(tmp_path)
        for name in checkpoint.header.tensors:
            checkpoint.read(name)


def test_a_missing_scale_and_a_scale_without_its_weight(copy_of: Mutable) -> None:
    path = copy_of("tiny_v3")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    other = "model.layers.0.mlp.up_proj.weight"
    for name in (WEIGHT + "_scale_inv", other):
        shard = path / index["weight_map"].pop(name)
        state = load_file(shard)
        del state[name]
        save_file(state, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(problems(path)) == [
        f"{other}_scale_inv: a part without its weight",
        f"{WEIGHT}: torch.float8_e4m3fn with no weight_scale_inv and no scale",
    ]


def change(path: Path, name: str, new: Any) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    state = load_file(path / index[name])
    state[name] = new(state[name])
    save_file(state, path / index[name])


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (lambda t: t[:1].contiguous(), "scale is torch.float32 [1, 1], not [2, 1] of"),
        (lambda t: t.half(), "scale is torch.float16 [2, 1], not [2, 1] of torch.float32 or torch.bfloat16"),
    ],
)
def test_a_scale_of_the_wrong_shape_or_type(new: Any, expected: str, copy_of: Mutable) -> None:
    path = copy_of("tiny_v3")
    change(path, "model.layers.0.self_attn.kv_b_proj.weight_scale_inv", new)
    (found,) = problems(path)
    assert found.startswith(f"model.layers.0.self_attn.kv_b_proj.weight: {expected}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(bad: float, copy_of: Mutable) -> None:
    path = copy_of("tiny_v3")
    change(path, WEIGHT + "_scale_inv", lambda t: t.index_fill(0, torch.tensor([0]), bad))
    change(path, "model.norm.weight", lambda t: t.index_fill(0, torch.tensor([3, 5]), bad))
    checkpoint = open_checkpoint(path)
    with pytest.raises(DscError, match=r"kv_b_proj\.weight: 1 of 2 scales are NaN"):
        checkpoint.read(WEIGHT)
    with pytest.raises(DscError, match=r"model\.norm\.weight: 2 of 128 values are NaN or infinite"):
        checkpoint.read("model.norm.weight")


def test_a_nan_among_fp8_codes(copy_of: Mutable) -> None:
    path = copy_of("tiny_v3")
    name = "model.layers.0.self_attn.o_proj.weight"
    change(path, name, lambda t: t.view(torch.uint8).index_fill(1, torch.tensor([7]), 0x7F).view(torch.float8_e4m3fn))
    with pytest.raises(DscError, match=r"o_proj\.weight: 128 of 16384 values are NaN"):
        open_checkpoint(path).read(name)


def test_finite_values_whose_sum_overflows_are_fine(copy_of: Mutable) -> None:
    path = copy_of("tiny_v3")
    change(path, "model.norm.weight", lambda t: torch.full_like(t, 3e38))
    assert open_checkpoint(path).read("model.norm.weight").shape == (128,)


@pytest.mark.parametrize(
    "target", ["../other/model.safetensors", "/etc/passwd", "..", ".", "", "sub/x.safetensors", "a\0.safetensors"]
)
def test_an_index_that_leads_out_of_the_directory(target: str, copy_of: Mutable) -> None:
    path = copy_of("tiny_v3")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = target
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"model.safetensors.index.json: {target!r} leads out of the directory" in problems(path)


def test_links_out_of_the_directory(copy_of: Mutable, tmp_path: Path) -> None:
    sharded, single = copy_of("tiny_v3"), copy_of("tiny_llama")
    for path, name in ((sharded, "model-00002-of-000003.safetensors"), (single, "model.safetensors")):
        (path / name).rename(tmp_path / name)
        (path / name).symlink_to(tmp_path / name)
        assert "leads out of the directory" in problems(path)[0].replace("that ", "").replace("a link ", "")


def test_the_links_of_the_hub_cache_are_followed(tiny_llama: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(tiny_llama.iterdir()):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(i))
    assert open_checkpoint(snapshot).header.tensors.keys() == open_checkpoint(tiny_llama).header.tensors.keys()


def test_pickles_are_never_opened(tmp_path: Path, copy_of: Mutable) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(
        DscError, match=r"only pickle files \(pytorch_model\.bin\); pickle checkpoints are never opened"
    ):
        open_checkpoint(tmp_path)
    path = copy_of("tiny_v3")
    (path / "x.bin").write_bytes(b"")
    index = {"weight_map": {"a": "x.bin"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert problems(path)[0] == "model.safetensors.index.json: x.bin is not a safetensors file"


def test_directories_that_hold_no_checkpoint(tmp_path: Path, copy_of: Mutable) -> None:
    with pytest.raises(DscError, match="no such directory"):
        open_checkpoint(tmp_path / "nowhere")
    assert problems(tmp_path)[0] == "config.json: No such file or directory"
    assert "no model.safetensors and no model.safetensors.index.json" in problems(tmp_path)[1]
    path = copy_of("tiny_v3")
    (path / "model.safetensors.index.json").unlink()
    assert "3 safetensors files without model.safetensors.index.json" in problems(path)[0]
    (path / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    assert "no weight_map of names to files" in problems(path)[0]


def test_a_shard_that_the_index_does_not_name(copy_of: Mutable) -> None:
    path = copy_of("tiny_v3")
    (path / "model-00004-of-000004.safetensors").write_bytes(b"")
    assert problems(path) == ["model-00004-of-000004.safetensors: not named in the index"]


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"a.weight": torch.zeros(2, 2).to(torch.float8_e5m2)}, "a.weight: torch.float8_e5m2 without a scale"),
        (
            {"a.weight": torch.zeros(2, 4, dtype=torch.int8)},
            "a.weight: torch.int8 with no weight_scale_inv and no scale",
        ),
        ({"a.weight_scale_inv": torch.zeros(1, 1)}, "a.weight_scale_inv: a part without its weight"),
        (
            {"a.weight": torch.zeros(2, 2), "a.weight_scale_inv": torch.zeros(1, 1)},
            "a.weight_scale_inv: a part without",
        ),
        ({"a.weight_packed": torch.zeros(2, 4, dtype=torch.int32)}, "a.weight: weight_packed without weight_scale"),
        (
            {"a.weight_zero_point": torch.zeros(2, 4, dtype=torch.int32)},
            "a.weight_zero_point: a part without its weight",
        ),
        (
            {
                "a.weight_packed": torch.zeros(2, 4, dtype=torch.int32),
                "a.weight_scale": torch.ones(2, 1),
                "a.weight_shape": torch.tensor([3, 32]),
            },
            "a.weight: weight_packed torch.int32 [2, 4] is not [3, 32] packed",
        ),
        (
            {
                "a.weight_packed": torch.zeros(2, 4, dtype=torch.int32),
                "a.weight_scale": torch.ones(2, 1),
                "a.weight_shape": torch.tensor([2, -32]),
            },
            "a.weight: weight_packed torch.int32 [2, 4] is not [2, -32] packed",
        ),
        (
            {
                "a.weight_packed": torch.zeros(2, 4, dtype=torch.int32),
                "a.weight_scale": torch.ones(2, 3),
                "a.weight_shape": torch.tensor([2, 32]),
            },
            "a.weight: weight_scale torch.float32 [2, 3] does not fit [2, 32]",
        ),
        (
            {
                "a.weight_packed": torch.zeros(2, 4, dtype=torch.int32),
                "a.weight_scale": torch.ones(2, 1),
                "a.weight_zero_point": torch.zeros(2, 1, dtype=torch.int32),
                "a.weight_shape": torch.tensor([2, 32]),
            },
            "a.weight: weight_zero_point torch.int32 [2, 1] is not torch.int32 [1, 1]",
        ),
        (
            {"a.weight": torch.zeros(2, 8, dtype=torch.int8), "a.scale": torch.ones(2, 1, dtype=torch.uint8)},
            "a.weight: 16 columns are not whole groups of 32",
        ),
        (
            {"a.weight": torch.zeros(2, 16, dtype=torch.int8), "a.scale": torch.ones(3, 1, dtype=torch.uint8)},
            "a.weight: scale is torch.uint8 [3, 1], not [2, 1]",
        ),
        (
            {
                "a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn),
                "a.scale": torch.ones(1, 1),
                "a.weight_scale_inv": torch.ones(1, 1),
            },
            "a.weight: torch.float8_e4m3fn with 2 scales (weight_scale_inv, scale)",
        ),
    ],
)
def test_parts_that_do_not_fit(tensors: dict[str, torch.Tensor], expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Problems) as caught:
        open_checkpoint(tmp_path)
    (found,) = caught.value.problems
    assert found.what.startswith(expected)


def test_a_file_that_shrinks_between_header_and_read(copy_of: Mutable) -> None:
    path = copy_of("tiny_llama")
    checkpoint = open_checkpoint(path)
    name, info = next(iter(checkpoint.header.tensors.items()))
    os.truncate(path / "model.safetensors", info.parts["weight"].offset + 1)
    with pytest.raises(DscError, match="changed while it was read; run the same"):
        checkpoint.read(name)
    (path / "model.safetensors").unlink()
    with pytest.raises(DscError, match="No such file or directory"):
        checkpoint.read(name)


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [("fp8", "quantization_config is not an object"), ({"weight_block_size": [0, 128]}, "weight_block_size [0, 128]")],
)
def test_a_config_that_says_nonsense(quantization: Any, expected: str, copy_of: Mutable) -> None:
    path = copy_of("tiny_v3")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    (found,) = problems(path)
    assert expected in found


def test_an_unknown_name(tiny_llama: Path) -> None:
    with pytest.raises(DscError, match=r"no tensor model\.layers\.9"):
        open_checkpoint(tiny_llama).read("model.layers.9.mlp.up_proj.weight")
