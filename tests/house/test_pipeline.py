"""Pipelines over the tiny models: finished stages stay, interrupted ones go on, other work is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from deepseek_compress import machine, pipeline, workspace
from deepseek_compress.console import StageProgress
from deepseek_compress.errors import DscError, Problems
from deepseek_compress.pipeline import run, run_report
from deepseek_compress.recipe import Changes, Recipe, parse_recipe
from deepseek_compress.stages.compress import Compress

RECIPE = """\
name: small
as: teacher
calibration: {samples: 2, length: 16}
stages:
  - name: w4
    compress: {weights: {gptq: {group_size: 32}}}
  - name: sparse
    from: teacher
    compress: {sparsity: magnitude}
  - evaluate: {models: [teacher, w4], reference: teacher, problems: 2, efficiency: false}
"""


def recipe(model: Path, text: Path, **values: object) -> Recipe:
    changes = {"model": str(model), "calibration.sources": [str(text)]}
    return parse_recipe(RECIPE, "small.yaml", Changes((), {**changes, **values}))


class Log(StageProgress):
    """What became of each stage."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}

    def finish(self, name: str, text: str) -> None:
        self.lines[name] = "skipped" if "already" in text else "ran"


def files(out: Path) -> Mapping[str, bytes]:
    """Everything that must be the same from run to run."""
    paths = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {str(p.relative_to(out)): p.read_bytes() for p in paths if p.name not in {"dsc_run.json", "lock"}}


def messages(caught: pytest.ExceptionInfo[DscError]) -> list[str]:
    error = caught.value
    return [str(p) for p in (error.problems if isinstance(error, Problems) else [error])]


def test_a_run_writes_a_directory_a_stage_and_the_report_on_top(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", Log()
    paths = run(recipe(tiny_llama, text), out, progress=log)
    assert log.lines == {"w4": "ran", "sparse": "ran", "evaluate": "ran"}
    assert paths["w4"] == out / "w4"
    assert paths["model"] == paths["teacher"] == tiny_llama
    record = json.loads((out / "report.json").read_text())
    assert [model["name"] for model in record["models"]] == ["teacher", "w4"]
    assert (out / "report.html").is_file()
    assert (out / "report.md").is_file()
    for directory in (out, out / "w4", out / "sparse", out / "evaluate"):
        assert json.loads((directory / "dsc_manifest.json").read_text())["recipe"] == recipe(tiny_llama, text).text
        costs = json.loads((directory / "dsc_run.json").read_text())
        assert costs["seconds"] > 0
        assert costs["peak_bytes"] > 10_000_000
    before = files(out)
    run(recipe(tiny_llama, text), out, progress=log)
    assert log.lines == {"w4": "skipped", "sparse": "skipped", "evaluate": "skipped"}
    assert files(out) == before


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe(tiny_llama, text)
    whole = Recipe(**{**vars(whole), "steps": whole.steps[:2]})
    run(whole, tmp_path / "whole")
    real = Compress.run

    def interrupted(self: Compress, source: object, context: object) -> object:
        if self.sparsity is not None:
            raise KeyboardInterrupt
        return real(self, source, context)

    monkeypatch.setattr(Compress, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(whole, tmp_path / "parts")
    monkeypatch.undo()
    log = Log()
    run(whole, tmp_path / "parts", progress=log)
    assert log.lines == {"w4": "skipped", "sparse": "ran"}
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_stage_whose_file_is_gone_runs_again(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    whole = recipe(tiny_llama, text)
    whole = Recipe(**{**vars(whole), "steps": whole.steps[1:2]})
    run(whole, tmp_path / "out")
    before = files(tmp_path / "out")
    next((tmp_path / "out" / "sparse").glob("*.safetensors")).unlink()
    log = Log()
    run(whole, tmp_path / "out", progress=log)
    assert log.lines == {"sparse": "ran"}
    assert files(tmp_path / "out") == before


def test_other_recipe_model_data_or_version_is_refused_with_what_differs(
    tiny_llama: Path, tiny_qwen2: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    flat = Recipe(**{**vars(recipe(tiny_llama, text)), "steps": recipe(tiny_llama, text).steps[1:2]})
    run(flat, out, flat=True)
    before = files(out)
    other = Recipe(**{**vars(flat), "document": {**flat.document, "seed": 5}})
    with pytest.raises(DscError) as caught:
        run(other, out, flat=True)
    assert messages(caught) == [f"{out}: made without recipe.seed, now 5; choose another -o, or remove that directory"]
    with pytest.raises(DscError, match=r"inputs\.model"):
        run(Recipe(**{**vars(flat), "model": str(tiny_qwen2)}), out, flat=True)
    longer = tmp_path / "text.jsonl"
    longer.write_text(text.read_text() + '\n{"text": "more"}')
    with pytest.raises(DscError, match="calibration_data"):
        run(Recipe(**{**vars(flat), "calibration": recipe(tiny_llama, longer).calibration}), out, flat=True)
    monkeypatch.setattr(pipeline.provenance, "versions", lambda: {"torch": "99"})
    with pytest.raises(DscError, match=r'versions\.torch "[^"]+", now "99"'):
        run(flat, out, flat=True)
    assert files(out) == before


def test_a_knob_that_changes_no_bytes_may_change_in_one_directory(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek_compress.export import verify

    out, checked = tmp_path / "out", []
    real = verify.verify
    monkeypatch.setattr(verify, "verify", lambda *args, **knobs: checked.append(1) or real(*args, **knobs))

    def export(**knobs: object) -> None:
        changes = {"model": str(tiny_llama), "calibration.sources": [str(text)], **knobs}
        run(parse_recipe("stages: [export: {target: onnx}]", "e.yaml", Changes((), changes)), out, flat=True)

    export(**{"export.verify": False})
    before = files(out)
    assert not checked
    export(**{"export.verify": True})
    assert checked, "it runs again, to be checked"
    assert files(out)["model.onnx"] == before["model.onnx"]
    with pytest.raises(DscError, match=r"without recipe\.\S*export\.logits, now \"last\""):
        export(**{"export.logits": "last"})


def test_after_a_failed_check_another_knob_needs_no_other_directory(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek_compress.export import verify

    def export(**knobs: object) -> None:
        changes = {"model": str(tiny_llama), **knobs}
        run(
            parse_recipe("stages: [export: {target: onnx}]", "e.yaml", Changes((), changes)),
            tmp_path / "out",
            flat=True,
        )

    with monkeypatch.context() as wrong:
        wrong.setitem(verify.EXACT, "float32", -1.0)
        with pytest.raises(DscError, match="differs from the runtime, most in"):
            export()
    assert not list((tmp_path / "out").rglob("model.onnx*"))
    export(**{"export.logits": "last"})
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_foreign_files_are_never_overwritten(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DscError, match="was not written by dsc"):
        run(recipe(tiny_llama, text), out)
    with pytest.raises(DscError, match="is a file"):
        run(recipe(tiny_llama, text), out / "notes.txt")
    with pytest.raises(DscError, match="cannot be written"):
        run(recipe(tiny_llama, text), out / "notes.txt" / "below")
    page = tmp_path / "report.html"
    page.write_text("mine")
    with pytest.raises(DscError, match="was not written by this command"):
        run_report(recipe(tiny_llama, text), tmp_path / "report.json")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert page.read_text() == "mine"


def test_a_second_run_on_one_output_is_refused(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / workspace.HOUSE).mkdir()
    (out / workspace.HOUSE / "state.json").write_text("{}")
    with workspace.lock(out), pytest.raises(DscError, match=r"another run works there \(process \d+\)"):
        run(recipe(tiny_llama, text), out)


def test_a_full_disk_is_told_before_the_first_byte(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_disk", lambda path: 1000)
    with pytest.raises(DscError, match=r"MB are needed, 1\.0 kB are free"):
        run(recipe(tiny_llama, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_plan_tells_every_problem_and_writes_nothing(tiny_v3: Path, tmp_path: Path) -> None:
    bad = recipe(tiny_v3, tmp_path / "none.jsonl", **{"w4.weights.gptq.group_size": 100})
    found = pipeline.plan(bad)
    told = "\n".join(str(problem) for problem in found.problems)
    assert "w4 (as changed by options)" not in told
    assert "w4 (recipe line 6): model.layers.0.self_attn.q_a_proj.weight" in told
    assert "none.jsonl: no such file" in told
    assert [problem for problem in found.problems if "sparse" in problem.what] == []
    with pytest.raises(Problems):
        run(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_is_told(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    found = pipeline.plan(recipe(broken, text)).problems
    assert found
    assert "truncated" in found[0].what


def test_the_plan_foresees_sizes(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    wanted = recipe(tiny_llama, text)
    found = pipeline.plan(wanted)
    run(Recipe(**{**vars(wanted), "steps": wanted.steps[:2]}), tmp_path / "out")
    for name in ("w4", "sparse"):
        size = sum(file.stat().st_size for file in (tmp_path / "out" / name).glob("*.safetensors"))
        assert found.forecasts[name].bytes == pytest.approx(size, rel=0.05)


def test_peak_memory_counts_this_process() -> None:
    with machine.peak_memory(every=0.01) as peak:
        held = bytearray(80_000_000)
        held[::4096] = b"x" * len(held[::4096])
        before = peak[0] or 0
    assert (peak[0] or 0) >= before
    assert (peak[0] or 0) > 80_000_000


def test_differences_name_each_leaf() -> None:
    there, here = {"a": [1, {"b": 2}], "c": 3}, {"a": [1, {"b": 4}, 5], "d": None}
    assert workspace.differences(there, here) == ["with a.1.b 2, now 4", "without a.2, now 5", "with c 3, now without"]
