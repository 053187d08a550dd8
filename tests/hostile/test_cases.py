"""Single cases that broke once, each with the line that it must end in, or the bytes that it must give."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness import dsc, faults
from test_pages import record
from windows import contents, run, words_of

from deepseek_compress import machine, pipeline
from deepseek_compress.distillation.resume import FILE, Keeper
from deepseek_compress.distillation.trainer import State
from deepseek_compress.errors import DscError
from deepseek_compress.processes import run_python
from deepseek_compress.recipe import Changes, read_recipe
from deepseek_compress.resources import recipe_path

PLAN = ("plan", "GIVEN/model", "-r", "w4a16-fast", "--group-size", "32")
RECIPE = ("plan", "GIVEN/model", "-r", "r.yaml")
RTN = "stages: [{compress: {weights: {rtn: {group_size: 32}}}}]"
LINES = {  # words, the recipe beside, a pattern of the line
    "a name that is empty": ((*PLAN, "--set", "name="), "", "name"),
    "a model that is empty": ((*PLAN, "--set", "model="), "", "model"),
    "an output outside": (RECIPE, f"as: ../../x\n{RTN}", r"\.\./\.\./x"),
    "a stage outside": (RECIPE, "stages: [{name: ../x, compress: {weights: {rtn: {}}}}]", r"\.\./x"),
    "an expression that takes forever": (
        (*PLAN, "--set", "overrides=[{modules: 're:(a+)+$', keep: true}]"), "", "may take forever",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_one_line(case: str, given: Path, tmp_path: Path) -> None:
    words, recipe, expected = LINES[case]
    (tmp_path / "r.yaml").write_text(recipe)
    found = dsc(tmp_path, *(word.replace("GIVEN", str(given)) for word in words))
    assert found.code == 1, found.out
    assert faults(found, expected) == []


@pytest.mark.parametrize("template", ["", "{% for m in messages %}{% endfor %}  "])
def test_a_template_that_renders_nothing_is_no_text_to_calibrate_on(template: str, given: Path, tmp_path: Path) -> None:
    shutil.copytree(given / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    turn = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": turn}) for _ in range(40)))
    text = ("--calibration", "chat.jsonl", "--samples", "2", "--length", "16")
    found = dsc(tmp_path, "quantize", "model", "-o", "out", "-r", "w4a16", "--group-size", "32", *text)
    assert found.code == 1, found.out
    assert faults(found, "chat template") == []


@pytest.mark.parametrize(("count", "expected"), [(2000, "at most 1000 items"), (300, "200 at most are compared")])
def test_a_report_of_many_models_is_one_line_at_once(count: int, expected: str, given: Path, tmp_path: Path) -> None:
    value = record()
    value["models"] = [{**copy.deepcopy(value["models"][0]), "name": f"m{i}"} for i in range(count)]
    value["reference"] = "m0"
    (tmp_path / "report.json").write_text(json.dumps(value))
    found = dsc(tmp_path, "compare", "report.json", "-o", "out.html")
    assert found.code == 1, found.out
    assert faults(found, expected) == []
    assert found.seconds < 5


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "pickle"])
def test_a_damaged_state_of_a_training_is_none(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_compress.distillation.resume.EVERY", 0.0)
    state = State.__new__(State)
    vars(state).update(weights={"a": torch.ones(9)}, projections={}, best={}, validations=[])
    Keeper(tmp_path).save(state)
    whole = (tmp_path / FILE).read_bytes()
    middle = len(whole) // 2
    damaged = {
        "flipped": whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :], "cut": whole[:middle],
        "empty": b"", "pickle": whole[:-32],
    }  # fmt: skip
    (tmp_path / FILE).write_bytes(damaged[how])
    assert Keeper(tmp_path).load() is None


def test_the_work_directory_counts_as_disk(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"model": str(given / "model"), "calibration.samples": 2, "calibration.length": 16}
    recipe = read_recipe(recipe_path("w4a16"), Changes(["weights.gptaq.group_size=32"], changes, None))
    (forecast,) = pipeline.plan(recipe).forecasts.values()
    assert forecast.bytes and forecast.scratch
    monkeypatch.setattr(machine, "free_disk", lambda path: forecast.bytes + forecast.scratch - 1)
    with pytest.raises(DscError, match="are needed"):
        pipeline.run(recipe, tmp_path / "out", flat=True)


INTERRUPTED = """
import sys

class Finder:
    def find_spec(self, name, *more):
        if name == "pydantic":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
import deepseek_compress.cli
"""


def test_interrupted_while_it_imports() -> None:
    found = run_python("-P", "-c", INTERRUPTED)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "")


@pytest.mark.verify
def test_interrupted_with_workers(given: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of the group, at any moment: no traceback, and the same command goes on."""
    assert run("text", given, tmp_path / "whole").code == 0
    rng = random.Random(18)
    command = [sys.executable, "-P", "-m", "deepseek_compress", *words_of("text", given), "--workers", "2"]
    here = tmp_path / "here"
    here.mkdir()
    for _ in range(5):
        process = subprocess.Popen(
            command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        lock = here / "out" / ".dsc_run" / "lock"
        while not (lock.exists() and str(process.pid) in lock.read_text()) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=300)
        assert "Traceback" not in said and "Unpickling" not in said, said
        assert process.returncode in (0, 130, -signal.SIGINT), said  # the last: Python itself was ending
    assert run("text", given, here).code == 0
    assert contents(here) == contents(tmp_path / "whole")
