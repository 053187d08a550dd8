"""Scales that move: the model computes the same, in memory and as it is written, and inputs become easier to round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.compress.job import Job
from deepseek_compress.compress.moved_scales import find, migrated
from deepseek_compress.compress.selection import select
from deepseek_compress.compress.solver import LinearSolver
from deepseek_compress.models import Architecture
from deepseek_compress.models.folds import folds
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.migration import SmoothQuant
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.streaming.loop import silent
from tests.models.reference import relative
from tests.stages.test_compress import context, stage

FAMILIES = ["tiny_v3", "tiny_v2", "tiny_qwen2", "tiny_qwen3", "tiny_llama"]
TOKENS = torch.randint(2, 512, (4, 48), generator=torch.Generator().manual_seed(5))


def job_of(path: Path, work: Path, weights: Rtn | None) -> Job:
    architecture = Architecture.of(open_checkpoint(path))
    roles = {linear.role for block in architecture.blocks for linear in block.linears}
    return Job(architecture, LinearSolver(select(architecture, roles, weights), None, weights, 0), work)


@pytest.mark.parametrize("weights", [None, Rtn(num_bits=8, symmetric=True)], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_folded_model_computes_the_same(
    name: str, weights: Rtn | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job = job_of(request.getfixturevalue(name), tmp_path / "work", weights)
    scales = find(job, TOKENS, SmoothQuant(), silent)
    places = [block.prefix + fold.producer for block in job.architecture.blocks for fold in folds(block)]
    assert set(scales) == set(places)
    assert all(bool((value != 1).any()) for value in scales.values())
    folded, original = Model.load(migrated(job.architecture, scales)), Model.load(job.source)
    changed = [name for name, tensor in original.weights.items() if not torch.equal(tensor, folded.weights[name])]
    assert len(changed) > len(places)
    if weights is None:  # powers of two: only sums of subnormal parts could round differently
        assert torch.equal(folded.forward(TOKENS), original.forward(TOKENS))
    else:
        assert relative(folded.forward(TOKENS), original.forward(TOKENS)) < 2e-5
    again = find(job, TOKENS, SmoothQuant(), silent)  # from the work directory
    assert all(torch.equal(again[place], value) for place, value in scales.items())


def test_only_the_first_samples_are_looked_at(tiny_llama: Path, tmp_path: Path) -> None:
    found = find(job_of(tiny_llama, tmp_path / "some", None), TOKENS, SmoothQuant(samples=2), silent)
    first = find(job_of(tiny_llama, tmp_path / "first", None), TOKENS[:2], SmoothQuant(), silent)
    every = find(job_of(tiny_llama, tmp_path / "every", None), TOKENS, SmoothQuant(), silent)
    assert all(torch.equal(found[place], scales) for place, scales in first.items())
    assert not all(torch.equal(found[place], scales) for place, scales in every.items())


def outlying(path: Path, out: Path) -> Path:
    """The checkpoint with a few channels of each norm that stand far above the others."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    state = load_file(path / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith("layernorm.weight"):
            tensor[[3, 40, 77]] *= 24
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    for file in path.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    return out


@torch.no_grad()
def error(ours: Path, theirs: Path) -> float:
    return float((Model.load(ours).forward(TOKENS) - Model.load(theirs).forward(TOKENS)).square().mean())


def test_w8a8_gains_where_channels_stand_out(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    path = outlying(tiny_llama, tmp_path / "outlying")
    knobs: dict[str, Any] = {"weights": {"rtn": {"num_bits": 8, "symmetric": True}}, "activations": "dynamic"}
    plain = stage(**knobs).run(open_checkpoint(path), context(tmp_path / "plain", prose)).path
    smooth = stage(**knobs, migration="smoothquant").run(open_checkpoint(path), context(tmp_path / "out", prose)).path
    assert error(smooth, path) < error(plain, path) / 4
    groups = json.loads((smooth / "config.json").read_text())["quantization_config"]["config_groups"]
    assert groups["group_0"]["format"] == "int-quantized", "the form that servers read"


def test_awq_gains_at_4_bits(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    path = outlying(tiny_llama, tmp_path / "outlying")
    plain = stage(weights={"rtn": {"group_size": 64}}).run(open_checkpoint(path), context(tmp_path / "plain", prose))
    knobs = stage(weights={"rtn": {"group_size": 64}}, migration={"awq": {"group_size": 64, "steps": 10}})
    moved = knobs.run(open_checkpoint(path), context(tmp_path / "out", prose))
    assert error(moved.path, path) < 0.9 * error(plain.path, path)


def test_alone_it_writes_a_plain_checkpoint(tiny_v2: Path, prose: Path, tmp_path: Path) -> None:
    knobs = stage(migration={"smoothquant": {"alpha": 0.6}})
    source = open_checkpoint(tiny_v2)
    assert knobs.problems(source.header) == []
    done = open_checkpoint(knobs.run(source, context(tmp_path / "out", prose)).path)
    assert {info.encoding for info in done.header.tensors.values()} == {"plain"}
    assert {info.dtype for info in done.header.tensors.values()} == {torch.bfloat16}
    assert "quantization_config" not in done.config
    moved = [name for name in source.header.tensors if not torch.equal(done.read(name), source.read(name))]
    assert len(moved) > 30
    with torch.no_grad():
        assert torch.equal(Model.load(done).forward(TOKENS), Model.load(source).forward(TOKENS))


def test_packed_weights_are_refused(tiny_qwen2: Path, prose: Path, tmp_path: Path) -> None:
    packed = stage(weights="rtn").run(open_checkpoint(tiny_qwen2), context(tmp_path / "out", prose)).path
    (problem,) = stage(migration="smoothquant").problems(open_checkpoint(packed).header)
    assert "packed already" in str(problem)
