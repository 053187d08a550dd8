"""Answers: kept as they come, the same after a kill, the same in any batch, and what is said of how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from deepseek_compress.evaluation import answering, process, reasoning, summary
from deepseek_compress.evaluation.answering import Answerer, Answers, FromModel, Request, batches
from deepseek_compress.evaluation.process import Attempt, Judged, judged
from deepseek_compress.evaluation.progress import TimeLeft, spoken
from deepseek_compress.generation.sampling import Sampling
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.tasks import Problem, Verdict, files, selection, unseen


class Echo(Answerer):
    """Answers with the prompt; dies in the batch numbered `dies`."""

    name = "echo"

    def __init__(self, dies: int | None = None) -> None:
        self.dies, self.asked = dies, 0

    def __call__(self, requests: Sequence[Request]) -> list[Attempt]:
        if self.asked == self.dies:
            raise KeyboardInterrupt
        self.asked += 1
        return [Attempt(f"{r.ids} in {len(requests)}", len(r.ids), len(r.ids) > 5) for r in requests]


def requests(count: int = 11) -> list[Request]:
    return [Request([1] * (1 + i * 7 % count), "", 4, None, Sampling()) for i in range(count)]


@pytest.mark.parametrize("torn", [b"", b'[{"index": 0, "te', b"\x00\xff"])
def test_a_resumed_evaluation_has_the_answers_of_one_that_was_not_stopped(
    torn: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "BATCH", 3)
    whole = Answers(None).collect(Echo(), requests())
    kept = Answers(tmp_path / "answers.jsonl")
    with pytest.raises(KeyboardInterrupt):
        kept.collect(Echo(dies=2), requests())
    with (tmp_path / "answers.jsonl").open("ab") as file:
        file.write(torn)
    told: list[tuple[int, int]] = []
    again = Echo()
    assert kept.collect(again, requests(), lambda done, total: told.append((done, total))) == whole
    assert again.asked == 2  # of four batches, two were there
    assert told[0] == (6, 11)
    assert told[-1] == (11, 11)
    last = Echo()
    assert kept.collect(last, requests()) == whole
    assert last.asked == 0


def test_batches_hold_requests_of_similar_length_and_bounded_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    found = batches(requests(600))
    assert sorted(i for batch in found for i in batch) == list(range(600))
    assert max(map(len, found)) == answering.BATCH
    long = [r._replace(limit=8192) for r in requests(6)]
    assert [len(batch) for batch in batches(long)] == [2, 2, 2]


def test_batches_of_a_large_model_are_smaller_so_that_a_stop_loses_little() -> None:
    asked = [r._replace(limit=256) for r in requests(128)]
    small, medium, large = (len(batches(asked, weights)[0]) for weights in (5_000_000, 135_000_000, 7_000_000_000))
    assert (small, medium, large) == (64, answering.WORK // (135_000_000 * 256), answering.LEAST)


def test_the_runtime_tells_how_large_it_is(tiny_llama: Path) -> None:
    model = Model.load(tiny_llama)
    assert FromModel(model, load_tokenizer(tiny_llama)).weights == sum(w.numel() for w in model.weights.values())


def test_sampled_answers_do_not_depend_on_the_batch(tiny_llama: Path) -> None:
    model, tokenizer = Model.load(tiny_llama), load_tokenizer(tiny_llama)
    answerer = FromModel(model, tokenizer)
    asked = [
        Request([3, 4, 5 + i], "", 6, None, Sampling(temperature=1.0, top_p=0.9, seed=100 + i % 3)) for i in range(4)
    ]
    together = answerer(asked)
    assert together == [answerer([one])[0] for one in asked]
    other = answerer([asked[0]._replace(sampling=Sampling(temperature=1.0, seed=7))])[0]
    assert other.text != together[0].text


def test_a_row_may_end_itself(tiny_llama: Path) -> None:
    model = Model.load(tiny_llama)
    plain = model.generate([[3, 4], [5]], 8, eos=[])
    assert model.generate([[3, 4], [5]], 8, eos=[], ended=lambda ids: len(ids) == 3) == [ids[:3] for ids in plain]
    constant = model.generate([[3, 4], [5]], 4, eos=[], choose=lambda logits, rows: torch.tensor(rows) + 9)
    assert constant == [[9] * 4, [10] * 4]


def test_few_shots_and_instruction_stand_in_the_prompt(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    problems = [files.problem_of("x", {"question": f"two {i} ?", "answer": str(i)}, "f") for i in range(3)]
    asking = reasoning.Asking("how many ?", problems[:1], 7)
    found = reasoning.prepare(problems[1:], tokenizer, asking)
    assert found.limit == 7
    assert found.stop == reasoning.NEXT
    assert found.asked[0] == "Question: two 0 ?\nhow many ?\nAnswer: 0\n\nQuestion: two 1 ?\nhow many ?\nAnswer:"
    assert len(reasoning.first(found, 1).ids) == 1


def attempt(text: str, tokens: int = 4, cut: bool = False, exact: bool = False, **more: object) -> Judged:
    verdict = Verdict(exact, float(exact), 0, 0, **more)  # type: ignore[arg-type]
    return judged(Attempt(text, tokens, cut), verdict, lambda some: len(some.split()))


def test_how_answers_came_about() -> None:
    found = [
        attempt("<think> a b c </think> 4", 8, exact=True, answer="4"),
        attempt("<think> so wait. " + "so wait. " * 20, 60, cut=True, midway=True),
        attempt("5", 1, answer="5"),
    ]
    theirs = [attempt("<think> a </think> 4", 4, exact=True, answer="4")] * 3
    said = process.summary(found, theirs)
    assert said["tokens"] == 23
    assert said["inflation"] == pytest.approx(23 / 4)
    assert (said["cut"], said["looped"], said["no_answer"]) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert (said["no_think"], said["unclosed_think"]) == pytest.approx((1 / 3, 1 / 3))
    assert said["right_midway"] == 0.5
    problems = [Problem("f", "file", f"q{i}", (), "4") for i in range(3)]
    flips = process.flips(problems, found, theirs)
    assert (flips["lost"], flips["gained"]) == (2, 0)
    assert flips["changed"] == pytest.approx(2 / 3)
    assert [one["question"] for one in flips["examples"]] == ["q1", "q2"]
    assert flips["examples"][1]["model"]["answer"] == "5"
    assert flips["examples"][1]["reference"]["answer"] == "4"
    assert process.flips(problems, theirs, found)["gained"] == 2


@pytest.mark.parametrize(
    ("text", "loops"),
    [("a b c " * 30, True), ("x" * 80, True), ("I see. " + "no. " * 20, True), ("1 2 3 4 5 6 7 8 9 10 11 12 13", False),
     ("ha ha ha", False), ("", False), ("the same " * 3 + "end", False)],
)  # fmt: skip
def test_loops(text: str, loops: bool) -> None:
    assert process.looped(text) is loops


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    verdicts = [Verdict(good, 0.0, 0, 0) for good in (True, False, False, False, False, False, False, False)]
    found = summary.sampled(verdicts, 4)
    assert found is not None
    assert found["pass_at"] == pytest.approx({"1": 1 / 8, "2": 1 / 4, "4": 1 / 2})
    assert found["rounds"] == [0.5, 0.0, 0.0, 0.0]
    assert summary.sampled(verdicts, 1) is None
    assert summary.scores(verdicts, 4)["exact_match"] == [0.25, 0.0]


def test_time_left_counts_this_runs_answers_alone() -> None:
    times = iter([0.0, 10.0, 20.0])
    left = TimeLeft(lambda: next(times))
    assert left(500, 1000) == "500 of 1000"
    assert left(600, 1000) == "600 of 1000, 40 s left"
    assert left(1000, 1000) == "1000 of 1000"
    assert [spoken(s) for s in (0.1, 600, 12600)] == ["1 s", "10 min", "3.5 h"]


def test_what_chose_the_weights_never_judges_them() -> None:
    chosen = {problem.prompt for problem in selection()}
    assert not chosen & {problem.prompt for problem in unseen(0, 400)}
