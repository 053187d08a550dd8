"""Malformed calibration text from a seeded list, and the 60 MB line: bounded memory, clear lines."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from harness import dsc, faults, warm

from deepseek_compress.models.tokenizer import load_tokenizer

EVERY = 12
OPTIONS = ("-r", "w4a16", "--group-size", "32", "--samples", "2", "--length", "16")
LINE = json.dumps({"text": "What is two plus two? It is four. " * 40}).encode()
VALUES = (None, 3, [], {}, "", " ", "\ud800", "\x1b[31m", "\x00", ["a"], {"a": 1}, True, "x" * 200_000, "é" * 70_000)
FORMS = ("text", "messages", "prompt", "question")
RAW = (
    b"",
    b"\n\n\n",
    b"\x00" * 5000,
    b"\xff\xfe\xfa",
    b"[" * 100_000,
    b"{" * 100_000,
    b'{"text": "a',
    b"[1, 2]",
    b"3",
    b'{"text": 1e999}',
    b'{"text": "' + b"\\ud800" * 10 + b'"}',
    b"\xef\xbb\xbf" + LINE,
    LINE + b"\r\n" + LINE,
    b"9" * 5000,
    b'{"messages": [{"role": "\x1b[2J", "content": "x"}]}',
    b'{"a": 1}\n' * 300_000,
    b'{"text": "' + b"\x1b" + b'"}',
    b'{"text": "a", "text": "b"}',
    b"text",
    b"{}",
    b"null",
)


def texts() -> list[tuple[str, bytes]]:
    """(file name, content); at least 60, the same every time."""
    found = [("a.jsonl", raw) for raw in RAW] + [("a.txt", raw) for raw in RAW[:8]]
    for form in FORMS:
        for value in VALUES:
            entry = {form: value, **({"completion": value} if form == "prompt" else {})}
            found.append(("a.jsonl", json.dumps(entry).encode() + b"\n" + LINE))
    found += [("a.jsonl.gz", b"no gzip"), ("a.jsonl.gz", gzip.compress(LINE)[:-9]), ("a.parquet", b"PAR1" * 9)]
    found += [("a.jsonl.gz", gzip.compress(b"x" * 200_000_000)), ("a.json", b"[]")]
    random.Random(18).shuffle(found)
    return found


ALL = texts()


def test_there_are_enough() -> None:
    assert len(ALL) >= 60


@pytest.mark.parametrize(
    "number", [pytest.param(i, marks=[] if i % EVERY == 0 else pytest.mark.verify) for i in range(len(ALL))]
)
def test_malformed_text(number: int, tmp_path: Path, tiny_qwen2: Path) -> None:
    warm()
    name, content = ALL[number]
    (tmp_path / name).write_bytes(content)
    found = dsc(tmp_path, "quantize", str(tiny_qwen2), "-o", "out", *OPTIONS, "--calibration", name)
    assert faults(found) == [], (name, content[:80])
    assert found.code == 0 or not (tmp_path / "out" / "config.json").exists()


def test_truncation_and_padding_of_a_tokenizer_are_off(tmp_path: Path, tiny_qwen2: Path) -> None:
    text = "What is two plus two? It is four."
    plain = load_tokenizer(tiny_qwen2).encode(text)
    given = json.loads((tiny_qwen2 / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
           "pad_token": "x"}  # fmt: skip
    for change in ({"truncation": cut}, {"padding": pad}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**given, **change}))
        assert load_tokenizer(tmp_path).encode(text) == plain
        assert load_tokenizer(tmp_path).encode_many([text]) == [plain]
    assert len(plain) > 4


@pytest.mark.verify
@pytest.mark.parametrize("form", ["text", "messages"])
def test_a_line_of_60_megabytes(form: str, tmp_path: Path, tiny_qwen2: Path) -> None:
    warm()
    text = "What is two plus two? It is four. " * (60_000_000 // 34)
    entry = {"text": text} if form == "text" else {"messages": [{"role": "user", "content": text}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(entry))
    found = dsc(tmp_path, "quantize", str(tiny_qwen2), "-o", "out", *OPTIONS, "--calibration", "a.jsonl")
    assert faults(found) == []
    assert found.code == 0, found.err
    assert found.memory < 1 << 30
