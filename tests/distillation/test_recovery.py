"""Recovery: gradients against autograd through the whole dequantisation, codes untouched, a KL that falls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.distillation.recovery import Norm, Scaled, recover
from deepseek_compress.errors import DscError
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Quantized, Statistics
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress
from deepseek_compress.stages.recover import Recover
from deepseek_compress.tasks import mixture

TOKENS = torch.randint(2, 512, (6, 32), generator=torch.Generator().manual_seed(9))


def divergence(teacher: Model, student: Model, tokens: Tensor) -> float:
    with torch.no_grad():
        wanted, given = (torch.log_softmax(model(tokens), -1) for model in (teacher, student))
        return float((wanted.exp() * (wanted - given)).sum(-1).mean())


def rounded(path: Path) -> tuple[Model, Model, dict[str, Quantized], dict[str, Tensor]]:
    """Teacher, a student with every linear of its blocks at 3 bits, what is packed, and the norms."""
    teacher, loaded = Model.load(path), Model.load(path)
    packed = {
        name: Rtn(num_bits=3, group_size=32)(weight, Statistics())
        for name, weight in teacher.weights.items()
        if name.endswith("proj.weight")
    }
    weights = {**loaded.weights, **{name: weight.dequantize() for name, weight in packed.items()}}
    norms = {name: weight for name, weight in teacher.weights.items() if "norm" in name}
    return teacher, Model(loaded.family, loaded.cfg, weights), packed, norms


def test_gradients_are_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    start = Rtn(group_size=32)(torch.randn(6, 64, generator=generator), Statistics())
    x, y = torch.randn(10, 64, generator=generator), torch.randn(10, 6, generator=generator)
    part, norm = Scaled(start), Norm(torch.rand(64, generator=generator) + 0.5)
    for _ in range(2):  # gradients of samples add up
        ((x * norm.weight) @ part.weight.t() * y).sum().backward()  # type: ignore[no-untyped-call]
    a, v = torch.zeros_like(start.scale).requires_grad_(), torch.zeros(64).requires_grad_()
    codes = start.codes.view(6, 2, 32).float() - start.zero_point[..., None].float()
    weight = (codes * (start.scale * (1 + a))[..., None]).view(6, 64)
    (2 * (x * (norm.start * (1 + v))) @ weight.t() * y).sum().backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    assert part.change.grad is not None
    assert norm.change.grad is not None
    assert torch.allclose(part.change.grad, a.grad, rtol=1e-4, atol=1e-4)
    assert v.grad is not None
    assert torch.allclose(norm.change.grad, v.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_v3"])
def test_recovery_lowers_the_divergence_and_keeps_the_codes(name: str, request: pytest.FixtureRequest) -> None:
    teacher, student, packed, norms = rounded(request.getfixturevalue(name))
    before = divergence(teacher, student, TOKENS)

    def run() -> tuple[dict[str, Quantized | Tensor], list[float]]:
        return recover(
            teacher, student, packed, norms, TOKENS, passes=2, batch_size=2, learning_rate=2e-2, seed=1,
            progress=lambda done, total, note: None,
        )  # fmt: skip

    trained, losses = run()
    assert len(losses) == 6
    for key, old in packed.items():
        new = trained[key]
        assert isinstance(new, Quantized)
        assert torch.equal(new.codes, old.codes)
        assert torch.equal(new.zero_point, old.zero_point)
        assert torch.equal(new.scale, new.scale.bfloat16().float())
    values = {key: part.dequantize() if isinstance(part, Quantized) else part.float() for key, part in trained.items()}
    after = divergence(teacher, Model(student.family, student.cfg, {**student.weights, **values}), TOKENS)
    assert after < 0.9 * before
    again, _ = run()
    assert all(torch.equal(again[key][1], trained[key][1]) for key in packed), "same seed, same bits"


def test_stage(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    problems = mixture(seed=3, count=60, split="calibration")
    text.write_text("".join(json.dumps({"text": f"{p.prompt} {p.solution}"}) + "\n" for p in problems))

    def context(name: str, **outputs: Path) -> Context:
        calibration = {"sources": [str(text)], "samples": 4, "length": 48}
        return Context(name, tmp_path / name, "stages: []\n", 0, calibration, outputs={"model": tiny_llama, **outputs})

    compress = build(Compress, {"weights": {"rtn": {"num_bits": 3, "group_size": 32}}}, "compress")
    packed = compress.run(open_checkpoint(tiny_llama), context("packed")).path
    stage = build(Recover, {"samples": 8, "passes": 4, "batch_size": 8, "learning_rate": 0.02}, "recover")
    assert stage.problems(open_checkpoint(packed).header) == []
    assert "no packed weights" in str(stage.problems(open_checkpoint(tiny_llama).header)[0])
    facts = stage.run(open_checkpoint(packed), context("recovered")).facts
    assert facts["last_kl"] < facts["first_kl"]
    old, new = open_checkpoint(packed), open_checkpoint(tmp_path / "recovered")
    assert new.config == old.config
    assert [step["stage"] for step in (new.manifest or {})["lineage"]] == ["compress", "recover"]
    changed = [name for name in new.header.tensors if not torch.equal(old.read(name), new.read(name))]
    assert all("proj" in name or "norm" in name for name in changed)
    with pytest.raises(DscError, match="unknown output 'teacher'"):
        build(Recover, {"reference": "teacher"}, "recover").run(open_checkpoint(packed), context("other"))
