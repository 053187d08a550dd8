"""Students cut and trained, zeros kept, interrupted equals uninterrupted, the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepseek_compress.calibration.settings import Source
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.distillation import resume as resuming
from deepseek_compress.distillation.documents import Document, batch_of, batches_by_length, read_documents
from deepseek_compress.distillation.importance import parts
from deepseek_compress.distillation.losses import ForwardKl
from deepseek_compress.distillation.objective import Objective
from deepseek_compress.distillation.shrink import Shrink, Sizes, head_group, narrow, readers, shrink
from deepseek_compress.distillation.shrink import problems as shrink_problems
from deepseek_compress.distillation.students import Size, _shown, cut
from deepseek_compress.distillation.teachers import LiveTeacher
from deepseek_compress.distillation.trainer import Schedule, State, Trainer, masks_of
from deepseek_compress.errors import DscError, Problems, raise_problems
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.numerics.magnitude import Magnitude
from deepseek_compress.numerics.types import Statistics
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.distill import Distill
from deepseek_compress.streaming.loop import silent
from deepseek_compress.tasks import mixture


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    problems = mixture(3, 40, "calibration")
    lines = [json.dumps({"prompt": problem.prompt, "completion": problem.solution}) for problem in problems]
    file.write_text("\n".join(lines))
    return file


def context(out: Path, model: Path, text: Path) -> Context:
    return Context("student", out, "", 5, {"sources": [str(text)]}, outputs={"model": model}, tell=lambda line: None)


def stage(**knobs: object) -> Distill:
    return build(Distill, {"learning_rate": 1e-3, **knobs}, "distill")


def documents_of(model: Path, text: Path, count: int) -> list[Document]:
    return read_documents([Source(path=str(text))], load_tokenizer(model), 512, count)


def test_prompts_weigh_less_and_padding_nothing(tiny_v3: Path, text: Path) -> None:
    documents = documents_of(tiny_v3, text, 6)
    batch = batch_of(documents, range(6), 0.25)
    expected = [[0.25] * (d.prompt - 1) + [1.0] * (len(d.ids) - d.prompt) for d in documents]
    assert all(document.prompt > 1 for document in documents)
    assert batch.weights.tolist() == [weight for row in expected for weight in row]
    assert batch.labels.tolist() == [token for document in documents for token in document.ids[1:]]
    teacher = LiveTeacher(Model.load(tiny_v3), 512, 1.0)
    together = teacher.said(batch).target(slice(None)).log_probs
    alone = [teacher.said(batch_of(documents, [i], 1.0)).target(slice(None)).log_probs for i in range(6)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_too_little_text_is_said(tiny_v3: Path, text: Path) -> None:
    with pytest.raises(DscError, match=r"40 documents of training text, 41 asked for; .*documents: 40"):
        documents_of(tiny_v3, text, 41)
    sources, tokenizer = [Source(path=str(text))], load_tokenizer(tiny_v3)
    assert len(read_documents(sources, tokenizer, 512, None, 10**9)) == 40
    some = read_documents(sources, tokenizer, 512, None, 200)
    assert sum(len(document.ids) for document in some[:-1]) < 200 <= sum(len(document.ids) for document in some)


def test_batches_hold_every_document_once_within_their_size() -> None:
    lengths = [7, 90, 3, 20, 20, 64, 5, 200]
    groups = batches_by_length(lengths, 100)
    assert sorted(index for group in groups for index in group) == list(range(8))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 100 for group in groups)


def test_most_used_experts_of_each_group_stay(tiny_v3: Path) -> None:
    model = Model.load(tiny_v3)
    # layers 0 (dense) and 2 stay; of each pair of experts the more used one
    use = {1: torch.tensor([5, 9, 1, 0, 3, 3, 2, 8]), 2: torch.arange(8)}
    plan = shrink(model.family, model.cfg, Sizes(4, 2), use)
    assert plan.config == {"num_hidden_layers": 2, "n_routed_experts": 4}
    assert plan.experts == {2: [1, 3, 5, 7]}
    assert plan.tensors["model.layers.1.mlp.experts.2.up_proj.weight"].name.endswith("2.mlp.experts.5.up_proj.weight")
    rows = plan.tensors["model.layers.1.mlp.gate.weight"].rows
    assert rows is not None
    assert rows.tolist() == [1, 3, 5, 7]
    assert plan.tensors["model.layers.0.mlp.up_proj.weight"].name == "model.layers.0.mlp.up_proj.weight"


def test_a_cut_student_has_the_teachers_experts_and_runs(tiny_v2: Path, text: Path, tmp_path: Path) -> None:
    cut = stage(experts=4, layers=2, steps=0, documents=20)
    output = cut.run(open_checkpoint(tiny_v2), context(tmp_path / "student", tiny_v2, text))
    student, teacher = Model.load(output.path), Model.load(tiny_v2)
    config = json.loads((output.path / "config.json").read_text())
    assert (config["n_routed_experts"], config["num_hidden_layers"], config["topk_method"]) == (4, 2, "greedy")
    ((layer, kept),) = output.facts["experts_kept"].items()
    assert output.facts["layers_kept"] == [0, int(layer)]
    for new, old in enumerate(kept):
        name = "model.layers.{}.mlp.experts.{}.down_proj.weight"
        assert torch.equal(student.weights[name.format(1, new)], teacher.weights[name.format(layer, old)])
    router = "model.layers.{}.mlp.gate.weight"
    assert torch.equal(student.weights[router.format(1)], teacher.weights[router.format(layer)][kept])
    assert bool(student(torch.arange(3, 20)[None]).isfinite().all())


def silence(teacher: Model, plan: Shrink) -> None:
    """Make zeros of the columns that the student doesn't have, so that what is gone adds nothing."""
    for key, origin in plan.tensors.items():
        if origin.columns is not None:
            gone = torch.ones(teacher.weights[key].shape[1], dtype=torch.bool)
            gone[origin.columns] = False
            teacher.weights[key][:, gone] = 0


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_v3"])
def test_a_narrower_student_is_its_teacher_without_the_channels_that_add_least(
    name: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(name)
    teacher = Model.load(source)
    downs = [readers(teacher.family, teacher.cfg, layer) for layer in range(teacher.cfg.num_hidden_layers)]
    first = f"{teacher.family.prefix(0)}.{next(iter(downs[0]))}.weight"
    weak = teacher.weights[first]
    weak[:, ::2] *= 1e-3  # of one MLP every other channel adds next to nothing
    documents = documents_of(source, text, 8)
    config = open_checkpoint(source).config
    student = cut(teacher, config, Size(width=0.5), documents, shared=True)
    channels = parts(teacher, _shown(teacher, documents, ""))
    plan = shrink(teacher.family, teacher.cfg, Sizes(width=0.5), {}, None, channels)
    kept = plan.tensors[first].columns
    assert kept is not None
    assert all(place % 2 for place in kept.tolist())
    silence(teacher, plan)
    tokens = torch.tensor([documents[0].ids])
    assert torch.allclose(student.model(tokens), teacher(tokens), atol=1e-4)
    sizes = {key: value for key, value in student.config.items() if key.endswith("intermediate_size")}
    assert student.facts["width_kept"] == sizes
    assert all(value == narrow(config[key], 0.5) < config[key] for key, value in sizes.items())


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_v2", "tiny_v3"])
def test_a_student_with_fewer_heads_is_its_teacher_without_those_that_add_least(
    name: str, text: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(name)
    teacher = Model.load(source)
    cfg, output = teacher.cfg, f"{teacher.family.prefix(0)}.{teacher.family.names.o}.weight"
    heads, group = cfg.num_attention_heads, head_group(cfg)
    each = teacher.weights[output].shape[1] // heads
    teacher.weights[output][:, : group * each] *= 1e-3  # the first heads of block 0 add next to nothing
    documents = documents_of(source, text, 8)
    student = cut(teacher, open_checkpoint(source).config, Size(heads=heads - group), documents, shared=True)
    found = parts(teacher, _shown(teacher, documents, ""))
    plan = shrink(teacher.family, cfg, Sizes(heads=heads - group), {}, None, found)
    first = plan.tensors[output].columns
    assert first is not None
    assert first.tolist() == list(range(group * each, heads * each))
    silence(teacher, plan)
    tokens = torch.tensor([documents[0].ids])
    assert torch.allclose(student.model(tokens), teacher(tokens), atol=1e-4)
    assert student.facts["heads_kept"] == student.model.cfg.num_attention_heads == heads - group
    assert student.model.cfg.num_key_value_heads == cfg.num_key_value_heads - 1
    wrong = shrink_problems(teacher.family, cfg, Sizes(heads=heads + group))
    assert f"distill.heads: {heads + group} of {heads}" in str(wrong[0])


def test_a_narrower_student_is_written_trained_and_planned(tiny_v2: Path, text: Path, tmp_path: Path) -> None:
    narrow = stage(width=0.5, experts=4, heads=2, steps=2, documents=20)
    source = open_checkpoint(tiny_v2)
    planned = narrow.forecast(source.header, 0, 0).header
    output = narrow.run(source, context(tmp_path / "student", tiny_v2, text))
    written = open_checkpoint(output.path)
    assert planned is not None
    assert {name: info.shape for name, info in planned.tensors.items()} == {
        name: info.shape for name, info in written.header.tensors.items()
    }
    assert bool(Model.load(written)(torch.arange(3, 20)[None]).isfinite().all())


def test_fewer_experts_run_for_a_token(tiny_v3: Path, text: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_v3)
    top_k = source.config["num_experts_per_tok"]
    output = stage(active=top_k - 1, steps=0, documents=4).run(source, context(tmp_path / "out", tiny_v3, text))
    student, teacher = Model.load(output.path), Model.load(tiny_v3)
    assert output.facts["active"] == top_k - 1
    assert teacher.cfg.moe is not None
    fewer = replace(teacher.cfg, moe=replace(teacher.cfg.moe, top_k=top_k - 1))
    tokens = torch.arange(3, 30)[None]
    expected = Model(teacher.family, fewer, {name: w.bfloat16().float() for name, w in teacher.weights.items()})
    assert torch.allclose(student(tokens), expected(tokens), atol=1e-4)
    with pytest.raises(Problems, match=rf"distill.active: {top_k + 1}, but {top_k} experts run for a token"):
        raise_problems(stage(active=top_k + 1).problems(source.header))


def test_widths_are_multiples_that_groups_divide() -> None:
    assert [narrow(size, 0.7) for size in (1536, 8960, 192, 96, 7)] == [1024, 6272, 128, 64, 5]


def test_training_brings_a_sparse_student_nearer_and_keeps_its_zeros(tiny_v3_bf16: Path, text: Path) -> None:
    teacher, student = Model.load(tiny_v3_bf16), Model.load(tiny_v3_bf16)
    names = [name for name in student.weights if name.endswith("proj.weight")]
    for name in names:
        student.weights[name].copy_(Magnitude()(student.weights[name], Statistics()))
    masks = masks_of(student.weights, names)
    assert set(masks) == set(names)
    documents = documents_of(tiny_v3_bf16, text, 24)
    objective = Objective((ForwardKl(),), 1.0, 512)
    schedule = Schedule(12, 800, learning_rate=2e-3, held_back=4)
    trainer = Trainer(student, LiveTeacher(teacher, 512, 1.0), documents, objective, schedule, masks)
    state = trainer.run(silent)
    assert sum(state.losses[-3:]) < 0.8 * sum(state.losses[:3])
    first, best = state.validations[0], min(state.validations, key=lambda found: found.loss)
    assert best.kl < 0.9 * first.kl
    assert trainer.measure(student)[1:] == pytest.approx(best[1:])  # the best weights are the result
    for name in names:
        weight = student.weights[name]
        assert bool(((weight.view(len(weight), -1, 4) == 0).sum(-1) >= 2).all())
    assert masks_of(teacher.weights, names) == {}


def test_interrupted_training_ends_with_the_same_bits(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    monkeypatch.setattr(resuming, "LARGEST_SHARE", 1e9)
    whole_stage = stage(steps=5, documents=12, batch_tokens=300, loss={"forward_kl": 0.8, "hidden_states": 0.1})
    source = open_checkpoint(tiny_llama)
    whole = whole_stage.run(source, context(tmp_path / "whole", tiny_llama, text)).path
    save = resuming.Keeper.save

    def stop(self: resuming.Keeper, state: State) -> None:
        save(self, state)
        if state.step == 3:
            raise KeyboardInterrupt

    halves = context(tmp_path / "halves", tiny_llama, text)
    with monkeypatch.context() as patched:
        patched.setattr(resuming.Keeper, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            whole_stage.run(source, halves)
    assert not (halves.out / "config.json").exists()
    for other, what in (
        (whole_stage.model_copy(update={"learning_rate": 1e-2}), "knobs"),
        (whole_stage.model_copy(update={"documents": 11}), "knobs, text"),
    ):
        with pytest.raises(DscError, match=f"unfinished run with other {what}"):
            other.run(source, halves)
    with pytest.raises(DscError, match="unfinished run with other seed"):
        whole_stage.run(source, replace(halves, seed=6))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: 99)
        with pytest.raises(DscError, match="unfinished run with other threads"):
            whole_stage.run(source, halves)
    finished = whole_stage.run(source, halves).path
    assert not list(finished.glob(".dsc*"))
    for file in sorted(whole.iterdir()):
        assert (finished / file.name).read_bytes() == file.read_bytes(), file.name


def test_sizes_that_do_not_fit_are_told(tiny_v3: Path, tiny_llama: Path) -> None:
    header = open_checkpoint(tiny_v3).header
    assert [str(problem) for problem in stage(experts=6, layers=9).problems(header)] == [
        "distill.experts: 6 of 8 experts in 4 groups; give a multiple of 4 from 8 to 8",
        "distill.layers: 9 of 3; give 2 to 3",
    ]
    (problem,) = stage(experts=2).problems(open_checkpoint(tiny_llama).header)
    assert "has no experts" in str(problem)
    with pytest.raises(DscError, match="unknown output 'nobody'"):
        stage(teacher="nobody").run(open_checkpoint(tiny_llama), context(Path("x"), tiny_llama, Path("y")))
    assert issubclass(Problems, DscError)
    for wrong in ({"steps": 3, "minutes": 2}, {"steps": 3, "tokens": 9}):
        with pytest.raises(DscError, match="one of them says how long"):
            stage(**wrong)
