"""The command line as a person meets it: help, errors, JSON, pipes, signals."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_compress import __version__
from deepseek_compress.checkpoint.verified import AGAIN
from deepseek_compress.errors import DscError
from tests.house.conftest import Dsc

WORK = ("plan", "run", "distill", "prune", "calibrate", "quantize", "export", "evaluate")
COMMANDS = [*WORK, "chat", "generate", "compare", "inspect", "doctor", "list"]
SMALL = ("--samples", "2", "--length", "16", "--group-size", "32")


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def test_a_reference_in_a_directory_named_model() -> None:
    from deepseek_compress.evaluation.subjects import subjects

    def names(*models: str, reference: str | None = None) -> tuple[str, list[str], str | None]:
        found = subjects(models, reference)
        return found.main, found.names, found.reference

    assert names("a/model", reference="b/model") == ("model", ["model-reference", "model"], "model-reference")
    assert names("a/out", reference="b/model") == ("out", ["model-reference", "out"], "model-reference")
    assert names("a/out", "c/out", reference="b/teacher") == ("out", ["teacher", "out", "out-2"], "teacher")
    assert names("a/out", "b/model", reference="a/out") == ("out", ["out", "model-2"], "out")


def test_deployed_files_need_a_checkpoint_beside_them(tmp_path: Path) -> None:
    from deepseek_compress.evaluation.subjects import subjects

    (tmp_path / "ort").mkdir()
    (tmp_path / "ort" / "model.onnx").write_bytes(b"x")
    file, server = str(tmp_path / "ort" / "model.onnx"), "http://host:8000/v1"
    found = subjects([file, server], "a/teacher")
    assert (found.main, found.model, found.names) == ("teacher", "a/teacher", ["teacher"])
    assert found.deployed == {"ort": file, "host-8000-v1": server}
    with pytest.raises(DscError, match="a deployed file alone; give the checkpoint"):
        subjects([file], None)
    with pytest.raises(DscError, match="not a checkpoint"):
        subjects(["a/out"], file)


def test_alone_it_shows_help_in_the_order_of_work(dsc: Dsc) -> None:
    shown = dsc()
    names = re.findall(r"^│ (\w+)  ", shown.output, re.MULTILINE)
    assert [name for name in names if name in COMMANDS] == COMMANDS
    assert "dsc run quickstart" in shown.output


def test_version(dsc: Dsc) -> None:
    assert dsc("--version").stdout == f"deepseek-compress {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_fits_80_columns(dsc: Dsc, command: str) -> None:
    shown = dsc(command, "--help")
    assert shown.exit_code == 0
    assert max(len(line) for line in shown.output.splitlines()) <= 80
    assert "…" not in shown.output


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom deepseek_compress.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'onnx', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["list", "doctor"])
def test_looking_answers_as_table_and_as_one_json_document(dsc: Dsc, command: str) -> None:
    shown = dsc(command)
    assert shown.exit_code == 0
    assert max(len(line) for line in shown.stdout.splitlines()) <= 80
    assert shown.stdout.splitlines()[-1].startswith("next: dsc ")
    assert json.loads(dsc(command, "--json").stdout)["next"].startswith("dsc ")


def test_inspect_tells_roles_and_verifies_hashes(dsc: Dsc, tiny_v3: Path, text: Path) -> None:
    found = json.loads(dsc("inspect", tiny_v3, "--json").stdout)
    assert {row["role"] for row in found["roles"]} >= {"attention", "expert", "router", "norm", "embedding", "head"}
    assert found["hashes"] == "no manifest lists them"
    assert dsc("quantize", tiny_v3, "-o", "q", "-r", "w4a16-fast", "--group-size", 32).exit_code == 0
    shown = dsc("inspect", "q")
    assert "hashes: as written" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "next: dsc evaluate q -o report.json"  # packed: nothing left to quantise
    shard = next(Path("q").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    shown = dsc("inspect", "q")
    assert shown.exit_code == 1
    assert errors(shown.stderr) == [f"error: {shard}: not the bytes that were written; {AGAIN}"]


def test_plan_as_json_has_the_problems(dsc: Dsc, tiny_v3: Path) -> None:
    shown = dsc("plan", tiny_v3, "-r", "w4a16", "--group-size", 100, "--json")
    assert shown.exit_code == 1
    found = json.loads(shown.stdout)
    assert len(found["problems"]) == 4
    assert set(found["problems"][0]) == {"what", "fix"}
    good = json.loads(dsc("plan", tiny_v3, "-r", "w4a16-fast", "--json").stdout)
    assert good["problems"] == []
    assert good["stages"][0]["seconds"] is None
    assert 500_000 < good["bytes"] < 1_100_000


def test_the_next_command_can_be_typed_as_it_stands(dsc: Dsc, tiny_llama: Path, text: Path) -> None:
    Path("my text.jsonl").write_bytes(text.read_bytes())
    words = ["--calibration", "my text.jsonl", "--samples", "2", "--length", "16"]
    following = dsc("plan", tiny_llama, "-r", "calibrate", *words, "--set", "seed=3").stdout.splitlines()[-1]
    assert shlex.split(following)[1:6] == ["dsc", "run", "calibrate", "--model", str(tiny_llama)]
    assert sorted(shlex.split(following)[6:]) == sorted([*words, "--set", "seed=3"])
    done = dsc(*shlex.split(following)[2:], "-o", "my run")
    assert done.exit_code == 0, done.output
    following = done.stdout.splitlines()[-1]
    assert following == f"next: dsc quantize {tiny_llama} -o OUT --statistics 'my run/calibrate'"
    knobs = "{target: 4 bits per weight, weights: rtn, windows: 1, options: [{num_bits: 2}, {num_bits: 4}]}"
    Path("bits.yaml").write_text(f"model: {tiny_llama}\nstages:\n  - allocate: {knobs}\n")
    following = dsc("run", "bits.yaml", "-o", "bits", *words).stdout.splitlines()[-1]
    assert following == f"next: dsc quantize {tiny_llama} -o OUT -r bits/allocate/recipe.yaml"
    assert Path("bits/allocate/recipe.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["inspect", "nowhere"],
            "error: nowhere: no such directory; give the directory of a",
        ),
        (["inspect", "builtin:none"], "error: no built-in model 'builtin:none'; "),
        (["run", "quickstar"], "error: unknown recipe 'quickstar'; did you mean 'quickstart'? "),
        (["run", "some/file.yaml"], "error: some/file.yaml: no such file; "),
        (["run", "w4a16"], "error: w4a16: no model; name one: `model:` in the recipe, or --model"),
        (["quantize", "MODEL", "-o", "q", "--set", "weights.gptaq.grup_size=3"], "error: w4a16.yaml (as changed by"),
        (
            ["quantize", "MODEL", "-o", "q", "--set", "weights=gptqq"],
            "error: w4a16.yaml (as changed by options): ",
        ),
        (["quantize", "MODEL", "-o", "q", "--calibration", "no.jsonl"], "error: calibration: no.jsonl: no such file"),
        (["quantize", "MODEL", "-o", "q", "--memory", "much"], "error: --memory: invalid size 'much'; "),
        (
            ["quantize", "MODEL", "-o", "q", "--device", "tpu"],
            "error: --device tpu: unknown device; use",
        ),
        (
            ["quantize", "MODEL", "-o", "q", "-r", "evaluate"],
            "error: evaluate: has the stages evaluate, not",
        ),
        (["quantize", "MODEL", "-o", "MODEL"], "error: MODEL: exists and was not written by dsc; choose another"),
        (
            ["export", "MODEL", "-o", "q", "--target", "onx"],
            "error: export.yaml (as changed by options): ",
        ),
        (["evaluate", "MODEL", "-o", "r.html"], "error: -o r.html: a page, not the report; name that: -o r.json"),
        (["compare", "no.json", "-o", "c.html"], "error: no.json: No such file or directory; "),
        (["compare", "no.json", "-o", "c.pdf"], "error: -o c.pdf: not a .html or .csv file; "),
    ],
)
def test_a_mistake_is_one_line_and_exit_1(dsc: Dsc, tiny_llama: Path, words: list[str], line: str) -> None:
    Path("MODEL").symlink_to(tiny_llama)
    shown = dsc(*words)
    assert shown.exit_code == 1
    (found,) = errors(shown.stderr)
    assert found.startswith(line)
    assert shown.stdout == ""
    assert not Path("q").exists()


def test_a_mistake_in_json_is_a_document(dsc: Dsc) -> None:
    shown = dsc("inspect", "nowhere", "--json")
    assert shown.exit_code == 1
    assert json.loads(shown.stdout)["problems"][0]["what"] == "nowhere: no such directory"


@pytest.mark.parametrize("words", [["frobnicate"], ["quantize"], ["quantize", "x"], ["run", "--samples", "0", "x"]])
def test_wrong_usage_is_exit_2(dsc: Dsc, words: list[str]) -> None:
    assert dsc(*words).exit_code == 2


def test_each_one_stage_command_does_its_stage(dsc: Dsc, tiny_llama: Path, text: Path) -> None:
    shown = dsc("quantize", tiny_llama, "-o", "q4", "--calibration", text, *SMALL)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines()[-1] == f"next: dsc evaluate q4 --reference {tiny_llama} -o report.json"
    assert dsc("prune", tiny_llama, "-o", "p", "--calibration", text, *SMALL[:4]).exit_code == 0
    assert dsc("calibrate", tiny_llama, "-o", "c", "--calibration", text, *SMALL[:4]).exit_code == 0
    assert dsc("export", "q4", "-o", "b", "--target", "bf16").exit_code == 0
    found = json.loads(dsc("inspect", "p", "--sparsity", "--json").stdout)
    assert {round(row["sparsity"], 2) for row in found["roles"] if row["role"] in {"attention", "mlp"}} == {0.5}
    measured = ["--problems", 2, "--set", "efficiency=false"]
    shown = dsc("evaluate", "q4", "--reference", tiny_llama, "-o", "one.json", *measured, "--json")
    assert shown.exit_code == 0, shown.output
    record = json.loads(shown.stdout)
    assert [model["name"] for model in record["models"]] == [tiny_llama.name, "q4"]
    assert record["reference"] == tiny_llama.name
    assert dsc("evaluate", "b", "--reference", "q4", "-o", "two.json", *measured).exit_code == 0
    shown = dsc("compare", "one.json", "two.json", "-o", "both.html")
    assert shown.exit_code == 0, shown.output
    assert "<html" in Path("both.html").read_text()
    Path("mine.html").write_text("mine")
    assert dsc("compare", "one.json", "-o", "mine.html").exit_code == 1
    assert Path("mine.html").read_text() == "mine"


def dsc_process(*words: object, cwd: Path, stdin: str | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deepseek_compress", *map(str, words)]
    # a shell starts background jobs with SIGINT ignored, and children inherit that: a terminal's Ctrl-C is meant here
    command = ["env", "--default-signal=INT", *command]
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root, "COLUMNS": "80"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=env, start_new_session=True
    )
    if stdin is not None and process.stdin:
        process.stdin.write(stdin)
        process.stdin.close()
        process.stdin = None
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_with_one_line_and_the_same_command_goes_on(
    tiny_v3: Path, text: Path, tmp_path: Path, number: int, code: int
) -> None:
    words = ["quantize", tiny_v3, "-o", "q", "--calibration", text, "--samples", 64, "--length", 32, "--group-size", 32]
    process = dsc_process(*words, cwd=tmp_path)
    assert process.stderr
    line = process.stderr.readline()
    assert "compress" in line
    until = time.monotonic() + 60
    while not (tmp_path / "q" / ".dsc_blocks").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.splitlines()[-1] == "stopped; run the same command again to resume"
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "q" / "config.json").exists()


def test_a_broken_pipe_is_silent(tmp_path: Path) -> None:
    process = dsc_process("list", cwd=tmp_path)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=60)


def test_facts_have_units_and_thousands() -> None:
    from deepseek_compress.cli.show import _facts

    facts = {"linears": 1760, "weights": 106_205_184, "bits_per_weight": 4.6312, "sparsity": 0.5, "bytes": 6_400_000}
    assert list(_facts({**facts, "status": "checked", "loss": 0.123456, "blocks": []})) == [
        "weights: 106.2 M, 4.63 bits each",
        "zeros: 50.0% of these weights, pruned or rounded to zero",
        "linears: 1,760",
        "bytes: 6.4 MB",
        "status: checked",
        "loss: 0.1235",
    ]


def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    command = importlib.import_module("deepseek_compress.cli.app")

    monkeypatch.setattr(command, "app", lambda: None)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
        if given is None:
            monkeypatch.delenv("OMP_WAIT_POLICY")
        command.main()
        assert os.environ["OMP_WAIT_POLICY"] == expected
