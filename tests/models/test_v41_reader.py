"""The published DeepSeek-V4.1 by its headers: every tensor, every byte, none of them there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from benchmarks import v41_layout
from deepseek_compress import pipeline, resources
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture
from deepseek_compress.models.config import Role
from deepseek_compress.recipe import Changes, read_recipe
from deepseek_compress.survey import survey
from tests import v41


def test_the_published_index_name_by_name() -> None:
    stored = v41_layout.stored(v41_layout.CONFIG)
    assert len(stored) == 96_085
    assert v41_layout.size(stored) == 510_286_023_000
    assert len({re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in stored}) == 114
    sizes = {2334: 30 + 2, 2337: 4, 2342: 3, 2341: 1}  # window and Reuse, Reindex, Full with two tokens and with one
    counts: dict[int, int] = {}
    for layer in range(40):
        own = [n for n in stored if n.startswith(f"layers.{layer}.") and ".engram." not in n]
        counts[len(own)] = counts.get(len(own), 0) + 1
    assert counts == sizes
    assert sum(".engram." in name for name in stored) == 12
    assert "layers.20.attn.compressor.wgate.weight" not in stored
    drafts = [name for name in stored if name.startswith("mtp.") and ".experts." not in name]
    assert len(drafts) == 97


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return v41_layout.write_headers(tmp_path_factory.mktemp("v41_full"), v41_layout.CONFIG)


@pytest.mark.verify
def test_inspect_of_the_full_size(full: Path) -> None:
    found = survey(str(full), verify=False)
    assert found["problems"] == []
    assert found["shards"] == 48
    assert found["parameters"] == pytest.approx(763e9, rel=0.001)
    by_role: dict[str, int] = {}
    for row in found["roles"]:
        by_role[row["role"]] = by_role.get(row["role"], 0) + row["bytes"]
    gib = {role: round(size / (1 << 30), 2) for role, size in by_role.items()}
    assert gib["engram"] == 189.13
    assert gib["vision"] == 0.90
    assert gib["shared_expert"] == 1.32


@pytest.mark.verify
@pytest.mark.parametrize("recipe", ["w4a16", "w4a16-fast"])
def test_plan_of_the_full_size(full: Path, recipe: str) -> None:
    planned = pipeline.plan(read_recipe(resources.recipe_path(recipe), Changes(values={"model": str(full)})))
    assert planned.problems == []
    assert planned.bytes is not None


def test_roles_of_a_tiny_one_with_images_and_drafts(tmp_path: Path) -> None:
    given = v41.config(drafts=True, vision=True)
    source = open_checkpoint(v41.write_published(tmp_path, given))
    architecture = Architecture.of(source)
    assert architecture.problems() == []
    assert architecture.has_mtp and architecture.has_vision
    roles = {name: architecture.family.role(name) for name in source.header.tensors}
    assert roles["mtp.0.attn.wq_a.weight"] is Role.MTP
    assert roles["aligner.w1.bias"] is roles["image_start"] is roles["vision.norm.weight"] is Role.VISION
    assert roles["layers.0.engram.embed.weight"] is roles["layers.1.engram.wkv.weight"] is Role.ENGRAM
    assert roles["layers.1.attn.indexer.wk.weight"] is Role.INDEXER
    assert roles["layers.1.attn.compressor.wkv.weight"] is roles["layers.1.attn.attn_sink"] is Role.ATTENTION
    assert roles["layers.1.attn.indexer.k_norm.weight"] is roles["layers.0.hc_ffn_fn"] is Role.NORM
    assert roles["layers.0.ffn.gate.bias_vl"] is Role.ROUTER


def test_images_and_drafts_are_there_whole_or_not_at_all(tmp_path: Path) -> None:
    given = v41.config(drafts=True, vision=True)
    source = open_checkpoint(v41.write_published(tmp_path, given))
    without = {name: info for name, info in source.header.tensors.items() if not name.startswith(("mtp.", "vision."))}
    without = {name: info for name, info in without.items() if not name.startswith(("aligner.", "image_"))}
    header = source.header.__class__(source.path, source.config, without)
    assert Architecture.of(header).problems() == []
    del source.header.tensors["mtp.0.norm.weight"], source.header.tensors["vision.norm.weight"]
    told = [str(problem) for problem in Architecture.of(source).problems()]
    assert len(told) == 2 and all("missing from the checkpoint" in line for line in told)


def test_rows_of_a_table_are_those_of_the_whole(tmp_path: Path) -> None:
    source = open_checkpoint(v41.write_published(tmp_path, v41.config()))
    name = "layers.0.engram.embed.weight"
    whole = source.read(name)
    places = torch.tensor([659, 0, 3, 2, 3, 100, 101])
    assert torch.equal(source.read_rows(name, places), whole[places])
    assert source.read_rows(name, places[:0]).shape == (0, 32)
    assert torch.equal(source.read_rows("embed.weight", places[1:4]), source.read("embed.weight")[places[1:4]])


@pytest.mark.parametrize("encoded", ["fp8", "bf16"])
@pytest.mark.parametrize("how", ["in place", "replaced", "times set back"])
def test_rows_of_a_table_that_has_changed_are_not_read(encoded: str, how: str, tmp_path: Path) -> None:
    """Rows are read as a text asks for them, hours after the header: of another file they would be silent nonsense."""
    config = v41.config()
    write = v41.write_published if encoded == "fp8" else v41.write_plain
    source = open_checkpoint(write(tmp_path / "source", config))
    name = "layers.0.engram.embed.weight"
    places = torch.tensor([3, 4])
    assert source.read_rows(name, places).shape == (2, 32)
    file = next(iter(source.header.tensors[name].parts.values())).file
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if how == "replaced":
        (tmp_path / "other").write_bytes(content)
        os.replace(tmp_path / "other", file)
    else:
        file.write_bytes(content)
        if how == "times set back":
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DscError, match=rf"{file.name}: changed while it was read"):
        source.read_rows(name, places)
