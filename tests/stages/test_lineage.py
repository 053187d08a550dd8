"""From the teacher to the exported file: every step is in the lineage, files are hashed, a tampered one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_compress import provenance
from deepseek_compress.checkpoint.verified import MANIFEST, RUN, check, manifest_of
from deepseek_compress.errors import DscError, Problems
from deepseek_compress.evaluation.deployed import open_file
from deepseek_compress.pipeline import run
from deepseek_compress.recipe import parse_recipe

RECIPE = """
model: {model}
stages:
  - compress: {{weights: {{rtn: {{num_bits: 4, group_size: 32}}}}}}
    name: small
  - export: {{target: onnx, verify: false}}
    name: graph
"""


@pytest.fixture(scope="module")
def graph(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    run(parse_recipe(RECIPE.format(model=tiny_llama), "lineage.yaml"), out)
    return out / "graph"


def test_the_lineage_leads_from_the_teacher_to_the_file(graph: Path, tiny_llama: Path) -> None:
    manifest, before = manifest_of(graph), manifest_of(graph.parent / "small")
    assert manifest is not None
    assert before is not None
    steps = manifest["lineage"]
    assert [step["stage"] for step in steps] == ["compress", "export"]
    assert [step["source"] for step in steps] == [tiny_llama.name, "small"]
    assert steps[:1] == before["lineage"]  # what was before is carried over as it was
    assert len({step["fingerprint"] for step in steps}) == 2
    assert list(open_file(str(graph)).lineage) == steps
    assert set(manifest["files"]) == {f.name for f in graph.iterdir() if f.is_file()} - {MANIFEST, RUN}
    for name, entry in manifest["files"].items():
        assert entry["blake3"] == provenance.hash_file(graph / name)


def test_each_tampered_file_is_named(graph: Path) -> None:
    files = sorted(file for file in graph.iterdir() if file.is_file() and file.name != RUN and file.stat().st_size)
    assert len(files) >= 4
    for file in files:
        content = file.read_bytes()
        changed = bytearray(content)
        changed[len(content) // 2] ^= 1
        file.write_bytes(changed)
        try:
            with pytest.raises((DscError, Problems), match=file.name):
                check(graph)
        finally:
            file.write_bytes(content)
    check(graph)
