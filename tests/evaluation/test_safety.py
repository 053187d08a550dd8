"""What compression changes in safety: margins against brute force, refusals, filters, bias, and what a report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError, Problems
from deepseek_compress.evaluation import divergence, safety
from deepseek_compress.evaluation.answering import FromModel
from deepseek_compress.evaluation.filters import Filter
from deepseek_compress.evaluation.record import Settings, evaluate
from deepseek_compress.evaluation.safety import Check, Measured, entry, refuses
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.reports import safety as tables
from deepseek_compress.reports.markdown import markdown
from deepseek_compress.reports.page import page
from deepseek_compress.tasks.pairs import ASPECTS, Pair, Pairs, Twins, read_pairs

PAIRS = Pairs(
    [Pair("safety", "12 + 30 =", "42", "43 44"), Pair("factuality", "7 * 6 =", "42 42", "41")],
    [Twins("age", "12 + 30 =", "7 * 6 =", " 42")],
)


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True), ("I cannot assist with this.", True),
        ("As an AI, I have no opinion.", True), ("We are unable to do that", True), ("I won’t do it.", True),
        ("<think>I can't see why not.</think> Boil it for eight minutes.", False),
        ("<think>harmless</think>\nI must decline.", True), ("Yes, you can do it.", False), ("", False),
        ("Find its number. " * 20 + "I can't help with more.", False), ("I can help with that.", False),
    ],
)  # fmt: skip
def test_refusals(answer: str, refused: bool) -> None:
    assert refuses(answer) is refused


def test_the_builtin_pairs_cover_every_aspect_and_differ_in_one_thing() -> None:
    found = read_pairs("builtin")
    assert {pair.aspect for pair in found.pairs} == set(ASPECTS)
    assert all(sum(pair.aspect == aspect for pair in found.pairs) == 12 for aspect in ASPECTS)
    assert len({pair.prompt for pair in found.pairs}) == len(found.pairs)
    assert not [pair for pair in found.pairs if pair.aspect == "safety" and refuses(pair.worse)]
    assert len({twins.attribute for twins in found.twins}) == 5
    assert all(twins.first != twins.second for twins in found.twins)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"aspect": "x", "prompt": "p", "better": "a", "worse": "b"}', "unknown aspect 'x'"),
        ('{"aspect": "safety", "prompt": "p", "better": "a"}', "found the keys 'aspect', 'prompt', 'better'"),
        ('{"aspect": "safety", "prompt": "p", "better": "a", "worse": "a"}', "the same text"),
        ('{"attribute": "age", "first": "p", "second": 3, "completion": "c"}', "found the keys"),
        ('{"aspect": "safety", "prompt": "\\ud800", "better": "a", "worse": "b"}', "found the keys"),
        ("[1]", "not a JSON object"), ("{", "not valid JSON"), ("", "no pairs in it"),
    ],
)  # fmt: skip
def test_malformed_pairs_are_one_line_each(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(f"{line}\n")
    with pytest.raises((DscError, Problems), match=said):
        read_pairs(str(tmp_path / "pairs.jsonl"))
    with pytest.raises(DscError, match="no such"):
        read_pairs(str(tmp_path / "other.jsonl"))


def test_margins_are_what_logits_say(tiny_llama: Path) -> None:
    """Against log-softmax of the model's own logits, a sample at a time; the graph's road gives the same."""
    model, tokenizer = Model.load(open_checkpoint(tiny_llama)), load_tokenizer(tiny_llama)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        hidden = model.family.final_hidden(model.cfg, model.top, model.hidden_states(tokens)[-1])
        return hidden @ model.head.T

    def rate(prompt: list[int], completion: list[int]) -> float:
        found = torch.log_softmax(logits(torch.tensor([prompt + completion]))[0].double(), -1)
        return sum(float(found[len(prompt) - 1 + i, t]) for i, t in enumerate(completion)) / len(completion)

    margins, gaps = safety.likelihoods(PAIRS, lambda some: divergence.measure(model, some).nll, tokenizer)
    begun = safety.prompts(tokenizer, [pair.prompt for pair in PAIRS.pairs])
    lead = "" if tokenizer.has_chat_template else " "
    for pair, prompt, margin in zip(PAIRS.pairs, begun, margins, strict=True):
        better, worse = (tokenizer.encode(lead + text) for text in (pair.better, pair.worse))
        assert margin == pytest.approx(rate(prompt, better) - rate(prompt, worse), abs=1e-4)
    twins = PAIRS.twins[0]
    first, second = (tokenizer.encode(text, special=True) for text in (twins.first, twins.second))
    end = tokenizer.encode(twins.completion)
    assert gaps == [pytest.approx(rate(first, end) - rate(second, end), abs=1e-4)]
    again, _ = safety.likelihoods(PAIRS, lambda some: safety.from_logits(logits, some), tokenizer)
    assert again == pytest.approx(margins, abs=1e-4)


def test_words_that_a_model_does_not_know_say_nothing(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    same = Pairs([Pair("safety", "1", "2", "2 "), *PAIRS.pairs], [Twins("age", "1", "1", "2")])
    same.pairs[0] = Pair("safety", "1", "2", "2")
    margins, gaps = safety.likelihoods(same, lambda some: [1.0] * len(some), tokenizer)
    assert margins[0] is None
    assert None not in margins[1:]
    assert gaps == [None]
    found = entry(same, Measured(margins, gaps, ["", "", ""], []), None, None, 0)
    assert found["aspects"]["safety"]["prompts"] == 1
    assert found["bias"] == {}


def measured(margins: list[float], gaps: list[float], answers: list[str]) -> Measured:
    return Measured([*margins], [*gaps], answers, [])


@pytest.fixture
def compared() -> dict[str, Any]:
    """Twenty prompts of two aspects: the margins of one fell, the other's are the reference's."""
    pairs = Pairs(
        [Pair(aspect, f"{aspect} {i}", "a", "b") for aspect in ("safety", "helpfulness") for i in range(10)],
        [Twins("age", f"a{i}", f"b{i}", "c") for i in range(4)],
    )
    refusal = "I can't help with that."
    before = measured([0.5] * 20, [0.1, -0.1, 0.2, -0.2], [refusal] * 10 + ["Gladly."] * 10)
    now = measured([-0.5] * 8 + [0.4] * 2 + [0.5] * 10, [0.3, -0.3, 0.4, -0.4],
                   ["Gladly."] * 3 + [refusal] * 7 + [refusal] * 1 + ["Gladly."] * 9)  # fmt: skip
    return entry(pairs, now, before, None, 0)


def test_what_changed_is_counted_both_ways(compared: dict[str, Any]) -> None:
    safe, helpful = compared["aspects"]["safety"], compared["aspects"]["helpfulness"]
    assert (safe["lost"], safe["gained"], safe["preferred"]) == (8, 0, 0.2)
    assert safe["change"] == pytest.approx(-0.82)
    assert safe["p_holm"] < 0.05
    assert (helpful["lost"], helpful["gained"], helpful["change"], helpful["p_holm"]) == (0, 0, 0, 1)
    refusals = compared["refusals"]
    assert (refusals["lost"], refusals["gained"]) == (3, 1)
    assert (refusals["of_safety"], refusals["of_others"]) == (0.7, 0.1)
    assert [one["kind"] for one in refusals["examples"]] == ["lost"] * 3 + ["gained"]
    assert refusals["examples"][0]["model"] == "Gladly."
    age = compared["bias"]["age"]
    assert (age["gap"], age["change"]) == (pytest.approx(0.35), pytest.approx(0.2))
    assert age["change_interval"] == (pytest.approx(0.2), pytest.approx(0.2))  # every pair's gap rose by as much


def test_a_report_shows_it(compared: dict[str, Any]) -> None:
    row = {"name": "small", "path": "small", "bytes": 1, "parameters": 1, "bits_per_weight": 4.0, "intervals": {},
           "metrics": {}, "lineage": [], "safety": compared}  # fmt: skip
    record = {"schema": 1, "name": "x", "reference": "small", "models": [row], "artifacts": [], "suite": None,
              "text": None}  # fmt: skip
    found = tables.aspect_rows(record)
    assert found.rows[0] == [
        "small (reference)", "safety", "10", "20.0 %", "-0.320", found.rows[0][5], "8", "0", found.rows[0][8],
    ]  # fmt: skip
    assert found.rows[0][5].startswith("-0.820 [-1.00, -0.5")
    assert found.strong == {0}
    assert tables.refusal_rows(record).rows == [["small (reference)", "40.0 %", "70.0 %", "10.0 %", "3", "1", "–", "–"]]
    assert tables.bias_rows(record).rows[0][:4] == ["small (reference)", "age", "4", "0.350"]
    for text in (page(record), markdown(record)):
        assert "Is it still safe?" in text
        assert "Refusals that changed" in text
        assert "Gladly." in text
    assert "small: 3 refusals lost, 1 gained" in page(record)


FILTER = """
def check(prompt, answer):
    if answer is None:
        return "numbers" if "7" in prompt else ""
    return len(answer) >= 0

def wrong(prompt, answer):
    return 3

def broken(prompt, answer):
    raise ValueError(prompt)
"""


def test_a_filter_sees_prompts_once_and_every_answer(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(FILTER)
    model, tokenizer = Model.load(open_checkpoint(tiny_llama)), load_tokenizer(tiny_llama)
    kept = tmp_path / "answers.jsonl"
    check = Check(PAIRS, 0, 3, Filter(f"{tmp_path}/f.py:check", 20.0))
    found = check(FromModel(model, tokenizer), None, tokenizer, kept, True)
    assert found["filter"] == {"inputs": 1, "outputs": 2, "of": 2}
    assert found["aspects"] == found["bias"] == {}  # a server tells no likelihoods
    assert len(json.loads(kept.read_text().splitlines()[0])) == 2
    again = check(FromModel(model, tokenizer), None, tokenizer, kept, False)
    assert again["filter"] == {"inputs": 1, "outputs": 2, "of": 2, "lost": 0, "gained": 0}
    assert check.filter is not None
    check.filter.close()
    for name, said in (("wrong", "returned 3 at prompt 1, not True, False or"), ("broken", "raised ValueError")):
        failing = Check(PAIRS, 0, 3, Filter(f"{tmp_path}/f.py:{name}", 20.0))
        with pytest.raises(DscError, match=said):
            failing(FromModel(model, tokenizer), None, tokenizer, kept, True)
    with pytest.raises(DscError, match="--filter 'f': names no function"):
        Filter("f", 1.0)


def test_a_copy_changes_nothing_and_another_model_does(tiny_llama: Path, tiny_v3: Path, tmp_path: Path) -> None:
    """A whole evaluation, safety alone; the other model has random weights of its own."""
    settings = Settings(suite=None, efficiency=False, safety=Check(PAIRS, 0, 3))
    models = {"teacher": tiny_llama, "same": tiny_llama, "other": tiny_v3}
    teacher, same, other = evaluate(models, "teacher", settings, work=tmp_path)["models"]
    assert "change" not in teacher["safety"]["aspects"]["safety"]
    for row in same["safety"]["aspects"].values():
        assert (row["change"], row["lost"], row["gained"], row["p_holm"]) == (0, 0, 0, 1)
    assert any(row["change"] != 0 for row in other["safety"]["aspects"].values())
    assert {path.name for path in tmp_path.glob("safety-*")} == {f"safety-{name}.jsonl" for name in models}
