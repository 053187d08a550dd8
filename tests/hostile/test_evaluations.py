"""Bad input to `dsc evaluate` and `dsc compare`: one clear line each, before a model is loaded where it can be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import dsc, faults, warm
from safetensors.torch import load_file, save_file
from test_pages import record

from deepseek_compress.errors import DscError
from deepseek_compress.evaluation.deployed import open_file
from deepseek_compress.evaluation.reasoning import load_suite
from deepseek_compress.evaluation.subjects import subjects
from deepseek_compress.recipe import Changes, read_recipe
from deepseek_compress.reports import compare, gate
from deepseek_compress.resources import recipe_path

GOOD = json.dumps({"question": "1 + 1 ?", "answer": "2"})


def wrote(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def recipe(**values: object) -> object:
    changes = {"model": "builtin:nano", **{f"evaluate.{key}": value for key, value in values.items()}}
    return read_recipe(recipe_path("evaluate"), Changes((), changes, None))


def report(folder: Path, **more: object) -> Path:
    return wrote(folder, "r.json", json.dumps({**record(), **more}))


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file that is not there": (lambda d: load_suite(str(d / "none.jsonl"), 1), "no such file"),
    "an unknown suite": (lambda d: load_suite("gsm", 1), "valid names: builtin, or a .jsonl"),
    "an empty file": (lambda d: load_suite(str(wrote(d, "a.jsonl", "")), 1), "no questions in it"),
    "wrong keys": (lambda d: load_suite(str(wrote(d, "a.jsonl", '{"q": 1}')), 1), "found the keys 'q'"),
    "fewer than asked": (lambda d: load_suite(str(wrote(d, "a.jsonl", GOOD)), 9), "1 questions, 9 are asked for"),
    "no problems": (lambda d: load_suite("builtin", 0), "ask for at least 1"),
    "a directory": (lambda d: load_suite(str(d), 1), "unknown suite"),
    "greedy samples": (lambda d: recipe(samples=4), "greedy answers would all be the same"),
    "no samples": (lambda d: recipe(samples=0), "greater than 0"),
    "cold sampling": (lambda d: recipe(sampling={"temperature": -1}), "greater than or equal to 0"),
    "unknown scorer": (lambda d: recipe(scorer="mine"), "'numbers', 'strict' or 'flexible'"),
    "endless answers": (lambda d: recipe(max_new_tokens=0), "greater than 0"),
    "until nothing": (lambda d: recipe(until=0), "greater than 0"),
    "an unknown knob": (lambda d: recipe(shot=1), "did you mean 'shots'"),
    "a deployed file alone": (
        lambda d: subjects([str(wrote(d, "model.onnx", "x"))], None),
        "give the checkpoint it was made of",
    ),
    "a deployed reference": (lambda d: subjects(["a"], str(wrote(d, "model.onnx", "x"))), "not a checkpoint"),
    "nothing that answers": (lambda d: open_file(str(d)), "nothing here that answers"),
    "no such target": (lambda d: open_file(str(d / "none")), "no such file or directory"),
    "a server that is down": (lambda d: open_file("http://127.0.0.1:9"), "start the server"),
    "a GGUF file": (lambda d: open_file(str(wrote(d, "a.gguf", "GGUF"))), "export it again"),
    "a broken graph": (lambda d: open_file(str(wrote(d, "model.onnx", "x"))), "no tokenizer.json next to"),
    "a report with NaN": (lambda d: compare([report(d, name=float("nan"))], None), "r.json"),
    "a report of no models": (lambda d: compare([report(d, models=3)], None), "models"),
    "another schema": (lambda d: compare([report(d, schema=9)], None), "this version reads 1"),
    "no report": (lambda d: compare([d / "none.json"], None), "give a report.json that dsc wrote"),
    "no reports": (lambda d: compare([], None), "give at least one"),
    "a condition without a number": (lambda d: gate.parse("exact_match < little"), "not a condition"),
    "a condition on nothing": (lambda d: gate.parse("accuracy < 1"), "valid names: exact_match"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_line(case: str, tmp_path: Path) -> None:
    act, message = CASES[case]
    with pytest.raises(DscError) as caught:
        act(tmp_path)
    said = str(caught.value)
    assert message in said
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize("more", [(), ("--set", "evaluate.streamed=true")])
def test_logits_that_are_no_numbers_are_an_error(more: tuple[str, ...], tiny_qwen2: Path, tmp_path: Path) -> None:
    """Finite weights, whose products overflow: no figure comes of them."""
    warm()
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen2, model)
    state = load_file(model / "model.safetensors")
    state["model.norm.weight"].fill_(3e38)
    save_file(state, model / "model.safetensors")
    (tmp_path / "text.txt").write_text("What is two plus two? It is four. " * 40)
    text = ("--text", "text.txt", "--windows", "2", "--length", "16")
    for number, words in enumerate((("--problems", "2"), text) if not more else (text,)):
        found = dsc(tmp_path, "evaluate", "model", "-o", f"{number}.json", *words, "--set", "efficiency=false", *more)
        assert faults(found, "NaN|infinite") == [], words
        assert found.code == 1, found.out


def test_there_are_twenty_five() -> None:
    assert len(CASES) >= 25
