"""Every `dsc` line of the README runs, in its order, on a tiny model with shortened knobs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from deepseek_compress.recipe import parse_recipe
from tests.house.conftest import Dsc
from tests.house.short import shorten

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
LINES = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("dsc ")
]


def test_there_is_an_example_for_each_command() -> None:
    commands = {line.split()[1] for line in LINES}
    expected = (
        "plan run distill prune calibrate quantize allocate export evaluate generate chat compare inspect doctor list"
    )
    assert commands == set(expected.split())


def test_the_recipe_of_the_readme_is_valid() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    recipes = [[step.name for step in parse_recipe(block, "README").steps] for block in blocks]
    assert recipes == [["record", "distill"], ["teacher-w4a16", "evaluate"], ["compress"], ["compress"]]


@pytest.mark.slow
def test_the_examples_run(dsc: Dsc, tiny_v3: Path, text: Path) -> None:
    Path("text.jsonl").write_text(text.read_text())
    for line in LINES:
        words = [str(tiny_v3) if word == "builtin:nano" else word for word in shlex.split(line)[1:]]
        done = dsc(*words, *shorten(words, tiny_v3, text))
        assert done.exit_code == 0, f"{line}\n{done.output}"
        if words[0] not in ("generate", "chat"):  # whose standard output is the answer
            assert done.stdout.splitlines()[-1].startswith("next: dsc "), line
    record = json.loads(Path("runs/quickstart/report.json").read_text())
    names = ["teacher", "teacher-w4a16", "student", "student-sparse24", "student-sparse24-w4a8"]
    assert [model["name"] for model in record["models"]] == names
    assert {row["target"] for row in record["artifacts"]} >= {"onnx", "tensorrt-rtx"}
    assert Path("runs/both.html").is_file()
