"""Files of calibration text: what is read of each kind, and what is said of those that cannot be read."""

from __future__ import annotations

import builtins
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deepseek_compress import limits
from deepseek_compress.calibration import sources
from deepseek_compress.calibration.sources import read_samples
from deepseek_compress.calibration.tokens import calibration_tokens
from deepseek_compress.errors import DscError, Problems
from deepseek_compress.models.tokenizer import load_tokenizer
from tests.calibration.test_calibration_text import lines


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=100)
    return path


def texts(source: Path) -> list[str]:
    return [sample.text or "|".join(m["content"] for m in sample.messages) for sample in read_samples(source)]


def problems(source: Path) -> list[str]:
    with pytest.raises(DscError) as caught:
        list(read_samples(source))
    error = caught.value
    return [str(p) for p in (error.problems if isinstance(error, Problems) else [error])]


def test_a_parquet_file_gives_what_the_same_lines_give(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "other": i} for i in range(700)]
    file = parquet(tmp_path / "a.parquet", {key: [row[key] for row in rows] for key in ("text", "other")})
    assert texts(file) == texts(lines(tmp_path / "a.jsonl", *rows))
    assert next(iter(read_samples(file))).origin == f"{file}: row 1"


def test_forms_mixed_in_one_table_leave_nulls(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    columns = {
        "text": ["plain", None, None, None, " \n"],
        "messages": [None, turns, None, None, None],
        "prompt": [None, None, "p", None, None],
        "completion": [None, None, "c", None, None],
        "question": [None, None, None, "q", None],
        "answer": [None, None, None, "a", None],
    }
    file = parquet(tmp_path / "a.parquet", columns)
    assert texts(file) == ["plain", "hi|ho", "p|c", "q|a"]
    rows = [{key: column[i] for key, column in columns.items()} for i in range(5)]
    assert texts(lines(tmp_path / "a.jsonl", *rows)) == texts(file)


def test_chat_and_instruction_sets_as_others_publish_them(tmp_path: Path) -> None:
    """ShareGPT and Alpaca, as lines and as a table; a turn without text is told."""
    turns = [("system", "s"), ("human", "hi"), ("gpt", "ho"), ("human", "more"), ("gpt", "no")]
    rows = [
        {"conversations": [{"from": who, "value": said} for who, said in turns]},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "la"},
    ]
    keys = ("conversations", "instruction", "input", "output")
    file = parquet(tmp_path / "a.parquet", {key: [row.get(key) for row in rows] for key in keys})
    for source in (lines(tmp_path / "a.jsonl", *rows), file):
        assert texts(source) == ["s|hi|ho|more|no", "Add.\n\n1 2|3", "Sing.|la"]
        chat = next(iter(read_samples(source)))
        assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    (problem,) = problems(lines(tmp_path / "b.jsonl", {"conversations": [{"from": "human"}]}))
    assert "message 1 has no text as from and value" in problem
    assert "has the columns input" in problems(parquet(tmp_path / "c.parquet", {"input": ["x"]}))[0]


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    none = [{"role": "user", "content": None}]
    file = parquet(tmp_path / "a.parquet", {"text": ["x", None, None], "messages": [None, none, None]})
    first, second = problems(file)
    assert "row 2: found the keys 'messages', but message 1" in first
    assert "row 3: found the keys none" in second
    assert "has the columns body" in problems(parquet(tmp_path / "b.parquet", {"body": ["x"]}))[0]
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really")
    assert str(tmp_path / "c.parquet") in problems(tmp_path / "c.parquet")[0]


def test_a_row_that_is_not_utf8(tmp_path: Path) -> None:
    bad = pyarrow.array([b"good", b"\xff\xfe", b"good"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    (found,) = problems(tmp_path / "a.parquet")
    assert "row 2: not UTF-8" in found


def test_without_pyarrow_one_line_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = parquet(tmp_path / "a.parquet", {"text": ["x"]})
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    for name in [name for name in sys.modules if name.startswith("pyarrow")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    (found,) = problems(file)
    assert "needs the package pyarrow; pip install 'deepseek-compress[parquet]'" in found


def test_all_bad_lines_are_told_together(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n{oops\n{"text": "later"}\n{"text": 1}\n{"text": "\\ud800"}\n\xff\n[]\n')
    given = []
    with pytest.raises(Problems) as caught:
        given += list(read_samples(file))
    assert given == []
    told = [str(problem) for problem in caught.value.problems]
    assert [line.split(": ")[0] for line in told] == [f"{file}:{n}" for n in (2, 4, 5, 6, 7)]
    for line, word in zip(told, ("not valid JSON", "'text'", "UTF-16", "not UTF-8", "not a JSON object"), strict=True):
        assert word in line


def test_no_text_is_given_after_a_bad_line_and_the_search_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "one"}, *([[]] * 50), {"text": "two"})
    assert len(problems(file)) == sources.REPORTED + 1
    assert "not searched" in problems(file)[-1]
    monkeypatch.setattr(sources, "SEARCHED", 3)
    file = lines(tmp_path / "b.jsonl", [], *([{"text": "x"}] * 9), [])
    assert len(problems(file)) == 2
    reader = read_samples(lines(tmp_path / "c.jsonl", {"text": "enough"}, []))
    assert next(reader).text == "enough"  # who has enough never comes to the bad line


def test_bad_files_of_a_directory_are_told_together(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", {"text": "good"})
    lines(tmp_path / "b.jsonl", 3)
    (tmp_path / "c.txt").write_bytes(b"good\nline\n\xe9\n")
    (tmp_path / "d.txt").write_bytes(b"a\0b")
    (tmp_path / "sub.jsonl").mkdir()
    told = problems(tmp_path)
    assert [word in line for word, line in zip(("b.jsonl:1", "c.txt:3", "d.txt: has zero"), told, strict=True)]


def test_marks_line_ends_and_compression(tmp_path: Path) -> None:
    plain = lines(tmp_path / "a.jsonl", {"text": "é"}, {"text": "b"}).read_bytes()
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n") + b"\r\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(plain))
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "b.jsonl") == texts(tmp_path / "c.jsonl.gz") == ["é", "b"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"one\ntwo"))
    assert texts(tmp_path / "a.txt") == texts(tmp_path / "b.txt.gz") == ["one\ntwo"]
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(plain)[:-9])
    assert "ended before" in problems(tmp_path / "cut.jsonl.gz")[0]
    (tmp_path / "no.jsonl.gz").write_bytes(b"not compressed")
    assert "no.jsonl.gz" in problems(tmp_path / "no.jsonl.gz")[0]


def test_lines_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINE_BYTES", 1 << 20)
    lines(tmp_path / "a.jsonl", {"text": "x" * (1 << 20)}, {"text": "y"})
    assert "a.jsonl:1: a line of more than 1 MiB" in problems(tmp_path / "a.jsonl")[0]
    (tmp_path / "b.txt").write_text("é" * 200_000)
    pieces = texts(tmp_path / "b.txt")
    assert "".join(pieces) == "é" * 200_000
    assert max(map(len, pieces)) <= 2 * limits.PIECE
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    assert "not valid JSON" in problems(tmp_path / "deep.jsonl")[0]


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("a.txt", " \n\n"), ("b.jsonl", '{"text": ""}\n')])
def test_a_source_without_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert "no text in it" in problems(tmp_path / name)[0]


def test_one_json_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x"}]))
    assert "JSON Lines" in problems(tmp_path / "a.json")[0]
    (tmp_path / "a.CSV.gz").write_bytes(gzip.compress(b"text,label\nx,1\n"))
    assert "a.CSV.gz: a table of separated values" in problems(tmp_path / "a.CSV.gz")[0]


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "x"})

    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "_open", refuse)
    assert f"{file}: Permission denied" in problems(file)[0]


def test_what_a_chat_template_refuses_is_named(tmp_path: Path, tiny_llama: Path) -> None:
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}{{ messages[0].content }}"
    )
    tokenizer = load_tokenizer(tmp_path)
    file = lines(tmp_path / "a.jsonl", {"messages": [{"role": "assistant", "content": "x"}]})
    with pytest.raises(DscError, match="user first") as caught:
        calibration_tokens([file], tokenizer, 1, 2)
    assert str(caught.value).startswith(f"{file}:1: the chat template")
