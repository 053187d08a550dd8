"""The comparison of two commits: it runs every recipe, and sees one changed number wherever it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import same_bytes
from benchmarks.same_bytes import FAILED, Case, Digest, digest
from deepseek_compress import resources


def test_every_recipe_runs() -> None:
    commands = " ".join(command for case in same_bytes.cases() for command in case.commands)
    assert [name for name in resources.recipes() if f"recipes/{name}.yaml" not in commands] == []
    assert len({case.name for case in same_bytes.cases()}) == len(same_bytes.cases())


def test_quickstart_without_its_engine() -> None:
    text = same_bytes.without_engines((resources.data("recipes") / "quickstart.yaml").read_text())
    assert "tensorrt" not in text
    assert "target: onnx" in text


def written(out: Path, loss: float = 1.0, value: float = 2.0, version: str = "1") -> Digest:
    out.mkdir()
    (out / "a.json").write_text(json.dumps({"loss": [0.5, loss], "versions": {"torch": version}}))
    (out / "b.json").write_text(json.dumps({"loss": loss}))
    (out / "dsc_run.json").write_text(str(out))
    save_file({"x": torch.ones(3), "y": torch.full((2,), value)}, out / "m.safetensors")
    return digest(out)


def test_the_first_difference_is_named(tmp_path: Path) -> None:
    before, case = written(tmp_path / "0"), Case("c", [])
    assert same_bytes._row(case, before, written(tmp_path / "1", version="2")).differing == {}
    found = same_bytes._row(case, before, written(tmp_path / "2", loss=3.0, value=4.0))
    assert found.equal == 0
    assert found.differing["a.json"] == "loss/1: 1.0 -> 3.0"
    assert found.differing["b.json"] == "loss: 1.0 -> 3.0"
    assert found.differing["m.safetensors"].startswith("y: F32 [2] ")
    fewer = {name: parts for name, parts in before.items() if name != "b.json"}
    assert same_bytes._row(case, before, fewer).differing == {"b.json": "only before"}


@pytest.mark.parametrize("after", [{}, {FAILED: {"quantize": "exit 1: error"}}])
def test_a_command_that_fails_is_never_equal(after: Digest) -> None:
    failed: Digest = {FAILED: {"quantize": "exit 1: error"}}
    assert same_bytes._row(Case("c", []), failed, after).differing == {"quantize": "exit 1: error"}
    assert same_bytes._row(Case("c", []), {}, failed).differing == {"quantize": "exit 1: error"}
