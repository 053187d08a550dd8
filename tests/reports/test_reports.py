"""Records become tables, pictures, Markdown, HTML and JSON; several become one."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from deepseek_compress.errors import DscError
from deepseek_compress.reports import charts, compare, files, inline, merge, page, read, table, words, write
from deepseek_compress.reports.markdown import markdown

VOID = {"meta", "br", "hr", "img", "link", "input"}


def model(name: str, size: int, exact: float | None, **others: Any) -> dict[str, Any]:
    parameters = others.pop("parameters", 10_000_000)
    lineage = others.pop("lineage", [])
    metrics = dict.fromkeys(files.METRICS) | {"exact_match": exact, "kl_divergence": others.pop("kl", None)}
    intervals = {"exact_match": [exact - 0.02, exact + 0.02]} if exact is not None else {}
    return {
        "name": name, "path": f"runs/x/{name}", "bytes": size, "parameters": parameters,
        "bits_per_weight": 8 * size / parameters, "metrics": metrics, "intervals": intervals, "lineage": lineage,
        **others,
    }  # fmt: skip


@pytest.fixture
def record() -> dict[str, Any]:
    step = {"stage": "compress", "source": "teacher"}
    return {
        "schema": 1, "name": "quick & <start>", "reference": "teacher",
        "models": [
            model("teacher", 11_000_000, 0.94, relative={"exact_match": 1.0}, families={"maths": {"exact_match": 0.9}}),
            model("small", 5_500_000, 0.893, lineage=[step], relative={"exact_match": 0.95}, kl=0.0123,
                  error_by_layer=[0.02, 0.05], families={"maths": {"exact_match": 0.85}}),
        ],
        "artifacts": [{"name": "engine", "target": "tensorrt-rtx", "path": "model.engine", "bytes": 7_000_000,
                       "status": "built, not run"}],
        "machine": {"cpu": "some", "memory_bytes": 8_000_000_000, "gpu": None}, "versions": {"torch": "2.13.0"},
        "ablations": [model("one-shot", 20_000_000, 0.4, lineage=[step], relative={"exact_match": 0.4255})],
        "suite": {"name": "builtin", "problems": 1000, "families": {"maths": 1000}}, "text": None,
        "notes": ["a note"], "recipe": "stages:\n  - compress: {}  # <b>\n",
    }  # fmt: skip


class Checker(HTMLParser):
    """Every element is closed in its order; what is loaded from elsewhere is collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.loads += [f"{tag} {name}" for name in ("src", "href", "srcset", "data", "action") if name in found]
        self.ids += [str(found["id"])] if "id" in found else []
        self.labels += str(found.get("aria-labelledby", "")).split()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_is_whole_and_loads_nothing(record: dict[str, Any]) -> None:
    html = page.page(record)
    found = check(html)
    assert found.loads == []
    assert not {"link", "iframe", "img"} & set(found.tags)
    assert found.tags.count("script") == 1
    assert not re.search(r"https?:|@import|url\(", html)
    assert len(found.ids) == len(set(found.ids))
    assert set(found.labels) == set(found.ids)
    assert len(found.labels) == 2 * html.count('role="img"') > 0
    assert html == page.page(copy.deepcopy(record))


def test_text_of_the_record_is_never_markup(record: dict[str, Any]) -> None:
    record["models"][1]["name"] = record["models"][1]["about"] = "<script>alert(1)</script>"
    record["artifacts"][0]["path"] = '"><img src=x>'
    html = page.page(record)
    tags = check(html).tags
    assert "img" not in tags
    assert tags.count("script") == 1
    assert "quick &amp; &lt;start&gt;" in html
    assert "# &lt;b&gt;" in html


def test_the_page_shows_what_was_measured(record: dict[str, Any]) -> None:
    html = page.page(record)
    shown = (
        "small is 2.0 times smaller than teacher and keeps 95.0 %", "3.6 times smaller than teacher in BF16", "94.0 %",
        "[92.0, 96.0]", "built, not run", "Error by layer", "one-shot", "teacher</li>", "compress: small",
        "Not measured in this run: Cache a token, F1",
    )  # fmt: skip
    assert [text for text in shown if text not in html] == []


def test_a_record_of_nulls_still_renders(record: dict[str, Any]) -> None:
    bare = {**record, "models": [model("only", 0, None) | {"bytes": None, "bits_per_weight": None}], "reference": None,
            "artifacts": [], "ablations": [], "suite": None, "machine": {}, "versions": {}, "recipe": None}  # fmt: skip
    check(page.page(bare))
    assert markdown(bare).startswith("# quick")
    assert charts.scatter(bare, 600, "x") is None
    assert words.verdict(bare) == "only: nothing was measured."


def test_rows_are_formatted_once_for_all(record: dict[str, Any]) -> None:
    found = table.rows(record)
    assert found.headers == ["Model", "Size", "Bits per weight", "Exact match", "Of reference", "KL"]
    assert found.rows[0] == ["teacher (reference)", "11.0 MB", "8.80", "94.0 % [92.0, 96.0]", "100.0 %", "–"]
    assert found.rows[1] == ["small", "5.50 MB", "4.40", "89.3 % [87.3, 91.3]", "95.0 %", "0.0123"]
    assert found.rows[2][0] == "one-shot (ablation)"
    assert "| small | 5.50 MB | 4.40 | 89.3 % [87.3, 91.3] | 95.0 % | 0.0123 |" in markdown(record)
    assert "89.3 %" in page.page(record)
    assert set(table.rows(record, compact=True).headers) <= set(found.headers)
    assert table.layer_rows(record).rows == [["0", "0.0200"], ["1", "0.0500"]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(999, "999 B"), (1000, "1.00 kB"), (11_034_112, "11.0 MB"), (999_600, "1.00 MB"), (6.7e11, "670 GB")],
)
def test_sizes_have_three_digits(value: float, text: str) -> None:
    assert table.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00810, "0.00810"), (1.6404, "1.64"), (123.4, "123"), (3e-7, "3.00e-07"), (float("inf"), "∞")],
)
def test_significant_digits(value: float, text: str) -> None:
    assert table.significant(value) == text


def test_writing_keeps_nulls_and_refuses_what_json_cannot_hold(record: dict[str, Any], tmp_path: Path) -> None:
    paths = write(record, tmp_path / "report.json")
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    kept = json.loads(paths[0].read_text())
    assert kept == record == read(paths[2])
    assert kept["models"][0]["metrics"]["peak_bytes"] is None
    with pytest.raises(ValueError, match="JSON"):
        write({**record, "notes": [float("nan")]}, tmp_path / "bad.json")
    del record["models"][1]["metrics"]["f1"]
    with pytest.raises(ValueError, match=r"models\[1\].metrics.f1"):
        write(record, tmp_path / "bad.json")
    assert not (tmp_path / "bad.json").exists()


def test_what_is_no_report_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"schema": 7}')
    (tmp_path / "c.json").write_text('{"schema": 1, "models": []}')
    for name, message in (("a", "not valid JSON"), ("b", "schema 7"), ("c", "lacks reference"), ("d", "No such file")):
        with pytest.raises(DscError, match=message):
            read(tmp_path / f"{name}.json")


def test_null_where_an_object_belongs_is_said(record: dict[str, Any], tmp_path: Path) -> None:
    record["models"][1]["metrics"] = None
    (tmp_path / "report.json").write_text(json.dumps(record))
    with pytest.raises(DscError, match=r"report\.json: models\.1\.metrics: Input should be an object; evaluate again"):
        read(tmp_path)
    del record["models"][1]["metrics"]
    (tmp_path / "report.json").write_text(json.dumps(record))
    with pytest.raises(DscError, match=r"report\.json: lacks models\[1\]\.metrics"):
        read(tmp_path)


def test_comparing_puts_runs_side_by_side(record: dict[str, Any], tmp_path: Path) -> None:
    other = copy.deepcopy(record)
    other["models"][1]["metrics"]["exact_match"] = 0.9
    other["models"][0]["metrics"]["decode_tokens_per_s"] = 5.0  # speed alone does not make another model
    other["suite"]["problems"] = 500
    for name, content in (("one", record), ("two", other)):
        (tmp_path / name).mkdir()
        write(content, tmp_path / name / "report.json")
    found = compare([tmp_path / "one" / "report.json", tmp_path / "two"], tmp_path / "all.html")
    assert [m["name"] for m in found["models"]] == ["teacher", "one/small", "two/small"]
    assert [m["name"] for m in found["ablations"]] == ["one-shot"]
    assert found["reference"] == "teacher"
    assert found["suite"] is None
    assert any(note.startswith("two against one: other problems") for note in found["notes"])
    assert read(tmp_path / "all.json") == found
    check((tmp_path / "all.html").read_text())
    assert (tmp_path / "all.md").exists()
    with pytest.raises(DscError, match="would be overwritten"):
        compare([tmp_path / "all.json"], tmp_path / "all.html")
    with pytest.raises(DscError, match="no reports"):
        compare([], tmp_path / "all.html")


def test_comparing_one_run_changes_nothing(record: dict[str, Any]) -> None:
    found = merge([record], ["run"])
    assert found["models"] == record["models"]
    assert found["reference"] == "teacher"
    other = merge([record, {**record, "reference": "small"}], ["a", "b"])
    assert other["reference"] is None
    assert [m["name"] for m in other["models"]] == ["teacher", "small"]


def marks(picture: str) -> dict[str, tuple[float, float]]:
    """Where each model's mark is, by the first line of what it says when pointed at."""
    form = r'class="detail"><title>([^\n<]*)[^<]*</title><path [^>]*translate\(([\d.]+) ([\d.]+)\)'
    return {name: (float(x), float(y)) for name, x, y in re.findall(form, picture)}


def test_scatter_draws_every_model_where_it_is(record: dict[str, Any]) -> None:
    picture = charts.scatter(record, 800, "k") or ""
    for name in ("teacher", "small", "one-shot ↓ 40.0 %"):
        assert f">{name}</text>" in picture
    assert picture.count('class="path"') == 2  # both were made of the teacher
    found = marks(picture)
    assert set(found) == {"teacher", "small", "one-shot"}
    assert found["small"][0] < found["teacher"][0] < found["one-shot"][0]  # smaller is to the left
    assert found["small"][1] > found["teacher"][1]  # less exact is below
    assert found["one-shot"][1] > found["small"][1]  # far below: on the lower edge
    assert "Exact match: 89.3 % [87.3 %, 91.3 %]\nSize on disk: 5.50 MB" in picture
    at = dict(re.findall(r'class="name"><text x="([\d.]+)"[^>]*>([^<]*)<', picture))
    assert set(at.values()) == {"teacher", "small", "one-shot ↓ 40.0 %"}


@pytest.mark.parametrize("factor", [9, 30, 250, 20_000])
def test_the_marks_of_a_wide_range_of_sizes_do_not_crowd(record: dict[str, Any], factor: int) -> None:
    """What a telephone shows: 276 pixels of axis, some 50 a label."""
    record["models"][0]["bytes"] = factor * record["models"][1]["bytes"]
    labels = re.findall(r">(\d+ [kMGT]B)<", str(charts.scatter(record, 336, "k")))
    assert 1 <= len(labels) <= 5, labels


def test_no_fact_is_written_as_python_does() -> None:
    gpus = [{"name": "H100", "memory_bytes": 80_000_000_000}, {"name": "H200"}]
    assert words.fact("gpus", gpus) == "name H100, memory_bytes 80.0 GB, name H200"


def test_scatter_against_speed_has_the_faster_to_the_right(record: dict[str, Any]) -> None:
    assert "against decode speed" not in page.page(record)
    for row, rate in zip(record["models"], (20.0, 56.0), strict=True):
        row["speed"] = {"runtime": "onnxruntime", "prefill_tokens_per_s": None, "decode_tokens_per_s": rate}
    assert "Exact match against decode speed" in page.page(record)
    found = marks(charts.scatter(record, 336, "k", charts.SPEED) or "")
    assert found["small"][0] > found["teacher"][0]


def test_the_front_leads_through_what_nothing_beats(record: dict[str, Any]) -> None:
    record["ablations"] = []
    assert 'class="front"' not in (charts.scatter(record, 800, "k") or "")  # two models are no front
    record["models"].append(model("beaten", 6_000_000, 0.7))
    picture = charts.scatter(record, 800, "k") or ""
    line = re.search(r'class="front"><path d="M ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+)"', picture)
    assert line is not None
    found = marks(picture)
    assert [*found["small"], *found["teacher"]] == pytest.approx([float(number) for number in line.groups()], abs=0.2)


def test_colours_follow_the_page(record: dict[str, Any]) -> None:
    """Colours are variables, and none is left that only suits a light page."""
    picture = charts.scatter(record, 800, "k") or ""
    assert "var(--s1)" in picture
    assert not re.search("#[0-9a-f]{6}", picture)
    assert len({inline.ink(name) for name in inline.INKS}) == len(inline.INKS)


def test_axis_follows_what_was_measured(record: dict[str, Any]) -> None:
    for row in [*record["models"], *record["ablations"]]:
        row["metrics"] |= {"exact_match": None, "perplexity": 12.5}
    assert charts.accuracy_axis(record) == charts.AXES[2]
    assert "Perplexity against size" in page.page(record)


def test_series_keep_their_colours_and_the_reference_its_own(record: dict[str, Any]) -> None:
    assert charts.series(record) == {"teacher": 0, "small": 1, "one-shot": 2}
    record["models"] += [model(f"m{i}", 1, None) for i in range(20)]
    numbers = charts.series(record)
    assert set(numbers.values()) <= set(range(inline.SERIES))
    assert [name for name, number in numbers.items() if number == 0] == ["teacher"]


def test_labels_do_not_cover_each_other(record: dict[str, Any]) -> None:
    record["models"] = [model(f"a-long-name-of-a-model-{i}", 8_000_000 + 1000 * i, 0.8) for i in range(5)]
    record["ablations"] = []
    picture = charts.scatter(record, 1150, "k") or ""
    form = r'class="name"><text x="([\d.]+)" y="([\d.]+)" style="[^"]*text-anchor:(\w+)[^"]*">([^<]*)<'
    boxes = []
    for x, y, anchor, words_ in re.findall(form, picture):
        width = 7.0 * len(words_)
        left = float(x) - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, left + width, float(y) - 9, float(y)))
        assert left >= 0
        assert left + width <= 1150
    assert len(boxes) == 5
    for a, b in combinations(boxes, 2):
        assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]


@pytest.mark.parametrize(
    ("written", "key"),
    [("11.0 MB", "11000000.0"), ("94.0 % [92.0, 96.0]", "94.0"), ("1,319", "1319.0"), ("-5.5", "-5.5"), ("–", ""),
     ("2.80 ×", "2.8"), ("3.00e-07", "3e-07"), ("w4a16", "w4a16"), ("900 B", "900.0"), ("", "")],
)  # fmt: skip
def test_what_a_cell_is_sorted_by(written: str, key: str) -> None:
    assert table.sort_key(written) == key


def test_several_runs_have_no_last_model(record: dict[str, Any]) -> None:
    other = copy.deepcopy(record)
    other["models"][1] |= {"name": "smaller", "bytes": 4_000_000}
    said = words.verdict(merge([record, other], ["a", "b"]))
    assert said.startswith("4 models of 2 runs against teacher. Not beaten in size and accuracy together: teacher, ")
    assert "keeps" not in said
    sure = {"difference": -0.05, "interval": [-0.06, -0.04], "p": 0.001, "p_holm": 0.001, "level": 0.05}
    found = merge([record, other], ["a", "b"])
    found["models"][2]["certainty"] = sure
    assert "beyond noise: smaller." in words.verdict(found)


def test_expert_coverage_is_a_picture_and_a_table(record: dict[str, Any]) -> None:
    assert "reached each expert" not in page.page(record) + markdown(record)
    blocks = [
        {"block": 1, "tokens": [0, 40, 900, 7], "starved": [0, 3]},
        {"block": 2, "tokens": [5, 6, 7, 8], "starved": []},
    ]
    record["models"][1]["expert_coverage"] = blocks
    drawn = charts.expert_cells(record["models"][1], 336, "k")
    strokes = [part for part in re.findall(r'<path d="([^"]*)" style="([^"]*)"', drawn) if "--s1" in part[1]]
    assert sum(path.count("M") for path, _ in strokes) == 8
    assert "opacity:0.04;" in strokes[0][1]  # no token; the last is the expert with most
    assert "opacity" not in strokes[-1][1]
    assert [
        path.count("M") for path, style in re.findall(r'd="([^"]*)" style="([^"]*)"', drawn) if "--s4" in style
    ] == [2]
    assert "block 1: 0 to 900 tokens an expert, median 40\ntoo few: 0, 3</title>" in drawn
    assert "reached each expert of small" in page.page(record)
    assert table.coverage_rows(record).rows == [
        ["small", "1", "4", "0", "40", "900", "2", "0, 3"],
        ["small", "2", "4", "5", "7", "8", "0", table.UNKNOWN],
    ]
    assert "| small | 1 | 4 | 0 | 40 | 900 | 2 | 0, 3 |" in markdown(record)
