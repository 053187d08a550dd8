"""Calibration text: every accepted form, every refused one with its line, and the cutting into windows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deepseek_compress.calibration.sources import read_samples
from deepseek_compress.calibration.tokens import calibration_tokens, interleave
from deepseek_compress.errors import DscError
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.tasks import mixture


def lines(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_every_form_of_a_line(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "hello"}
    file = lines(
        tmp_path / "a.jsonl",
        {"text": "plain"},
        {"messages": [turn]},
        {"prompt": "p", "completion": "c", "extra": 1},
        {"question": "q", "answer": "a"},
    )
    found = list(read_samples(file))
    assert [sample.origin for sample in found] == [f"{file}:{n}" for n in (1, 2, 3, 4)]
    assert found[0].text == "plain"
    assert found[1].messages == (turn,)
    assert [m["content"] for m in found[2].messages] == ["p", "c"]
    assert [m["role"] for m in found[3].messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"body": "x"}', "found the keys 'body'"),
        ('{"text": 3}', "found the keys 'text'"),
        ('{"messages": [{"role": "user"}]}', "found the keys 'messages'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(DscError, match=reason) as caught:
        list(read_samples(file))
    assert f"{file}:3" in str(caught.value)


def test_plain_text_comes_in_pieces_and_directories_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("line of text\n" * 20000)
    lines(tmp_path / "a.jsonl", {"text": "first"})
    found = [sample.text for sample in read_samples(tmp_path)]
    assert found[0] == "first"
    assert len(found) > 2
    assert "".join(found[1:]) == "line of text\n" * 20000


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(DscError, match="no such file"):
        list(read_samples(tmp_path / "none.txt"))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DscError, match="not UTF-8"):
        list(read_samples(tmp_path / "a.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DscError, match=r"no \.jsonl"):
        list(read_samples(tmp_path / "empty"))


def test_sources_take_turns() -> None:
    assert list(interleave([iter("abc"), iter("x"), iter("12")])) == ["a", "x", "1", "b", "2", "c"]


def test_windows(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    texts = [f"{p.prompt} {p.solution}" for p in mixture(seed=1, count=30, split="calibration")]
    file = lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    tokens = calibration_tokens([file], tokenizer, samples=6, length=40)
    (end,) = tokenizer.eos_ids
    stream = [i for text in texts for i in [*tokenizer.encode(text, special=True), end]]
    assert torch.equal(tokens, torch.tensor(stream[:240]).view(6, 40))
    with pytest.raises(DscError, match="1000 x 40 asked for") as caught:
        calibration_tokens([file], tokenizer, samples=1000, length=40)
    assert f"samples: {len(stream) // 40}" in caught.value.fix
