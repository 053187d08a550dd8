"""Malformed recipes and settings from a seeded list: lines that say what is wrong, or a plan."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from harness import dsc, faults, warm

EVERY = 12
BASE = "model: {model}\nstages:\n  - compress: {{weights: {{rtn: {{num_bits: 4, group_size: 32}}}}}}\n"
TEXTS = (
    "",
    "null",
    "[]",
    "3",
    "stages",
    "stages: 3",
    "stages: []",
    "stages: [3]",
    "stages: [{}]",
    "stages: [{a: 1, b: 2}]",
    "stages: [{compress: 3}]",
    "stages: [{compress: {weights: {nothing: {}}}}]",
    "\x00",
    "\x1b[31m: 1",
    "a: &a [*a]",
    "a: !!python/object/apply:os.system ['touch x']",
    "a: !!binary aGVsbG8=",
    "? [a, b]\n: c",
    "{" * 5000,
    "[" * 20000,
    "stages: [{compress: {weights: rtn}}]\nstages: []",
    "as: ../../x\nstages: [{compress: {weights: rtn}}]",
    "as: ''\nstages: [{compress: {weights: rtn}}]",
    "name: ../../x\nstages: [{compress: {weights: rtn}}]",
    "seed: -1\nstages: [{compress: {weights: rtn}}]",
    "seed: 1e400\nstages: [{compress: {weights: rtn}}]",
    "inputs: {../x: a}\nstages: [{compress: {weights: rtn}}]",
    "model: ''\nstages: [{compress: {weights: rtn}}]",
    "stages: [{name: ../x, compress: {weights: rtn}}]",
    "stages: [{name: .., compress: {weights: rtn}}]",
    "stages: [{from: nowhere, compress: {weights: rtn}}]",
    "a" * 1_000_000,
    "x: " + "9" * 5000,
    "x: !!int ''",
    "x: !!bool maybe",
    "x: !!float one",
    "\ufeff",
    "%YAML 9.9\n---\n",
    "calibration: {sources: []}\nstages: [{compress: {weights: gptq}}]",
    "calibration: {samples: 0}\nstages: [{compress: {weights: gptq}}]",
    "calibration: {sources: [{path: a, share: .nan}]}\nstages: [{compress: {weights: gptq}}]",
)
PATTERNS = (
    "re:(a+)+$",
    "re:(a|a)*b",
    "re:(a*)*",
    "re:((a+)b?)+c",
    "re:(.*)(.*)(.*)(.*)(.*)x",
    "re:(a?){50}a{50}",
    "re:(",
    "re:[",
    "re:(?P<x>a)(?P=x)*",
    "re:a{99999999}",
    "re:" + "(" * 500 + ")" * 500,
    "re:" + "a?" * 40 + "a" * 40,
    "*" * 5000,
)
SETTINGS = (
    "",
    "=",
    "name=",
    "model=",
    "name=../../x",
    "as=../x",
    "seed=x",
    "weights=",
    "weights.rtn=",
    "weights.rtn.num_bits=99",
    "weights.rtn.num_bits=1e9",
    "weights.rtn.group_size=-1",
    "weights.rtn.group_size=0",
    "weights.rtn.group_size=7",
    "weights.rtn.group_size=1000000000000000000000",
    "overrides=3",
    "overrides=[3]",
    "a.b.c=1",
    "stages=1",
    "stages.9.x=1",
    "calibration.samples=-1",
    "calibration.length=1",
    "keep=[nothing]",
    "mtp=maybe",
    "\x1b[2J=1",
    "weights.rtn.num_bits=\x1b]0;x\x07",
)


def recipes() -> list[tuple[str, tuple[str, ...]]]:
    """(text, --set values); at least 60, the same every time."""
    found: list[tuple[str, tuple[str, ...]]] = [(text, ()) for text in TEXTS]
    found += [(BASE, (f"overrides=[{{modules: '{pattern}', keep: true}}]",)) for pattern in PATTERNS]
    found += [(BASE, (setting,)) for setting in SETTINGS]
    random.Random(18).shuffle(found)
    return found


ALL = recipes()


def test_there_are_enough() -> None:
    assert len(ALL) >= 60


@pytest.mark.parametrize(
    "number", [pytest.param(i, marks=[] if i % EVERY == 0 else pytest.mark.verify) for i in range(len(ALL))]
)
def test_a_malformed_recipe(number: int, tmp_path: Path, tiny_qwen2: Path) -> None:
    warm()
    text, settings = ALL[number]
    (tmp_path / "r.yaml").write_text(text.format(model=tiny_qwen2) if text == BASE else text, errors="surrogatepass")
    given = [word for setting in settings for word in ("--set", setting)]
    found = dsc(tmp_path, "plan", str(tiny_qwen2), "-r", "r.yaml", *given)
    assert faults(found) == [], (text[:80], settings)
    assert not (tmp_path / "x").exists()
