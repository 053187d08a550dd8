"""Traces: what a verifier says of them, wrong ones asked again, a run that goes on, and a student that reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_compress.calibration.sources import Sample
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.distillation.curriculum import in_phases, teacher_loss
from deepseek_compress.distillation.documents import Document, batches
from deepseek_compress.distillation.on_policy import Drawn
from deepseek_compress.distillation.traces import Settings, Teacher, write_traces
from deepseek_compress.distillation.verifiers import Answer, Asked, Builtin, Verdict, builtin_problems, problems_of
from deepseek_compress.errors import DscError
from deepseek_compress.models.resolve import resolve_model
from deepseek_compress.models.runtime import Choose, Model, greedy
from deepseek_compress.models.tokenizer import Tokenizer, load_tokenizer
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.distill import Distill
from deepseek_compress.stages.traces import Traces
from deepseek_compress.streaming.loop import silent


def asked(question: str, answer: str) -> Asked:
    return Asked("a.jsonl:1", ({"role": "user", "content": question},), answer)


def test_the_answer_of_a_file_is_compared_and_its_equations_are_the_steps() -> None:
    judge = Answer().judge
    problem = asked("how many ?", "48/2 = <<48/2=24>>24\n#### 72")
    assert judge(problem, "48 / 2 = 24\n24 + 48 = 72\n#### 72.0") == (True, 2, 2)
    assert judge(problem, "48 / 2 = 25 so \\boxed{72}") == (True, 0, 1)
    assert judge(problem, "<think> 1 + 1 = 2 </think> it is 73") == (False, 1, 1)
    assert judge(asked("?", "yes"), "<think> 3 </think> Yes.") == (True, 0, 0)
    assert Verdict(True, 1, 2).score == pytest.approx(0.85)
    assert Verdict(True, 0, 0).score == pytest.approx(0.7)
    assert Verdict(False, 2, 2).score == pytest.approx(0.3)
    assert Answer().sound(problem, "48 / 2 = 24\n24 + 48 = 73\n#### 73") == "48 / 2 = 24\n"


def test_a_wrong_chain_is_kept_as_far_as_its_steps_hold() -> None:
    (problem,) = (p for p in builtin_problems(0, 40)[:1] if p.problem)
    assert problem.problem is not None
    right = problem.problem.solution
    assert Builtin().judge(problem, right).right
    steps = problem.problem.steps
    wrong = right.replace(steps[-1], "1 + 1 = 3")
    kept = Builtin().sound(problem, wrong)
    assert kept == (f"<think> {' ; '.join(steps[:-1])} ;" if len(steps) > 1 else "")
    assert Builtin().sound(problem, right.replace(steps[0], "1 + 1 = 3")) == ""


def test_lines_without_a_question_or_an_answer_are_told() -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "4"}
    (found,) = problems_of([Sample("a:1", messages=(user, assistant))], None, True)
    assert (found.question, found.answer) == ("q", "4")
    with pytest.raises(DscError, match=r"a:2: no answer to compare with"):
        list(problems_of([Sample("a:2", messages=(user,))], None, True))
    with pytest.raises(DscError, match=r"a:3: asks nothing"):
        list(problems_of([Sample("a:3", "text")], None, False))
    assert len(list(problems_of([Sample("a:2", messages=(user,))] * 3, 2, False))) == 2


class Fake:
    """A model that writes what it is told: the completions of each attempt, by prompt."""

    def __init__(self, tokenizer: Tokenizer, said: list[dict[str, str]]) -> None:
        self.tokenizer, self.said = tokenizer, said
        self.calls: list[tuple[list[str], bool]] = []

    def generate(self, prompts: list[list[int]], limit: int, eos: Any, size: int, choose: Choose) -> list[list[int]]:
        texts = [self.tokenizer.decode(ids, skip_special=False).removeprefix("<bos>").strip() for ids in prompts]
        self.calls.append((texts, choose is greedy))
        said = self.said[len(self.calls) - 1]
        return [self.tokenizer.encode(said.get(text, "no")) for text in texts]


def test_wrong_ones_are_asked_again_from_where_they_held_or_dropped(tiny_v3: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_v3)
    problems = [p for p in builtin_problems(1, 300) if p.problem and len(p.problem.steps) > 2][:3]
    first, second, third = (p.problem for p in problems if p.problem)
    half = f"<think> {' ; '.join(second.steps[:-1])} ;"
    begun = f"{second.prompt} {half}"
    said = [
        {first.prompt: first.solution, second.prompt: f"{half} 1 + 1 = 3 </think> {second.answer}"},
        {begun: f"{second.steps[-1]} </think> {second.answer}"},
        {},
    ]
    fake = Fake(tokenizer, said)
    settings = Settings(3, 0.7, 200, 0, least=0.99)  # a right answer by a wrong step is asked again too
    teacher = Teacher(fake, tokenizer, Builtin(), settings)  # type: ignore[arg-type]
    lines = write_traces(teacher, problems, tmp_path, silent)
    assert [line["prompt"] for line in lines] == [first.prompt, second.prompt]
    assert [line["attempt"] for line in lines] == [0, 1]
    assert lines[1]["completion"].split() == second.solution.split()
    assert [line["score"] for line in lines] == [1.0, 1.0]
    assert fake.calls[0][1] is True
    assert fake.calls[1] == ([begun, third.prompt], False)
    assert fake.calls[2] == ([third.prompt], False)
    assert write_traces(teacher, problems, tmp_path, silent) == lines, "a finished batch is not asked again"
    assert len(fake.calls) == 3


def test_an_answer_that_does_not_end_is_wrong(tiny_v3: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_v3)
    (problem,) = builtin_problems(1, 1)
    assert problem.problem is not None
    fake = Fake(tokenizer, [{problem.problem.prompt: problem.problem.solution}])
    length = len(tokenizer.encode(problem.problem.solution))
    cut = Teacher(fake, tokenizer, Builtin(), Settings(1, 1.0, length, 0))  # type: ignore[arg-type]
    assert cut.solve([problem], 0) == [None]


def test_draws_follow_the_seed_and_the_distribution() -> None:
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1]])).expand(4000, 3)
    found = Drawn(1.0, 3)(logits)
    assert torch.equal(found, Drawn(1.0, 3)(logits))
    assert not torch.equal(found, Drawn(1.0, 4)(logits))
    assert torch.bincount(found) / 4000 == pytest.approx(torch.tensor([0.7, 0.2, 0.1]), abs=0.03)
    cold = torch.bincount(Drawn(0.5, 3)(logits), minlength=3) / 4000
    assert cold == pytest.approx(torch.tensor([0.49, 0.04, 0.01]) / 0.54, abs=0.03)


def context(out: Path, told: list[str], **more: Any) -> Context:
    return Context(out.name, out, "", 5, {"sources": ["builtin"]}, tell=told.append, **more)


def test_stage_and_a_student_on_its_traces(tmp_path: Path) -> None:
    """The built-in model solves most problems: some at the first attempt; a student learns from the file alone."""
    builtin_model = resolve_model("builtin:nano")
    told: list[str] = []
    stage = build(Traces, {"count": 6, "attempts": 2, "limit": 120}, "traces")
    output = stage.run(open_checkpoint(builtin_model), context(tmp_path / "traces", told))
    lines = [json.loads(line) for line in (output.path / "traces.jsonl").read_text().splitlines()]
    assert output.facts["kept"] == len(lines) >= 3
    problems = {p.question: p for p in builtin_problems(5, 6)}
    for line in lines:
        assert Builtin().judge(problems[line["prompt"]], line["completion"]).score == pytest.approx(line["score"])
    assert any("problems have a trace" in line for line in told)
    knobs = {"text": "traces", "loss": "cross_entropy", "steps": 1, "batch_tokens": 256, "curriculum": {"phases": 2}}
    given = context(tmp_path / "student", told, outputs={"model": builtin_model, "traces": output.path})
    done = build(Distill, knobs, "distill").run(open_checkpoint(builtin_model), given)
    assert done.facts["trained_steps"] == 1
    with pytest.raises(DscError, match="'model' is not an output of traces"):
        build(Distill, {**knobs, "text": "model"}, "distill").run(
            open_checkpoint(builtin_model), replace(given, out=tmp_path / "other")
        )


def test_a_recipe_names_no_code(tiny_v3: Path, tmp_path: Path) -> None:
    python = build(Traces, {"verifier": "python", "count": 1}, "traces")
    with pytest.raises(DscError, match="a recipe cannot name one"):
        python.run(open_checkpoint(tiny_v3), context(tmp_path / "a", []))
    answer = build(Traces, {"verifier": "answer", "count": 1}, "traces")
    with pytest.raises(DscError, match=r"--verifier x\.py:f: traces\.verifier is answer"):
        answer.run(open_checkpoint(tiny_v3), context(tmp_path / "b", [], verifier="x.py:f"))


def test_no_trace_at_all_is_told(tiny_v3: Path, tmp_path: Path) -> None:
    stage = build(Traces, {"count": 3, "attempts": 1, "limit": 4}, "traces")
    with pytest.raises(DscError, match="0 of 3 problems have a trace"):
        stage.run(open_checkpoint(tiny_v3), context(tmp_path / "out", []))


def test_phases_begin_with_the_easiest_and_resume_alike() -> None:
    lengths, hard = [5, 9, 4, 7, 6, 8], [3.0, 1.0, 2.0, 6.0, 5.0, 4.0]
    steps = list(in_phases(hard, lengths, 3, 9, 18, seed=4))
    assert len(steps) == 9
    assert {n for step in steps[:3] for n in step} == {1, 2}
    assert {n for step in steps[3:6] for n in step} <= {0, 1, 2, 5}
    assert {n for step in steps for n in step} == set(range(6))
    assert steps == list(in_phases(hard, lengths, 3, 9, 18, seed=4))
    plain = batches(lengths, 18, 4)
    assert list(in_phases([0.0] * 6, lengths, 1, 5, 18, seed=4)) == [next(plain) for _ in range(5)]


def test_the_teachers_loss_of_a_text(tiny_v3_bf16: Path) -> None:
    model = Model.load(tiny_v3_bf16)
    documents = [Document(torch.randint(2, 512, (n,), generator=torch.Generator().manual_seed(n)).tolist(), p)
                 for n, p in ((9, 0), (14, 5), (9, 3))]  # fmt: skip
    for document, found in zip(documents, teacher_loss(model, documents), strict=True):
        logits = model.forward(torch.tensor([document.ids]))[0, :-1].log_softmax(-1)
        nll = -logits.gather(-1, torch.tensor(document.ids[1:])[:, None])[:, 0]
        assert found == pytest.approx(float(nll[max(0, document.prompt - 1) :].mean()), rel=1e-4)
