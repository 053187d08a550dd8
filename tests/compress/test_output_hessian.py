"""Output Hessians against one backward pass through the whole model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.compress import output_hessian
from deepseek_compress.compress.job import Job
from deepseek_compress.compress.output_hessian import collect, parts
from deepseek_compress.compress.selection import select
from deepseek_compress.compress.solver import LinearSolver
from deepseek_compress.models import Architecture, Role
from deepseek_compress.models.runtime import Model
from deepseek_compress.streaming.loop import silent

FAMILIES = ["tiny_v3", "tiny_v2", "tiny_qwen2", "tiny_llama"]
TOKENS = torch.randint(2, 512, (3, 40), generator=torch.Generator().manual_seed(5))


def job_of(path: Path, work: Path) -> Job:
    architecture = Architecture.of(open_checkpoint(path))
    return Job(architecture, LinearSolver(select(architecture, set(), None), None, None, 0), work)


def whole(path: Path) -> dict[str, Tensor]:
    """Mean of g g^T by tensor name, of every linear that runs, by autograd over the whole model."""
    model, found, counts = Model.load(path), {}, {}
    handles = []

    def watched(name: str, weights: object) -> object:
        class Watched:
            def __getitem__(self, key: str) -> Tensor:
                return weights[key]  # type: ignore[index, no-any-return]

            def __contains__(self, key: str) -> bool:
                return key in weights  # type: ignore[operator]

            def linear(self, key: str, x: Tensor) -> Tensor:
                out: Tensor = weights.linear(key, x)  # type: ignore[attr-defined]
                handles.append((f"{name}.{key}", out))
                return out

        return Watched()

    for weight in model.weights.values():
        weight.requires_grad_(weight.is_floating_point())
    layers = range(model.cfg.num_hidden_layers)
    model.blocks = [watched(f"model.layers.{layer}", model.blocks[layer]) for layer in layers]  # type: ignore[misc]
    scores = model(TOKENS).log_softmax(-1).flatten(0, 1)
    drawn = torch.multinomial(scores.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(scores.gather(1, drawn).sum(), [out for _, out in handles], allow_unused=True)
    for (name, _), g in zip(handles, gradients, strict=True):
        if g is not None:
            flat = g.reshape(-1, g.shape[-1])
            found[name] = found.get(name, 0) + flat.t() @ flat
            counts[name] = counts.get(name, 0) + len(flat)
    return {name: total / counts[name] for name, total in found.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_those_of_the_whole_model(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    job = job_of(path, tmp_path / "work")
    outputs, expected = collect(job, TOKENS, silent), whole(path)
    for block in job.architecture.blocks:
        for linear in block.linears:
            found = outputs.read(block, linear)
            if linear.role is Role.EXPERT:
                assert found is None
                continue
            assert found is not None
            want = expected[block.prefix + linear.name]
            assert torch.allclose(found[0], want, rtol=2e-3, atol=2e-3 * float(want.diagonal().mean())), linear.name


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, tiny_v3: Path) -> None:
    job, other = job_of(tiny_v3, tmp_path / "once"), job_of(tiny_v3, tmp_path / "twice")
    collect(job, TOKENS, silent)

    def stop(done: int, total: int, note: str) -> None:
        if "back" in note and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(other, TOKENS, stop)
    collect(other, TOKENS, silent)
    for block in job.architecture.blocks:
        name = f"outputs-{block.layer:05d}.npz"
        assert (job.work / name).read_bytes() == (other.work / name).read_bytes()


def test_wide_linears_have_a_matrix_for_each_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path
) -> None:
    assert [parts(rows) for rows in (1, 2048, 2049, 7168, 18432)] == [1, 1, 3, 4, 9]
    job = job_of(tiny_llama, tmp_path / "whole")
    block = job.architecture.blocks[0]
    linear = next(linear for linear in block.linears if linear.name.endswith("gate_proj"))
    one = collect(job, TOKENS, silent).read(block, linear)
    monkeypatch.setattr(output_hessian, "WIDEST", linear.rows // 2)
    two = collect(job_of(tiny_llama, tmp_path / "parts"), TOKENS, silent).read(block, linear)
    assert one is not None
    assert two is not None
    half = linear.rows // 2
    assert two.shape == (2, half, half)
    assert torch.allclose(two[0], one[0, :half, :half])
    assert torch.allclose(two[1], one[0, half:, half:])
