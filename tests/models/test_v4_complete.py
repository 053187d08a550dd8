"""Compressing DeepSeek-V4 with the types and the MTP block of V4-Flash: each tensor is written, what stays is told."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_compress.checkpoint import Checkpoint, open_checkpoint
from deepseek_compress.models import Architecture, Role
from deepseek_compress.models.runtime import Model
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress
from deepseek_compress.survey import survey

QUICK: dict[str, Any] = {"weights": {"rtn": {"group_size": 32}}}
KEPT = "kept in 16 bits: attn.wo_a, compressors and indexer.weights_proj, which servers read in no fewer"
MTP = "MTP block kept: its experts in MXFP4, the rest in 16 bits"


def compress(model: Path, out: Path, knobs: dict[str, Any] = QUICK, **context: Any) -> Path:
    stage = build(Compress, knobs, "compress")
    source = open_checkpoint(model)
    assert stage.problems(source.header) == []
    stage.run(source, Context("compress", out, "", 0, **{"tell": lambda line: None, **context}))
    return out


def names(header: Any, start: str = "") -> set[str]:
    return {name for name in header.tensors if name.startswith(start)}


def changed_by(source: Checkpoint, knobs: dict[str, Any]) -> set[str]:
    """Weights of the linears that the recipe changes."""
    architecture = Architecture.of(source)
    roles = build(Compress, knobs, "compress")._changed(source.header)
    return {f"{name}.weight" for name, _ in architecture.linears(roles)}


@pytest.mark.parametrize("indexer", [False, True])
def test_every_tensor_is_written_and_what_stays_is_told(indexer: bool, tiny_v4_published: Path, tmp_path: Path) -> None:
    told: list[str] = []
    keep = [str(role) for role in Role if indexer is False or role is not Role.INDEXER]
    knobs = {**QUICK, "keep": [role for role in keep if role in ("router", "norm", "mtp", "indexer")]}
    source = open_checkpoint(tiny_v4_published)
    done = open_checkpoint(compress(tiny_v4_published, tmp_path / "out", knobs, tell=told.append))
    assert {KEPT, MTP} <= set(told)
    assert names(done.header) == names(source.header)
    assert done.config["num_nextn_predict_layers"] == 1
    changed = changed_by(source, knobs)
    assert ("layers.1.attn.indexer.wq_b.weight" in changed) == indexer
    for name, info in done.header.tensors.items():
        before = source.header.tensors[name]
        if name in changed:
            assert info.encoding == "packed"
        else:
            assert info.encoding == ("mxfp4" if before.encoding == "mxfp4" else "plain")
            same = None if before.encoding == "plain" else torch.bfloat16
            assert torch.equal(done.read(name, same), source.read(name, same)), name


def test_plan_and_inspect_show_all_of_it(tiny_v4_published: Path, tmp_path: Path) -> None:
    found = survey(str(tiny_v4_published), verify=False)
    assert found["problems"] == []
    mtp = {row["encoding"]: row["tensors"] for row in found["roles"] if row["role"] == "mtp"}
    assert (mtp["mxfp4"], mtp["fp8_block"]) == (3 * 8, 10)  # experts; five of attention, e, h, three shared
    for mtp_knob in ("keep", "drop"):
        knobs = {**QUICK, "mtp": mtp_knob}
        expected = build(Compress, knobs, "compress").forecast(open_checkpoint(tiny_v4_published).header, 0, 0)
        done = open_checkpoint(compress(tiny_v4_published, tmp_path / mtp_knob, knobs))
        assert KEPT in expected.decisions
        assert (MTP in expected.decisions, "MTP block left out" in expected.decisions) == (
            mtp_knob == "keep",
            mtp_knob == "drop",
        )
        assert expected.bytes == done.header.bytes
        assert names(expected.header) == names(done.header)


def test_dropped_nothing_of_the_mtp_block_is_left(tiny_v4_published: Path, tmp_path: Path) -> None:
    told: list[str] = []
    done = open_checkpoint(compress(tiny_v4_published, tmp_path / "out", {**QUICK, "mtp": "drop"}, tell=told.append))
    assert "MTP block left out" in told
    assert not names(done.header, "mtp.")
    assert done.config["num_nextn_predict_layers"] == 0
    assert "mtp" not in json.dumps(done.config["quantization_config"])


def test_half_of_it_is_an_error_and_another_layout_is_kept(tiny_v4_published: Path, tmp_path: Path) -> None:
    broken = _renamed(tiny_v4_published, tmp_path / "broken", {"mtp.0.hnorm.weight": None})
    (problem,) = Architecture.of(open_checkpoint(broken)).problems()
    assert problem.what == "mtp.0.hnorm.weight: missing from the checkpoint"
    drafts = {"mtp.0.e_proj.weight": "mtp.0.main_proj.weight", "mtp.0.e_proj.scale": "mtp.0.main_proj.scale"}
    other = _renamed(tiny_v4_published, tmp_path / "other", drafts)
    done = open_checkpoint(compress(other, tmp_path / "out"))
    assert names(done.header) == names(open_checkpoint(other).header)
    assert done.header.tensors["mtp.0.main_proj.weight"].encoding == "plain"


def _renamed(model: Path, out: Path, changes: dict[str, str | None]) -> Path:
    """A copy whose tensors have other names; None: which lacks them."""
    shutil.copytree(model, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        state = load_file(out / file)
        new = {changes.get(name, name): tensor for name, tensor in state.items()}
        save_file({name: tensor for name, tensor in new.items() if name is not None}, out / file)
    moved = {changes.get(name, name): file for name, file in index["weight_map"].items()}
    index["weight_map"] = {name: file for name, file in moved.items() if name is not None}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def test_the_mtp_block_changes_no_logits(tiny_v4_published: Path, tmp_path: Path) -> None:
    tokens = torch.randint(3, 512, (1, 24), generator=torch.Generator().manual_seed(2))
    without = compress(tiny_v4_published, tmp_path / "out", {**QUICK, "mtp": "drop"})
    kept = compress(tiny_v4_published, tmp_path / "kept")
    with torch.no_grad():
        assert torch.equal(Model.load(without).forward(tokens), Model.load(kept).forward(tokens))


class Interrupted(Exception):
    """In the middle of a run."""


def test_calibrated_one_worker_two_workers_and_resumed_write_the_same_bytes(
    tiny_v4_published: Path, tmp_path: Path, text: Path
) -> None:
    knobs = {"weights": {"gptq": {"group_size": 32, "mse": False}}, "keep": ["router", "norm", "mtp"],
             "requantize": True, "min_tokens": 1}  # fmt: skip
    calibration = {"sources": [str(text)], "samples": 4, "length": 64}
    whole = compress(tiny_v4_published, tmp_path / "whole", knobs, calibration=calibration)
    two = compress(tiny_v4_published, tmp_path / "two", knobs, calibration=calibration, workers=2)

    def stop(done: int, total: int, note: str) -> None:
        if note == "block 2":
            raise Interrupted

    again = tmp_path / "again"
    with pytest.raises(Interrupted):
        compress(tiny_v4_published, again, knobs, calibration=calibration, progress=stop)
    assert not (again / "config.json").exists()
    compress(tiny_v4_published, again, knobs, calibration=calibration)
    source, done = open_checkpoint(tiny_v4_published), open_checkpoint(whole)
    solved = [name for name, info in done.header.tensors.items() if info.encoding == "packed"]
    assert set(solved) == changed_by(source, knobs)
    assert any(re.search(r"indexer\.wq_b", name) for name in solved)
    for other in (two, again):
        assert _bytes(other) == _bytes(whole)


def _bytes(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.is_file()}
