"""The engine: pieces, parts and recomputation give one gradient; losses that look inside; importance; the command."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_compress.calibration.settings import Source
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.distillation import importance, objective
from deepseek_compress.distillation.documents import Batch, Document, batch_of, read_documents
from deepseek_compress.distillation.features import even_pairs, inside_loss, projections
from deepseek_compress.distillation.losses import ForwardKl, losses_of
from deepseek_compress.distillation.objective import Objective
from deepseek_compress.distillation.on_policy import chosen, own_text
from deepseek_compress.distillation.shrink import Sizes, shrink, sizes
from deepseek_compress.distillation.teachers import JointTeacher, LiveTeacher
from deepseek_compress.distillation.trainer import Schedule, State, Trainer
from deepseek_compress.distillation.views import view
from deepseek_compress.errors import DscError
from deepseek_compress.models import moe
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.distill import Distill
from deepseek_compress.streaming.loop import silent
from tests.house.conftest import Dsc, dsc

__all__ = ["dsc"]  # a fixture


def documents_of(model: Path, text: Path, count: int) -> list[Document]:
    return read_documents([Source(path=str(text))], load_tokenizer(model), 512, count)


def leaves(model: Model, noise: float = 0.0) -> Model:
    """A student with gradients: the model, or something near it."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)).requires_grad_()
        for name, tensor in model.weights.items()
    }
    return Model(model.family, model.cfg, weights)


def gradients(model: Model, batches: list[Batch], teacher: LiveTeacher, what: Objective) -> dict[str, Tensor]:
    """Of a step of `batches`."""
    weight = sum(float(batch.weights.sum()) for batch in batches)
    extra = {name: p.requires_grad_() for name, p in projections(what.losses, model.cfg, teacher.model.cfg).items()}
    for batch in batches:
        what.backward(model, batch, what.said(teacher, batch), extra, weight)
    found = {name: tensor.grad.clone() for name, tensor in model.weights.items() if tensor.grad is not None}
    for tensor in model.weights.values():
        tensor.grad = None
    return found


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    largest = max(float(tensor.abs().max()) for tensor in a.values())
    return a.keys() == b.keys() and all(float((a[n] - b[n]).abs().max()) <= tolerance * largest for n in a)


@pytest.mark.parametrize("name", ["tiny_v3_bf16", "tiny_qwen2"])
def test_pieces_parts_and_recomputation_give_one_gradient(
    name: str, request: pytest.FixtureRequest, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(name)
    model = Model.load(path)
    teacher, student, documents = LiveTeacher(model, 512, 2.0), leaves(model, 0.2), documents_of(path, text, 6)
    losses = losses_of({"forward_kl": 0.6, "cross_entropy": 0.3, "hidden_states": 0.1})
    plain = Objective(losses, 2.0, 512, even_pairs(model.cfg, model.cfg))
    whole = batch_of(documents, range(6), 0.25)
    wanted = gradients(student, [whole], teacher, plain)
    # by hand: all positions at once, through the model's own forward pass
    logits = student(whole.tokens[:, :-1]).flatten(0, 1)[whole.places]
    with torch.no_grad():
        said = torch.log_softmax(model(whole.tokens[:, :-1]).flatten(0, 1)[whole.places] / 2, -1)
    kl = (said.exp() * (said - torch.log_softmax(logits / 2, -1))).sum(-1)
    each = 0.6 * 4 * kl + 0.3 * torch.nn.functional.cross_entropy(logits, whole.labels, reduction="none")
    (each * whole.weights).sum().div(whole.weights.sum()).backward()  # type: ignore[no-untyped-call]
    by_hand = {key: tensor.grad.clone() for key, tensor in student.weights.items() if tensor.grad is not None}
    for tensor in student.weights.values():
        tensor.grad = None
    assert close(gradients(student, [whole], teacher, dataclasses.replace(plain, losses=losses[:2])), by_hand)
    monkeypatch.setattr(objective, "PIECE", 512 * 7)
    assert close(gradients(student, [whole], teacher, plain), wanted)
    again = dataclasses.replace(plain, checkpointing=True)
    assert close(gradients(student, [whole], teacher, again), wanted)
    no_hidden = dataclasses.replace(plain, losses=losses[:2])
    parts = [batch_of(documents, part, 0.25) for part in ((0, 1), (2, 3, 4), (5,))]
    one, three = (gradients(student, batches, teacher, no_hidden) for batches in ([whole], parts))
    assert close(one, three)
    mixed = gradients(student, [whole], teacher, dataclasses.replace(no_hidden, mixed=True))
    assert not close(mixed, one)
    assert name == "tiny_v3_bf16" or close(mixed, one, 0.1)  # rounded scores choose other experts


def test_what_lies_inside_is_least_at_the_teacher_and_teaches(tiny_v3_bf16: Path, text: Path) -> None:
    """Hidden states and routers: no gradient at the teacher, a lower loss after a step, fewer experts compared."""
    model = Model.load(tiny_v3_bf16)
    teacher, documents = LiveTeacher(model, 512, 1.0), documents_of(tiny_v3_bf16, text, 4)
    batch = batch_of(documents, range(4), 1.0)
    for name in ("hidden_states", "router", "contrastive"):
        what = Objective(losses_of(name), 1.0, 512, even_pairs(model.cfg, model.cfg))
        extra = projections(what.losses, model.cfg, model.cfg)
        said, other = what.said(teacher, batch), leaves(model, 0.3)
        at_teacher = gradients(leaves(model), [batch], teacher, what)
        away = gradients(other, [batch], teacher, what)
        size = {
            key: sum(float(t.square().sum()) for t in g.values()) for key, g in (("here", at_teacher), ("away", away))
        }
        if name != "contrastive":
            assert size["here"] < 1e-6 * size["away"], name
        before = what.measure(other, batch, said, extra).loss
        step = 0.1 * before / batch.weights.sum() / size["away"]
        moved = {key: t.detach() - step * away.get(key, torch.zeros(())) for key, t in other.weights.items()}
        assert what.measure(Model(model.family, model.cfg, moved), batch, said, extra).loss < before, name
    plan = shrink(model.family, model.cfg, Sizes(8, 2), {1: torch.arange(8.0), 2: torch.arange(8.0)})
    assert plan.layers == [0, 2]


def test_importance_by_brute_force(tiny_v3: Path, text: Path) -> None:
    model = Model.load(tiny_v3)
    documents = documents_of(tiny_v3, text, 5)
    batches = [batch_of(documents, [i], 1.0) for i in range(5)]
    together = [batch_of(documents, range(5), 1.0)]
    influence = importance.influence(model, together)
    lost = importance.loss_without(model, together)
    turned, kl, count = torch.zeros(3), torch.zeros(3), 0
    use: dict[int, Tensor] = {layer: torch.zeros(2, 8) for layer in (1, 2)}
    for batch in batches:
        tokens = batch.tokens[:, :-1]
        states = model.hidden_states(tokens)
        count += tokens.numel()
        for layer in range(3):
            a, b = states[layer][0], states[layer + 1][0]
            turned[layer] += (1 - (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).sum()
            names = [0, 1, 2]
            names.remove(layer)
            skipped = Model(model.family, model.cfg, model.weights)
            skipped.blocks = [model.blocks[i] for i in names]
            p, q = torch.log_softmax(model(tokens), -1), torch.log_softmax(_run(skipped, tokens, names), -1)
            kl[layer] += (p.exp() * (p - q)).sum()
        positions = torch.arange(tokens.shape[1])[None]
        for layer in (1, 2):
            block = model.blocks[layer]
            hidden = model.family.attention_part(model.cfg, layer, block, states[layer], positions, None, None)
            x = model.family.ffn_input(model.cfg, layer, block, hidden)[0]
            assert model.cfg.moe is not None
            routing = moe.route(model.cfg.moe, block, x)
            for row, experts in enumerate(routing.experts.tolist()):
                for slot, expert in enumerate(experts):
                    out = moe.run_expert(model.cfg.moe, block, expert, x[row : row + 1])
                    use[layer][0, expert] += float(routing.gate_weights[row, slot]) * float(out.norm())
                    use[layer][1, expert] += 1
    assert torch.allclose(influence, turned / count, rtol=1e-3)
    assert torch.allclose(lost, kl / count, rtol=1e-2)
    for by, row in (("activation", 0), ("frequency", 1)):
        found = importance.expert_use(model, together, by)
        for layer in (1, 2):
            wanted = use[layer][0] / use[layer][1].clamp(min=1) if row == 0 else use[layer][1]
            assert torch.allclose(found[layer], wanted, rtol=1e-3), by


def _run(model: Model, tokens: Tensor, layers: list[int]) -> Tensor:
    """Logits over the blocks that are left, each told its own number."""
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    hidden = model.family.embed(model.cfg, model.weights[model.cfg.names.embedding], tokens)
    for layer, weights in zip(layers, model.blocks, strict=True):
        hidden = model.family.run_block(model.cfg, layer, weights, hidden, positions, tokens=tokens)
    return model.family.final_hidden(model.cfg, model.top, hidden) @ model.head.T


def test_a_share_becomes_experts_or_layers(tiny_v3: Path, tiny_llama: Path) -> None:
    assert sizes(Model.load(tiny_llama).cfg, 0.5) == Sizes(layers=1)
    assert sizes(Model.load(tiny_v3).cfg, 0.5) == Sizes(experts=8)  # two of each of four groups are needed
    assert sizes(Model.load(tiny_v3).cfg, 1.0) == Sizes()


def test_frozen_tensors_stay_and_a_training_without_gain_ends(tiny_llama: Path, text: Path) -> None:
    teacher, student = Model.load(tiny_llama), Model.load(tiny_llama)
    before = {name: tensor.clone() for name, tensor in student.weights.items()}
    schedule = Schedule(20, 300, learning_rate=1e-3, freeze=("*embed_tokens*", "*.mlp.*"), held_back=3, patience=2)
    what = Objective(losses_of({"forward_kl": 0.5, "cross_entropy": 0.5}), 1.0, 512)
    trainer = Trainer(student, LiveTeacher(teacher, 512, 1.0), documents_of(tiny_llama, text, 12), what, schedule)
    state = trainer.run(silent)
    changed = {name for name in before if not torch.equal(before[name], student.weights[name])}
    assert changed
    assert not any("embed_tokens" in name or ".mlp." in name for name in changed)
    with pytest.raises(DscError, match="every tensor is frozen"):
        Trainer(student, trainer.teacher, trainer.documents, what, schedule._replace(freeze=("*",))).begin()
    hopeless = Trainer(
        Model.load(tiny_llama), trainer.teacher, trainer.documents, Objective((ForwardKl(),), 1.0, 512), schedule
    )
    state = hopeless.run(silent)  # the teacher itself: nothing can be gained
    assert [found.step for found in state.validations] == [0, state.step // 2, state.step]
    assert state.step < 20
    assert max(found.kl for found in state.validations) < 1e-9
    assert all(torch.equal(before[name], tensor) for name, tensor in hopeless.student.weights.items())


@pytest.mark.parametrize("knobs", [{"optimizer": "adafactor"}, {"precision": "bfloat16"}, {"precision": "mixed"}])
def test_leaner_trainings_learn(knobs: dict[str, object], tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    more = {"layers": 1, "steps": 10, "documents": 20, "batch_tokens": 300, "validation": 0.2, "learning_rate": 5e-3}
    stage = build(Distill, {**more, "checkpointing": True, "accumulate": 2, **knobs}, "distill")
    made = Context(
        "s", tmp_path / "s", "", 0, {"sources": [str(text)]}, outputs={"model": tiny_llama}, tell=lambda line: None
    )
    validation = stage.run(open_checkpoint(tiny_llama), made).facts["validation"]
    assert min(found["kl"] for found in validation) < 0.9 * validation[0]["kl"]
    card = (tmp_path / "s" / "README.md").read_text()
    assert "| step | loss | KL to the teacher |" in card


def test_minutes_become_steps_once_and_a_loss_that_is_no_number_ends_it(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    made = Context(
        "s", tmp_path / "s", "", 0, {"sources": [str(text)]}, outputs={"model": tiny_llama}, tell=lines.append
    )
    asked: list[int] = []

    def seconds(self: Trainer, steps: int) -> float:
        asked.append(steps)
        return 30.0

    monkeypatch.setattr(Trainer, "seconds_a_step", seconds)
    stage = build(Distill, {"minutes": 2, "documents": 12, "batch_tokens": 300, "learning_rate": 1e-3}, "distill")

    def stop(done: int, total: int, note: str) -> None:
        assert "tok/s" in note
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.run(open_checkpoint(tiny_llama), replace(made, progress=stop))
    facts = stage.run(open_checkpoint(tiny_llama), made).facts
    assert facts["steps"] == 4
    assert len(asked) == 1
    assert lines[0] == "4 steps of 30.0 s in 2 minutes (recipe: distill.minutes)"
    knobs = {"steps": 5, "documents": 12, "batch_tokens": 300, "learning_rate": 1e38, "layers": 1}
    wild = build(Distill, knobs, "distill")
    with pytest.raises(
        DscError, match=r"the loss is (nan|inf) at step \d of 5; lower distill.learning_rate \(1e\+38\)"
    ):
        wild.run(open_checkpoint(tiny_llama), replace(made, out=tmp_path / "wild"))
    assert not (tmp_path / "wild" / "config.json").exists()


def test_a_trial_leaves_no_trace(tiny_llama: Path, text: Path) -> None:
    student = Model.load(tiny_llama)
    before = {name: tensor.clone() for name, tensor in student.weights.items()}
    what = Objective(losses_of("cross_entropy"), 1.0, 512)
    teacher = LiveTeacher(Model.load(tiny_llama), 512, 1.0)
    trainer = Trainer(student, teacher, documents_of(tiny_llama, text, 8), what, Schedule(9, 300, held_back=2))
    assert trainer.seconds_a_step(2) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in student.weights.items())
    assert trainer.schedule == Schedule(9, 300, held_back=2)
    assert trainer.steps_for(1) == 1
    total = sum(len(document.ids) for document in trainer.documents[:-2])
    assert trainer.steps_for(3 * total) >= 3


def test_a_dense_model_is_distilled_as_typed_and_by_another(
    dsc: Dsc, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    few = ["--length", 64, "--set", "batch_tokens=256", "--set", "learning_rate=0.001"]
    done = dsc("distill", tiny_llama, "-o", "one", "--data", text, "--tokens", 2000, "--cache", "said", *few)
    assert done.exit_code == 0, done.output
    assert Model.load(Path("one")).cfg.num_hidden_layers == 2  # 0.8 of two
    assert "said: exact words of" in done.stderr
    run = json.loads(Path("one/dsc_run.json").read_text())["facts"]
    assert run["steps"] >= 8
    # the teacher is not there any more: its words are
    done = dsc(
        "distill", "gone", "-o", "two", "--student", "one", "--data", text, "--steps", 2, "--cache", "said", *few
    )
    assert done.exit_code == 0, done.output
    done = dsc("distill", tiny_llama, "-o", "three", "--student", "one", "--data", text, "--steps", 2, *few)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == f"next: dsc evaluate three --reference {tiny_llama} -o report.json"
    done = dsc("distill", "gone", "-o", "four", "--student", "one", "--steps", 2, *few)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: gone: no such directory")
    done = dsc("distill", tiny_llama, "-o", "five", "--steps", 2, "--tokens", 9)
    assert "steps and tokens: one of them says how long to train" in done.stderr
    done = dsc("distill", tiny_llama, "-o", "six", "--set", "loss=kl")
    assert "unknown loss 'kl'; valid names: forward_kl" in done.stderr


def test_on_its_own_text_a_student_comes_nearer_and_resumes_alike(tiny_llama: Path, text: Path) -> None:
    """Every step on what the student writes: it depends on the weights of that step, and on nothing else."""
    teacher = Model.load(tiny_llama)
    documents = read_documents([Source(path=str(text))], load_tokenizer(tiny_llama), 64, 12)
    what = Objective(losses_of("forward_kl"), 1.0, teacher.cfg.vocab_size)
    schedule = Schedule(6, 256, learning_rate=3e-3, held_back=2, on_policy=1.0)

    def training(until: int, state: State | None = None) -> State:
        student = Model.load(tiny_llama)
        for name, weight in student.weights.items():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
        trainer = Trainer(student, LiveTeacher(teacher, teacher.cfg.vocab_size, 1.0), documents, what, schedule)

        def stop(now: State) -> None:
            if now.step == until:
                raise InterruptedError

        begun = state or trainer.begin()
        with suppress(InterruptedError):
            trainer.run(silent, begun, stop)
        return begun

    whole = training(6)
    assert whole.validations[-1].kl < whole.validations[0].kl
    again = training(6, training(3))
    assert again.losses == whole.losses
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())


def test_own_text_keeps_prompts_and_follows_the_seed(tiny_llama: Path) -> None:
    model = Model.load(tiny_llama)
    documents = [Document([3, 4, 5, 6, 7, 8, 9, 10], 3), Document([11, 12, 13, 14, 15, 16], 0)]
    own = own_text(model, documents, 7)
    assert [document.prompt for document in own] == [3, 0]
    assert own[0].ids[:3] == [3, 4, 5]
    assert own[1].ids[:2] == [11, 12]
    assert all(len(mine.ids) <= len(given.ids) + 1 for mine, given in zip(own, documents, strict=True))
    assert own == own_text(model, documents, 7)
    assert own != own_text(model, documents, 8)
    assert sum(chosen(0.3, 1, step) for step in range(1000)) == pytest.approx(300, abs=50)


def test_joint_training_changes_the_teacher_by_its_text_and_by_what_looks_inside(tiny_llama: Path, text: Path) -> None:
    """The teacher's gradient is that of autograd on its own loss and the contrastive term; none comes by the target."""
    batch = batch_of(documents_of(tiny_llama, text, 4), range(4), 1.0)
    size = Model.load(tiny_llama).cfg.vocab_size
    what = Objective(losses_of({"forward_kl": 1.0, "contrastive": 0.3}), 1.0, size, joint=0.5)
    teacher, student = JointTeacher(Model.load(tiny_llama), size, 1.0), leaves(Model.load(tiny_llama), 0.3)
    learned = {name: tensor.requires_grad_() for name, tensor in teacher.leaves().items()}
    extra = {n: p.requires_grad_() for n, p in projections(what.losses, student.cfg, teacher.model.cfg).items()}
    teacher.take(learned)
    weight = float(batch.weights.sum())
    what.backward(student, batch, what.said(teacher, batch), extra, weight)
    found = {name: tensor.grad for name, tensor in learned.items()}

    plain = leaves(Model.load(tiny_llama))
    seen, theirs = view(student, batch), view(plain, batch)
    own = torch.nn.functional.cross_entropy(theirs.final @ plain.head.T, batch.labels, reduction="sum") / weight
    (0.5 * own + inside_loss(what.losses, seen, theirs, batch, [], extra)).backward()
    for name, tensor in plain.weights.items():
        assert tensor.grad is not None
        assert torch.allclose(found[f"teacher/{name}"], tensor.grad, rtol=1e-3, atol=1e-6), name


def test_both_are_trained_and_only_the_student_is_written(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    knobs = {"joint": 0.5, "loss": {"forward_kl": 1.0, "contrastive": 0.1}, "steps": 3, "batch_tokens": 256}
    given = Context("out", tmp_path / "out", "", 5, {"sources": [str(text)]}, outputs={"model": tiny_llama},
                    tell=lambda line: None)  # fmt: skip
    output = build(Distill, {**knobs, "documents": 8}, "distill").run(open_checkpoint(tiny_llama), given)
    names = set(open_checkpoint(tiny_llama).header.tensors)
    assert set(open_checkpoint(output.path).header.tensors) == names
    assert output.facts["losses"][0] > 0
    problems = build(Distill, {**knobs, "cache": str(tmp_path)}, "distill").problems(open_checkpoint(tiny_llama).header)
    assert any("joint: needs the teacher itself" in problem.what for problem in problems)
