"""A whole small run of every command that writes, and what is left when one of its calls is its last, or fails.

Calls are counted in a run that ends well (`failing`); then it is run again for each of them, killed after it, and the
same command must go on from what is there to the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from failing import KILLED, Fault
from harness import Outcome, dsc, faults
from test_pages import record

from deepseek_compress.checkpoint.verified import check

TEXT = ("--samples", "2", "--length", "16")
SHORT = ("--steps", "2", "--length", "16", "--set", "keep=0.5", "--set", "documents=4", "--set", "batch_tokens=32")
OPTIONS = "options=[{num_bits: 4, group_size: 32}, {num_bits: 8, group_size: 32}]"
QUESTIONS = ("--problems", "1", "--tasks", "GIVEN/questions.jsonl", "--set", "max_new_tokens=4")
WINDOWS = ("--text", "GIVEN/text.txt", "--windows", "2", "--length", "16")


def _export(source: str, target: str, *more: str) -> tuple[str, ...]:
    return ("export", f"GIVEN/{source}", "-o", "out", "--target", target, *more)


UNVERIFIED = ("--set", "verify=false")
COMMANDS: dict[str, tuple[str, ...]] = {
    "data-free": ("quantize", "GIVEN/model", "-o", "out", "-r", "w4a16-fast", "--group-size", "32"),
    "text": ("quantize", "GIVEN/model", "-o", "out", "-r", "w4a16", "--group-size", "32", *TEXT),
    "prune": ("prune", "GIVEN/model", "-o", "out", "--set", "sparsity=magnitude", *TEXT),
    "calibrate": ("calibrate", "GIVEN/model", "-o", "out", *TEXT),
    "allocate": (
        *("allocate", "GIVEN/model", "-o", "out", *TEXT, "--set", "target=6 bits per weight", "--set", "weights=rtn"),
        *("--set", "windows=1", "--set", OPTIONS),
    ),
    "distill": ("distill", "GIVEN/model", "-o", "out", *SHORT),
    "recording": ("distill", "GIVEN/model", "-o", "out", "--cache", "words", *SHORT),
    "evaluate": (
        *("evaluate", "GIVEN/model", "--reference", "GIVEN/packed", "-o", "out.json", *QUESTIONS, *WINDOWS),
        *("--set", "efficiency=false"),
    ),
    "run": ("run", "GIVEN/recipe.yaml", "-o", "out"),
    "bf16": _export("packed", "bf16"),
    "compressed-tensors": _export("packed", "compressed-tensors"),
    "edge-llm": _export("packed", "edge-llm"),
    "onnx": _export("model", "onnx", *UNVERIFIED),
    "onnxruntime": _export("packed", "onnxruntime", *UNVERIFIED),
    "genai": _export("packed", "genai", *UNVERIFIED),
    "tensorrt-rtx": _export("packed", "tensorrt-rtx", *UNVERIFIED),
    "gguf": _export("packed", "gguf"),
    "compare": ("compare", "GIVEN/report.json", "-o", "out.html"),
}
# Their bytes are other ones in each run: TensorRT's builder gives another engine, whose hash is in the manifest
VARY = {"tensorrt-rtx": ("out/model.engine", "out/dsc_manifest.json")}
RECIPE = """name: all
model: {model}
calibration: {{sources: [builtin], samples: 4, length: 32}}
stages:
  - name: traces
    traces: {{count: 2, attempts: 1, limit: 8, verifier: none}}
  - name: record
    record: {{documents: 4, length: 32}}
  - name: packed
    from: model
    compress: {{weights: {{rtn: {{num_bits: 4, group_size: 32}}}}}}
  - name: recovered
    from: packed
    recover: {{by_block: {{passes: 1, batch_tokens: 64}}, passes: 1}}
  - name: plain
    from: recovered
    export: {{target: bf16}}
  - evaluate: {{problems: 1, max_new_tokens: 4, efficiency: false, suite: {questions}, models: [packed]}}
"""


def prepare(given: Path) -> None:
    """Beside the checkpoint `model`, whose answers end early, what the commands read."""
    model = given / "model"
    (model / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    ends = {"bos_token_id": 1, "eos_token_id": list(range(2, 512, 2))}
    (model / "generation_config.json").write_text(json.dumps(ends))
    questions = given / "questions.jsonl"
    questions.write_text('{"question": "1 + 1", "answer": "2"}\n' * 2)
    (given / "text.txt").write_text("What is two plus two? It is four. " * 9)
    (given / "recipe.yaml").write_text(RECIPE.format(model=model, questions=questions))
    (given / "report.json").write_text(json.dumps(record()))
    symmetric = ("--group-size", "128", "--set", "weights.rtn.symmetric=true")
    found = dsc(given, "quantize", "model", "-o", "packed", "-r", "w4a16-fast", *symmetric)
    assert found.code == 0, found.err


def contents(folder: Path) -> dict[str, bytes]:
    """Everything the promise of same bytes covers, and nothing temporary."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    without = ("stdout", "stderr", "dsc_run.json", "pages.json")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.name not in without}


def save_always() -> None:
    """A training keeps its state after each step."""
    from deepseek_compress.distillation import resume

    resume.EVERY, resume.LARGEST_SHARE = 0.0, 1e9


def words_of(name: str, given: Path) -> list[str]:
    return [word.replace("GIVEN", str(given)) for word in COMMANDS[name]]


def run(name: str, given: Path, folder: Path, fault: Fault | None = None, apart: bool = False) -> Outcome:
    folder.mkdir(exist_ok=True)
    before: Callable[[], None] | None = save_always if name in ("distill", "recording") else None
    return dsc(folder, *words_of(name, given), fault=fault, before=before, apart=apart)


def uninterrupted(name: str, given: Path, tmp: Path, apart: bool = False) -> tuple[dict[str, bytes], int]:
    """What the command writes, and its calls."""
    found = run(name, given, tmp / "whole", Fault(0, tmp / "count"), apart)
    assert found.code == 0, found.err
    return contents(tmp / "whole"), int((tmp / "count").read_text())


def killed(name: str, given: Path, folder: Path, after: int, expected: dict[str, bytes], apart: bool = False) -> None:
    found = run(name, given, folder, Fault(after), apart)
    assert found.code == KILLED, (after, found.err)
    goes_on(name, given, folder, after, expected, apart)


def failed(name: str, given: Path, folder: Path, after: int, expected: dict[str, bytes], apart: bool = False) -> None:
    found = run(name, given, folder, Fault(after, dies=False), apart)
    assert faults(found) == [], after
    goes_on(name, given, folder, after, expected, apart, kept=found.code == 0)


def goes_on(
    name: str, given: Path, folder: Path, after: int, expected: dict[str, bytes], apart: bool, kept: bool = False
) -> None:
    """The same command, to the bytes of an uninterrupted one; `kept`: state that could not be removed may be there."""
    again = run(name, given, folder, apart=apart)
    assert again.code == 0, (after, again.err)
    left, vary = contents(folder), VARY.get(name, ())
    if kept:
        left = {file: left[file] for file in left if file in expected or ".dsc_" not in file}
    assert left.keys() == expected.keys(), after
    assert [file for file in left if left[file] != expected[file] and file not in vary] == [], after
    if vary:
        check(folder / "out")
