"""Malformed report.json from a seeded list for `dsc compare`, and every string of a record that may attack the page."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from harness import CONTROL, dsc, faults, warm

from deepseek_compress.errors import DscError
from deepseek_compress.reports import files, merge
from deepseek_compress.reports.charts import scatter
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
        "outliers_by_layer": [{"channels": 2, "size": 0.5, "error": 0.1}, None],
        "experts_by_layer": [None, {"changed": 0.1, "busiest": [0.5, 0.4], "idle": [0, 1]}],
        "weight_errors": {
            "roles": [{"role": "expert", "linears": 3, "bits": 4.5, "weight_error": 0.1, "output_error": None}],
            "worst": [{"name": "a.b", "bits": 4.5, "weight_error": 0.1, "output_error": 0.01}],
        },
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
    """A record that `read` takes becomes pages; one that it does not is one error. `null`: at every twelfth place."""
    value = VALUES[0 if name == "null" else int(name)]
    for at in [*places(record())][:: EVERY if name == "null" else 1]:
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
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(f"@{name}" for name, _ in attrs if name.startswith("on") or name in ("src", "href"))}
        self.scripts += tag == "script"


def strings() -> list[tuple[Any, ...]]:
    found = []
    for at in places(record()):
        value: Any = record()
        for key in at:
            value = value[key]
        if isinstance(value, str):
            found.append(at)
    return found


def harmless(attacked: dict[str, Any]) -> None:
    """Nothing in the page that a plain record's has not, and no script in Markdown outside the recipe."""
    plain, made, html = Tags(), Tags(), page(attacked)
    plain.feed(page(record()))
    made.feed(html)
    assert made.found - plain.found <= {"g"}
    assert made.scripts == html.count("<script") == 1  # the page's own, which its policy names by hash
    assert "<script" not in markdown({**attacked, "recipe": None})


@pytest.mark.parametrize(
    "several", [pytest.param([at], marks=pytest.mark.verify) for at in strings()] + [
        pytest.param(strings(), id="all"),
        pytest.param([at for at in strings() if at[-1] not in ("name", "reference")], id="all but names"),
    ], ids=str,
)  # fmt: skip
def test_no_string_of_a_record_becomes_markup(several: list[tuple[Any, ...]]) -> None:
    attacked = record()
    for at in several:
        attacked = put(attacked, at, ATTACK)
    if ("models", 0, "name") in several:
        attacked["reference"] = ATTACK
    harmless(attacked)


@pytest.mark.parametrize("at", [("suite", "families", "maths"), ("models", 0, "families")], ids=str)
def test_no_key_of_a_record_becomes_markup(at: tuple[Any, ...]) -> None:
    attacked = put(record(), at, {ATTACK: {"exact_match": 0.5}} if at[0] == "models" else ATTACK)
    attacked["suite"]["families"][ATTACK] = ATTACK
    attacked["versions"][ATTACK] = ATTACK
    attacked["machine"][ATTACK] = [ATTACK]
    assert page(attacked).count("<script") == 1
    assert "onerror=alert(2)>" not in page(attacked)


def test_a_picture_draws_names_as_they_are_and_never_as_markup() -> None:
    """Mathematics of matplotlib, control characters, what XML can't hold, and a name longer than the page."""
    for name in ("$\\frac{1}$ and $x", "a\x00b\x1b[2J\ud800", "<b>&amp;" * 300, "\u202egnp.exe"):
        drawn = scatter(put(record(), ("models", 1, "name"), name), 1150, "k") or ""
        assert not re.search(r"[\x00-\x09\x0b-\x1f\ud800-\udfff\u202e]|<b>", drawn)
        if name.startswith("$"):
            assert f">{name}</text>" in drawn


def test_the_page_may_load_nothing_and_run_its_own_script_alone() -> None:
    html = page(record())
    policy = re.search('Content-Security-Policy" content="([^"]*)"', html)
    script = re.search("<script>(.*)</script>", html, re.DOTALL)
    assert policy is not None
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    said = policy[1].replace("&#39;", "'")
    assert said == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


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
