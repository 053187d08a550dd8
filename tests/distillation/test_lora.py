"""Changes of low rank: begin at the student, stay within their rank, keep zeros and everything else, resume alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.distillation import resume as resuming
from deepseek_compress.distillation.lora import Lora, LowRank
from deepseek_compress.errors import DscError
from deepseek_compress.models.runtime import Model
from tests.distillation.test_distill import context, stage, text

__all__ = ["text"]  # a fixture
ATTENTION = {"rank": 2, "alpha": 8.0, "modules": ["*.self_attn.*"]}


def test_it_begins_at_the_student_and_covers_the_mask() -> None:
    weights = {"a.weight": torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), "b.weight": torch.ones(2, 2)}
    mask = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]).expand(6, 8)
    changes = LowRank(Lora(rank=3, alpha=6.0), weights, ["a.weight"], {"a.weight": mask})
    learned = changes.leaves(seed=4)

    assert torch.equal(changes.present(weights, learned)["a.weight"], weights["a.weight"])
    assert changes.numbers == sum(tensor.numel() for tensor in learned.values()) == 3 * (6 + 8)

    learned["lora up of a.weight"] += 0.5
    found = changes.present(weights, learned)
    expected = weights["a.weight"] + 2 * (learned["lora up of a.weight"] @ learned["lora down of a.weight"]) * mask
    torch.testing.assert_close(found["a.weight"], expected)
    assert found["b.weight"] is weights["b.weight"]


def test_a_rank_is_no_more_than_a_matrix_has() -> None:
    weights = {"a.weight": torch.zeros(2, 8)}
    changes = LowRank(Lora(rank=16), weights, ["a.weight"], {})

    assert changes.leaves(0)["lora down of a.weight"].shape == (2, 8)
    assert changes.numbers == 2 * (2 + 8)


def test_what_is_written_differs_by_that_rank_where_it_was_asked_for(
    tiny_v3_bf16: Path, text: Path, tmp_path: Path
) -> None:
    knobs = {"learning_rate": 0.02, "steps": 6, "batch_tokens": 512, "loss": "cross_entropy", "lora": ATTENTION}
    done = stage(**knobs).run(open_checkpoint(tiny_v3_bf16), context(tmp_path / "out", tiny_v3_bf16, text))

    before, after = Model.load(tiny_v3_bf16).weights, Model.load(done.path).weights
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert [n for n in changed if not (".self_attn." in n and "proj" in n and n.endswith(".weight"))] == []
    for name in changed:
        sizes = torch.linalg.svdvals(after[name] - before[name])
        assert sizes[2] < 0.1 * sizes[0]  # rank two, but for the rounding to BF16
    curve = done.facts["validation"]
    assert min(point["loss"] for point in curve) < curve[0]["loss"]
    assert done.facts["lora"]["linears"] >= len(changed)


@pytest.mark.parametrize("at", [1, 3])
def test_a_stopped_training_goes_on_to_the_same_bytes(
    at: int, tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    monkeypatch.setattr(resuming, "LARGEST_SHARE", 1e9)
    wanted = stage(steps=4, batch_tokens=256, loss="cross_entropy", lora={"rank": 4})
    source = open_checkpoint(tiny_llama)
    whole = wanted.run(source, context(tmp_path / "whole", tiny_llama, text))

    def stop(done: int, total: int, note: str) -> None:
        if done == at and note.startswith("loss"):
            raise KeyboardInterrupt

    given = context(tmp_path / "stopped", tiny_llama, text)
    with pytest.raises(KeyboardInterrupt):
        wanted.run(source, replace(given, progress=stop))
    again = wanted.run(source, given)

    assert again.facts["losses"] == whole.facts["losses"]
    for file in whole.path.glob("*.safetensors"):
        assert (again.path / file.name).read_bytes() == file.read_bytes()


def test_what_cannot_be_is_said_before_anything_is_read(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    header = open_checkpoint(tiny_llama).header
    (line,) = stage(lora={"rank": 4}, freeze=["*norm*"]).problems(header)
    assert line.what == "distill.freeze: lora freezes every weight"

    wanted = stage(steps=1, lora={"modules": ["*.no_such_proj"]})
    with pytest.raises(DscError, match=r"distill\.lora\.modules: \*\.no_such_proj match no linear of a block"):
        wanted.run(open_checkpoint(tiny_llama), context(tmp_path / "out", tiny_llama, text))
