"""The functions of `import deepseek_compress as dsc`: lazy, the commands' own bytes, the commands' own errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import deepseek_compress as dsc
from tests.house.conftest import Dsc
from tests.house.short import TEXT

HEAVY = {"torch", "transformers", "numpy", "onnx", "safetensors", "pydantic", "typer", "rich", "yaml"}


@pytest.fixture
def dsc_command(dsc: Dsc) -> Dsc:
    """The command line; `dsc` is the package here."""
    return dsc


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_it_imports_nothing_else() -> None:
    assert python(f"import sys, deepseek_compress\nprint(sorted({HEAVY!r} & set(sys.modules)))") == "[]"


def test_each_name_is_there_and_the_package_export_does_not_hide_the_function() -> None:
    code = (
        "import deepseek_compress.export.hazards\nimport deepseek_compress as dsc\n"
        "from deepseek_compress.export import TARGETS\nassert TARGETS\n"
        "print(*(getattr(dsc, name).__name__ for name in dsc.__all__))"
    )
    assert python(code).split() == list(dsc.__all__)
    assert set(dsc.__all__) <= set(dir(dsc))
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = dsc.quantise  # type: ignore[attr-defined]


def test_a_function_writes_what_its_command_writes(dsc_command: Dsc, tiny_llama: Path, text: Path) -> None:
    words = [*TEXT, "--calibration", text, "--set", "weights.gptaq.num_bits=3", "--seed", 5]
    done = dsc_command("quantize", tiny_llama, "-o", "typed", *words)
    assert done.exit_code == 0, done.output
    out = dsc.quantize(
        tiny_llama, "called", calibration=text, samples=2, length=16, knobs={"weights.gptaq.num_bits": 3}, seed=5
    )
    assert out == Path("called")
    names = {file.name for file in out.iterdir()} - {"dsc_run.json"}
    assert len([name for name in names if name.endswith(".safetensors")]) >= 1
    for name in names:
        if (out / name).is_file():
            assert (out / name).read_bytes() == Path("typed", name).read_bytes(), name


def test_a_script_need_not_guard_what_it_does(tiny_llama: Path, tmp_path: Path) -> None:
    """What multiprocessing starts would otherwise run the script again, and fail."""
    script = tmp_path / "script.py"
    script.write_text(
        "import deepseek_compress as dsc\n"
        f"out = dsc.quantize({str(tiny_llama)!r}, {str(tmp_path / 'out')!r}, recipe='w4a16-fast', workers=2)\n"
        f"found = dsc.evaluate(out, {str(tmp_path / 'r.json')!r}, problems=1)\n"
        "print(found['models'][0]['metrics']['peak_bytes'])\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 0


@pytest.mark.slow
def test_from_teacher_to_report(dsc_command: Dsc, tiny_v3: Path, text: Path) -> None:
    small = {"distill.documents": 8, "experts": 8}
    student = dsc.distill(tiny_v3, "student", steps=1, length=64, calibration=text, knobs=small)
    sparse = dsc.prune(student, "sparse", calibration={str(text): 1.0}, samples=2, length=16)
    exported = dsc.export(sparse, "bf16", target="bf16")
    model = dsc.load(exported)
    said = model.generate("3 + 4 =", max_tokens=4, seed=1)
    assert said == model.generate("3 + 4 =", max_tokens=4, seed=1)
    assert model.last is not None
    assert 0 < model.last.tokens <= 4
    knobs = {"evaluate.efficiency": False}
    record = dsc.evaluate(exported, "r.json", reference=student, problems=2, knobs=knobs)
    assert record == json.loads(Path("r.json").read_text())
    assert [row["name"] for row in record["models"]] == ["student", "bf16"]
    both = dsc.compare(["r.json"], "page.html")
    assert [row["name"] for row in both["models"]] == ["student", "bf16"]
    assert Path("page.html").is_file()


def test_a_recipe_is_planned_and_run(dsc_command: Dsc, tiny_llama: Path, text: Path) -> None:
    recipe = dsc.read_recipe("w4a16-fast", model=tiny_llama, group_size=32)
    found = dsc.plan(recipe)
    assert found.problems == []
    paths = dsc.run(recipe, "out")
    size = sum(file.stat().st_size for file in paths["compress"].glob("*.safetensors"))
    assert found.bytes == pytest.approx(size, rel=0.03)  # without the shards' headers


def test_errors_are_the_commands_own(dsc_command: Dsc, tiny_llama: Path) -> None:
    with pytest.raises(dsc.DscError) as caught:
        dsc.quantize(tiny_llama, "q", group_size=100)
    done = dsc_command("quantize", tiny_llama, "-o", "q", "--group-size", 100)
    assert [f"error: {line}" for line in str(caught.value).splitlines()] == done.stderr.splitlines()
    assert len(done.stderr.splitlines()) > 1
    for call, what in (
        (lambda: dsc.read_recipe("w4a61"), "did you mean 'w4a16'"),
        (lambda: dsc.load("nowhere"), "nowhere: no such file or directory"),
        (lambda: dsc.quantize("nowhere", "q"), "nowhere: no such directory"),
        (lambda: dsc.compare([]), "no reports to compare"),
        (lambda: dsc.plan(dsc.read_recipe("w4a16", model=tiny_llama), memory="much"), "invalid size 'much'"),
    ):
        with pytest.raises(dsc.DscError, match=what):
            call()
    Path("page.html").write_text("mine")
    with pytest.raises(dsc.DscError, match=r"page.html: exists and was not written by dsc"):
        dsc.compare(["r.json"], "page.html")
    assert Path("page.html").read_text() == "mine"
