"""Malformed report.json from a seeded list for `dsc compare`, and every string of a record that may attack the page."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from harness import CONTROL, dsc, faults, warm

from deepseek_compress.errors import DscError
from deepseek_compress.reports import files, merge
from deepseek_compress.reports.markdown import markdown
from deepseek_compress.reports.page import page

EVERY = 12
ATTACK = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&`|"
VALUES = (None, -1, 0, 1e400, 1e300, "x", [], {}, [[]], True, "\x1b[31m", "\ud800", 10**30, ["x"], {"x": {}})


def record() -> dict[str, Any]:
    metrics = dict.fromkeys(files.METRICS) | {"exact_match": 0.9, "kl_divergence": 0.01, "perplexity": 9.0}
    model = {
        "name": "teacher", "path": "runs/teacher", "bytes": 1000, "parameters": 500, "bits_per_weight": 16.0,
        "metrics": metrics, "intervals": {"exact_match": [0.8, 0.95]}, "about": "reference",
        "lineage": [{"stage": "compress", "source": "a"}], "relative": {"exact_match": 1.0},
        "families": {"maths": {"exact_match": 0.9}}, "error_by_layer": [0.01, 0.02],
        "expert_coverage": [{"block": 1, "tokens": [3, 4], "starved": ["e1"]}],
    }  # fmt: skip
    other = {**copy.deepcopy(model), "name": "small", "bytes": 400, "about": None}
    return {
        "schema": 1, "name": "run", "reference": "teacher", "models": [model, other],
        "artifacts": [{"name": "engine", "target": "onnx", "path": "m", "bytes": 3, "status": "built", "note": "n"}],
        "machine": {"cpu": "some", "simd": ["avx2"]}, "versions": {"torch": "2"}, "ablations": [],
        "suite": {"name": "builtin", "problems": 10, "families": {"maths": 10}},
        "text": {"source": "wt2", "tokens": 10, "windows": 1}, "notes": ["a note"], "recipe": "stages: []\n",
    }  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a record."""
    yield at
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*at, key))


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    value = copy.deepcopy(value)
    target = value
    for key in at[:-1]:
        target = target[key]
    target[at[-1]] = new
    return value


def reports() -> list[str]:
    """Texts of at least 60 reports, the same every time."""
    rng = random.Random(18)
    whole = [at for at in places(record()) if at]
    found = [json.dumps(put(record(), at, rng.choice(VALUES))) for at in whole]
    found += [json.dumps({k: v for k, v in record().items() if k != key}) for key in record()]
    found += ["", "[]", "3", "{", "[" * 100_000, '{"schema": 1}', '{"schema": "\\u001b[2J"}', "\x00"]
    return found


ALL = reports()


def test_there_are_enough() -> None:
    assert len(ALL) >= 60


@pytest.mark.parametrize(
    "number", [pytest.param(i, marks=[] if i % EVERY == 0 else pytest.mark.verify) for i in range(len(ALL))]
)
def test_a_malformed_report(number: int, tmp_path: Path) -> None:
    warm()
    (tmp_path / "bad.json").write_text(ALL[number])
    (tmp_path / "good.json").write_text(json.dumps(record()))
    found = dsc(tmp_path, "compare", "good.json", "bad.json", "-o", "out.html")
    assert faults(found) == [], ALL[number][:300]
    assert found.code == 0 or not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    "name", [pytest.param("null"), *(pytest.param(i, marks=pytest.mark.verify) for i in range(15))]
)
def test_any_value_at_any_place(name: str | int, tmp_path: Path) -> None:
    """A record that `read` takes becomes pages; one that it does not is one error."""
    value = VALUES[0 if name == "null" else int(name)]
    for at in places(record()):
        changed = put(record(), at, value) if at else value
        (tmp_path / "report.json").write_text(json.dumps(changed))
        try:
            found = files.read(tmp_path)
        except DscError:
            continue
        merged = merge([record(), found], ["good", "bad"])
        for whole in (found, merged):
            page(whole)
            markdown(whole)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(f"@{name}" for name, _ in attrs if name.startswith("on") or name in ("src", "href"))}


def strings() -> list[tuple[Any, ...]]:
    found = []
    for at in places(record()):
        value: Any = record()
        for key in at:
            value = value[key]
        if isinstance(value, str):
            found.append(at)
    return found


@pytest.mark.parametrize("at", strings(), ids=str)
def test_no_string_of_a_record_becomes_markup(at: tuple[Any, ...]) -> None:
    plain, made = Tags(), Tags()
    plain.feed(page(record()))
    attacked = put(record(), at, ATTACK)
    if at == ("models", 0, "name"):
        attacked["reference"] = ATTACK
    made.feed(page(attacked))
    assert made.found - plain.found <= {"svg", "rect"}
    assert "<script" not in page(attacked)
    if at != ("recipe",):
        assert "<script" not in markdown(attacked)


@pytest.mark.parametrize("at", [("suite", "families", "maths"), ("models", 0, "families")], ids=str)
def test_no_key_of_a_record_becomes_markup(at: tuple[Any, ...]) -> None:
    attacked = put(record(), at, {ATTACK: {"exact_match": 0.5}} if at[0] == "models" else ATTACK)
    attacked["suite"]["families"][ATTACK] = ATTACK
    attacked["versions"][ATTACK] = ATTACK
    attacked["machine"][ATTACK] = [ATTACK]
    assert "<script" not in page(attacked)
    assert "onerror=alert(2)>" not in page(attacked)


def test_the_page_may_load_and_run_nothing() -> None:
    assert "Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"" in page(record())


def test_the_terminal_gets_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    from deepseek_compress import console
    from deepseek_compress.errors import DscError, Problems

    attack = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202egnp.exe\r\x00\ud800"
    console.line(attack)
    console.note(attack)
    console.next_step(attack)
    console.stopped(attack)
    console.errors(Problems([DscError(attack, attack)] * 1000))
    console.table("", ("a", "b"), [(attack, attack)])
    console.print_json({attack: attack})
    shown = capsys.readouterr()
    assert not CONTROL.search((shown.out + shown.err).replace("\n", ""))
    assert "\u202e" not in shown.out + shown.err
    assert "and 950 more" in shown.err
