"""Turned models: the matrices are orthogonal, and the model computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.compress.rotation import rotated
from deepseek_compress.models import Architecture
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.rotation import Hadamard, Rotation
from tests.models.reference import relative
from tests.stages.test_compress import context, loss, stage

TOKENS = torch.randint(2, 512, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("size", [1, 7, 8, 36, 96, 128, 576])
def test_it_is_orthogonal_and_spreads(size: int) -> None:
    rotation = Rotation(size, seed=3)
    matrix = rotation(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert not torch.equal(matrix, Rotation(size, seed=4)(torch.eye(size, dtype=torch.float64))) or size == 1
    power = size & -size
    assert float(matrix.abs().max()) <= power**-0.5 + 1e-9
    if power == size:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5)), "a Hadamard matrix"
    x = torch.randn(5, size, dtype=torch.float64)
    assert torch.allclose(rotation(x), x @ matrix)
    assert torch.allclose(rotation.rows(x.T), matrix.T @ x.T)
    assert torch.allclose(rotation.rows(x[0]), x[0] @ matrix), "a bias is a row"


@pytest.mark.parametrize("name", ["tiny_qwen2", "tiny_llama", "tiny_v2", "tiny_v3"])
@torch.no_grad()
def test_the_turned_model_computes_the_same(name: str, request: pytest.FixtureRequest) -> None:
    source = open_checkpoint(request.getfixturevalue(name))
    turned = rotated(Architecture.of(source), Hadamard())
    assert Architecture.of(turned).problems() == []
    assert turned.config["tie_word_embeddings"] is False
    ours, theirs = Model.load(turned), Model.load(source)
    assert bool((ours.weights[ours.cfg.names.norm] == 1).all())
    for kind in ("o_proj", "down_proj", "gate_proj", "v_proj" if ours.cfg.mla is None else "kv_b_proj"):
        names = [weight for weight in ours.weights if weight.endswith(kind + ".weight")]
        assert names
        assert not any(torch.allclose(ours.weights[weight], theirs.weights[weight], atol=1e-3) for weight in names)
    assert relative(ours.forward(TOKENS), theirs.forward(TOKENS)) < 1e-5


def test_a_turned_model_is_written_and_calibrated(tiny_qwen2: Path, prose: Path, tmp_path: Path) -> None:
    told: list[str] = []
    knobs = stage(rotation={"hadamard": {"seed": 2}}, migration="smoothquant", weights={"gptq": {"group_size": 32}})
    source = open_checkpoint(tiny_qwen2)
    assert knobs.problems(source.header) == []
    done = open_checkpoint(knobs.run(source, context(tmp_path / "out", prose, told)).path)
    assert "the head is a tensor of its own now: a rotation parts it from the embedding" in told
    assert done.config["tie_word_embeddings"] is False
    assert done.header.tensors["lm_head.weight"].encoding == "plain"
    assert Architecture.of(done).problems() == []
    assert loss(done.path, tiny_qwen2) < 0.2
    plain = stage(rotation="hadamard").run(source, context(tmp_path / "plain", prose)).path
    assert {info.encoding for info in open_checkpoint(plain).header.tensors.values()} == {"plain"}
    assert 0 < loss(plain, tiny_qwen2) < 1e-4, "rounded to BF16, nothing else"
    again = stage(rotation="hadamard").run(source, context(tmp_path / "again", prose)).path
    assert (again / "model-00001-of-00001.safetensors").read_bytes() == (
        plain / "model-00001-of-00001.safetensors"
    ).read_bytes()


def test_what_cannot_be_turned_is_one_line(tiny_qwen2: Path, prose: Path, tmp_path: Path) -> None:
    packed = stage(weights="rtn").run(open_checkpoint(tiny_qwen2), context(tmp_path / "out", prose)).path
    (problem,) = stage(rotation="hadamard").problems(open_checkpoint(packed).header)
    assert "packed already" in str(problem)
