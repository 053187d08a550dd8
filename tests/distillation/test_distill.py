"""Distillation: the loss by brute force, students cut and trained, zeros kept, interrupted equals uninterrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deepseek_compress.calibration.settings import Source
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.distillation import resume as resuming
from deepseek_compress.distillation.losses import Target, distillation_loss, topk_divergence
from deepseek_compress.distillation.shrink import shrink
from deepseek_compress.distillation.traces import batches_by_length, read_documents, record, target_of
from deepseek_compress.distillation.trainer import Schedule, State, masks_of, train
from deepseek_compress.errors import DscError, Problems
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.numerics.magnitude import Magnitude
from deepseek_compress.numerics.types import Statistics
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.distill import Distill
from deepseek_compress.tasks import mixture


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    problems = mixture(3, 40, "calibration")
    lines = [json.dumps({"prompt": problem.prompt, "completion": problem.solution}) for problem in problems]
    file.write_text("\n".join(lines))
    return file


def silent(done: int, total: int, note: str) -> None:
    return None


def context(out: Path, model: Path, text: Path) -> Context:
    return Context("student", out, "", 5, {"sources": [str(text)]}, outputs={"model": model}, tell=lambda line: None)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_over_all_tokens_is_the_whole_divergence(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(5, 12, generator=generator) * 3, torch.randn(5, 12, generator=generator) * 3
    best = torch.log_softmax(teacher, -1).topk(12)
    target = Target(best.indices, best.values, torch.zeros(5, dtype=torch.long), torch.ones(5))
    p = torch.softmax(teacher.double() / temperature, -1)
    expected = (p * (p.log() - torch.log_softmax(student.double() / temperature, -1))).sum(-1)
    found = topk_divergence(student, target, temperature)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_divergence_with_a_bucket_by_hand() -> None:
    teacher = torch.tensor([0.6, 0.2, 0.15, 0.05])
    student = torch.tensor([0.1, 0.3, 0.4, 0.2])
    target = Target(torch.tensor([[0, 1]]), teacher[:2].log()[None], torch.tensor([2]), torch.ones(1))
    p, q = torch.tensor([0.6, 0.2, 0.2]), torch.tensor([0.1, 0.3, 0.6])
    expected = float((p * (p / q).log()).sum())
    assert float(topk_divergence(student.log()[None], target, 1.0)) == pytest.approx(expected, rel=1e-5)
    whole = float(distillation_loss(student.log()[None], target, 1.0, 0.25))
    assert whole == pytest.approx(0.75 * expected - 0.25 * float(torch.tensor(0.4).log()), rel=1e-5)


def test_prompts_weigh_less_and_padding_nothing(tiny_v3: Path, text: Path) -> None:
    documents = read_documents([Source(path=str(text))], load_tokenizer(tiny_v3), 6, 512)
    model = Model.load(tiny_v3)
    traces = record(model, documents, 8, 0.25, silent)
    for document, trace in zip(documents, traces, strict=True):
        assert document.prompt > 1
        assert trace.weights.tolist() == [0.25] * (document.prompt - 1) + [1.0] * (len(document.ids) - document.prompt)
    tokens, places, target = target_of(traces)
    with torch.no_grad():
        logits = torch.log_softmax(model(tokens[:, :-1]), -1).flatten(0, 1)[places]
        alone = torch.cat([torch.log_softmax(model(trace.ids[None, :-1]), -1)[0] for trace in traces])
    assert torch.allclose(logits, alone, atol=1e-4)
    assert torch.allclose(logits.gather(1, target.ids), target.log_probs, atol=2e-2)  # float16
    assert torch.equal(target.labels, torch.cat([trace.ids[1:] for trace in traces]))


def test_too_little_text_is_said(tiny_v3: Path, text: Path) -> None:
    with pytest.raises(DscError, match=r"40 documents of training text, 41 asked for; .*documents: 40"):
        read_documents([Source(path=str(text))], load_tokenizer(tiny_v3), 41, 512)


def test_batches_hold_every_document_once_within_their_size() -> None:
    lengths = [7, 90, 3, 20, 20, 64, 5, 200]
    groups = batches_by_length(lengths, 100)
    assert sorted(index for group in groups for index in group) == list(range(8))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 100 for group in groups)


def test_most_used_experts_of_each_group_stay(tiny_v3: Path) -> None:
    model = Model.load(tiny_v3)
    # layers 0 (dense) and 2 stay; of each pair of experts the more used one
    use = {1: torch.tensor([5, 9, 1, 0, 3, 3, 2, 8]), 2: torch.arange(8)}
    plan = shrink(model.family, model.cfg, use, 4, 2)
    assert plan.config == {"num_hidden_layers": 2, "n_routed_experts": 4}
    assert plan.experts == {2: [1, 3, 5, 7]}
    assert plan.tensors["model.layers.1.mlp.experts.2.up_proj.weight"].name.endswith("2.mlp.experts.5.up_proj.weight")
    rows = plan.tensors["model.layers.1.mlp.gate.weight"].rows
    assert rows is not None
    assert rows.tolist() == [1, 3, 5, 7]
    assert plan.tensors["model.layers.0.mlp.up_proj.weight"].name == "model.layers.0.mlp.up_proj.weight"


def test_a_cut_student_has_the_teachers_experts_and_runs(tiny_v2: Path, text: Path, tmp_path: Path) -> None:
    stage = Distill(experts=4, layers=2, steps=0, documents=20)
    output = stage.run(open_checkpoint(tiny_v2), context(tmp_path / "student", tiny_v2, text))
    student, teacher = Model.load(output.path), Model.load(tiny_v2)
    config = json.loads((output.path / "config.json").read_text())
    assert (config["n_routed_experts"], config["num_hidden_layers"], config["topk_method"]) == (4, 2, "greedy")
    (layer, kept), *others = output.facts["experts_kept"].items()
    assert not others
    assert layer == "2"
    for new, old in enumerate(kept):
        name = "model.layers.{}.mlp.experts.{}.down_proj.weight"
        assert torch.equal(student.weights[name.format(1, new)], teacher.weights[name.format(2, old)])
    assert torch.equal(
        student.weights["model.layers.1.mlp.gate.weight"], teacher.weights["model.layers.2.mlp.gate.weight"][kept]
    )
    assert bool(student(torch.arange(3, 20)[None]).isfinite().all())


def test_training_brings_a_sparse_student_nearer_and_keeps_its_zeros(tiny_v3_bf16: Path, text: Path) -> None:
    teacher, student = Model.load(tiny_v3_bf16), Model.load(tiny_v3_bf16)
    names = [name for name in student.weights if name.endswith("proj.weight")]
    for name in names:
        student.weights[name].copy_(Magnitude()(student.weights[name], Statistics()))
    masks = masks_of(student.weights, names)
    assert set(masks) == set(names)
    documents = read_documents([Source(path=str(text))], load_tokenizer(tiny_v3_bf16), 24, 512)
    traces = record(teacher, documents, 16, 1.0, silent)
    losses = train(student, traces, Schedule(12, 800, 2e-3, 1.0, 0.0, 0), masks, silent)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    for name in names:
        weight = student.weights[name]
        assert bool(((weight.view(len(weight), -1, 4) == 0).sum(-1) >= 2).all())
    dense = masks_of(teacher.weights, names)
    assert dense == {}


def test_interrupted_training_ends_with_the_same_bits(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    stage = Distill(steps=5, documents=12, batch_tokens=300)
    source = open_checkpoint(tiny_llama)
    whole = stage.run(source, context(tmp_path / "whole", tiny_llama, text)).path
    save = resuming.Keeper.save

    def stop(self: resuming.Keeper, state: State) -> None:
        save(self, state)
        if state.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(resuming.Keeper, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        stage.run(source, context(tmp_path / "halves", tiny_llama, text))
    assert not (tmp_path / "halves" / "config.json").exists()
    monkeypatch.setattr(resuming.Keeper, "save", save)
    halves = stage.run(source, context(tmp_path / "halves", tiny_llama, text)).path
    assert not list(halves.glob(".dsc*"))
    for file in sorted(whole.iterdir()):
        assert (halves / file.name).read_bytes() == file.read_bytes(), file.name


def test_sizes_that_do_not_fit_are_told(tiny_v3: Path, tiny_llama: Path) -> None:
    header = open_checkpoint(tiny_v3).header
    assert [str(problem) for problem in Distill(experts=6, layers=9).problems(header)] == [
        "distill.experts: 6 of 8 experts in 4 groups; give a multiple of 4 from 8 to 8",
        "distill.layers: 9 of 3; give 2 to 3",
    ]
    (problem,) = Distill(experts=2).problems(open_checkpoint(tiny_llama).header)
    assert "has no experts" in str(problem)
    with pytest.raises(DscError, match="'nobody' is no earlier output"):
        Distill(teacher="nobody").run(open_checkpoint(tiny_llama), context(Path("x"), tiny_llama, Path("y")))
    assert issubclass(Problems, DscError)
