"""Recipes: what is read, and the line of everything that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_compress import resources
from deepseek_compress.errors import DscError, Problems
from deepseek_compress.recipe import Changes, Recipe, parse_recipe, read_recipe
from deepseek_compress.recipe.document import dump, parse

GOOD = """\
name: two
as: teacher
seed: 7
calibration: {samples: 3}
stages:
  - name: small
    from: teacher
    compress: {weights: {gptq: {group_size: 32}}, sparsity: {sparsegpt: {pattern: 2:4}}}
  - compress: {weights: rtn}
  - evaluate: {models: [teacher, small], reference: teacher, problems: 5}
"""


def problems(text: str, **changes: object) -> list[str]:
    with pytest.raises(DscError) as caught:
        parse_recipe(text, "r.yaml", Changes(**changes))
    error = caught.value
    return [str(p) for p in (error.problems if isinstance(error, Problems) else [error])]


def test_a_recipe_names_its_steps_and_sources() -> None:
    recipe = parse_recipe(GOOD, "r.yaml")
    assert [(s.name, s.kind, s.source, s.line) for s in recipe.steps] == [
        ("small", "compress", "model", 8),
        ("compress", "compress", "small", 9),
        ("evaluate", "evaluate", "compress", 10),
    ]
    assert (recipe.name, recipe.alias, recipe.seed, recipe.calibration.samples) == ("two", "teacher", 7, 3)
    assert recipe.calibration.length == 512
    assert recipe.text == GOOD


def test_a_pattern_is_text_not_a_number_of_base_60() -> None:
    assert parse("a: 2:4", "r").value == {"a": "2:4"}
    assert parse("[1, 1e3, 2.5, true, null, 2020-01-01]", "r").value == [1, "1e3", 2.5, True, None, "2020-01-01"]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("stages: []\n", 1, "at least 1 item"),
        ("stages:\n  - compress: {weights: {gptq: {grup_size: 3}}}\n", 2, "did you mean 'group_size'"),
        ("stages:\n  - compress:\n      weights:\n        gptqq: {}\n", 4, "did you mean 'gptq'"),
        (
            "stages:\n  - compress:\n      weights:\n        gptq:\n          num_bits: 99\n",
            5,
            "less than or equal to 8",
        ),
        ("stages:\n  - compres: {}\n", 2, "did you mean 'compress'"),
        ("stages:\n  - {compress: {}, evaluate: {}}\n", 2, "compress and evaluate"),
        ("stages:\n  - name: x\n", 2, "names none"),
        ("seeed: 1\nstages:\n  - compress: {weights: rtn}\n", 1, "did you mean 'seed'"),
        ("stages:\n  - compress: {weights: rtn}\n    from: other\n", 2, "unknown checkpoint 'other'"),
        ("stages:\n  - compress: {weights: rtn}\n    name: ../x\n", 2, "cannot be a directory"),
        ("stages:\n  - evaluate: {models: [nobody]}\n", 2, "unknown model 'nobody'"),
        ("a: 1\nb: 2\na: 3\n", 3, "stands twice, first on line 1"),
        ("a: &x [1]\nb: *x\n", 2, "aliases"),
        ("a: !!python/object/apply:os.system ['true']\n", 1, "tag"),
        ("a: !!python/name:os.system\n", 1, "could not determine a constructor"),
        ("stages: [\n", 2, "expected"),
    ],
)
def test_each_mistake_carries_its_line(text: str, line: int, words: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert found[0].startswith(f"r.yaml:{line}: ")
    assert words in found[0]
    assert "; " in found[0] or "got" in found[0]


def test_all_mistakes_are_reported_together() -> None:
    found = problems(
        "stages:\n"
        "  - {name: model, compress: {weights: {gptq: {num_bits: 99, foo: 1}}}}\n"
        "  - {name: b, frob: {}}\n"
        "  - {name: b, from: later, compress: {bar: 1}}\n"
        "  - compress: {weights: {gptq: {foo: 1}}, sparsity: magnitud, mtp: some, bar: 1}\n"
    )
    lines = [message.split(": ")[0] for message in found]
    assert lines == ["r.yaml:2"] * 3 + ["r.yaml:3"] + ["r.yaml:4"] * 3 + ["r.yaml:5"] * 4


@pytest.mark.parametrize("text", ["", "3", "[1]", "[" * 5000, "\x00", "a: b: c", "a: " + "9" * 5000, "a: !!bool x"])
def test_what_is_no_recipe_is_one_clear_line(text: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert found[0].startswith("r.yaml")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b" " * (1 << 21))
    with pytest.raises(DscError, match="more than 1048576 bytes"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("setting", "find"),
    [
        ("seed=9", lambda r: r.seed == 9),
        ("calibration.samples=5", lambda r: r.calibration.samples == 5),
        ("small.weights.gptq.group_size=64", lambda r: r.steps[0].stage.weights.group_size == 64),
        ("stages.small.compress.weights.gptq.group_size=64", lambda r: r.steps[0].stage.weights.group_size == 64),
        ("0.weights={rtn: {num_bits: 3}}", lambda r: r.steps[0].stage.weights.num_bits == 3),
        ("evaluate.problems=2", lambda r: r.steps[2].knobs["problems"] == 2),
        ("small.name=other", lambda r: r.steps[0].name == "other"),
    ],
)
def test_set_changes_a_knob(setting: str, find: object) -> None:
    text = GOOD.replace("[teacher, small]", "[teacher]")
    changed = parse_recipe(text, "r.yaml", Changes([setting]))
    assert find(changed)
    assert parse_recipe(changed.text, "again").document == changed.document


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed", "is not path=value"),
        ("compress.weights=rtn", "names several stages"),
        ("nothing.here=1", "names no knob"),
        ("small.weights.gptq.foo=1", "unknown knob 'foo'"),
        ("small.weights.gptq.group_size.x=1", "not a mapping"),
        ("stages.9.weights=rtn", "names no knob"),
        ("seed=[", "expected"),
    ],
)
def test_a_wrong_set_is_one_clear_line(setting: str, words: str) -> None:
    (found,) = problems(GOOD, settings=[setting])
    assert words in found


def test_with_one_stage_the_knobs_stand_alone() -> None:
    recipe = parse_recipe("stages: [{compress: {weights: rtn}}]", "r", Changes(["min_tokens=3"], {}, 32))
    assert recipe.steps[0].stage.min_tokens == 3
    assert recipe.steps[0].stage.weights.group_size == 32
    (found,) = problems("stages: [{evaluate: {}}]", group_size=32)
    assert "quantises no weights" in found


def test_every_recipe_of_the_package_is_valid_and_says_what_it_is() -> None:
    names = resources.recipes()
    stable = {"quickstart", "w4a16", "w4a16-best", "w4a16-fast", "w4a8", "w8a8", "sparse24", "sparse24-w4a16"}
    assert stable <= set(names)
    for path in names.values():
        assert isinstance(read_recipe(path), Recipe)
        assert path.read_text().startswith("# ")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text("abc :-#'\"[]{}é\n", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcd", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(_VALUES)
def test_what_is_written_is_read_back(value: object) -> None:
    assert parse(dump({"x": value}), "r").value == {"x": value}
