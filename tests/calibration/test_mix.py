"""A mix of sources: shares met within one window, the same whatever else happens, and told in the manifest."""

from __future__ import annotations

import math
from pathlib import Path

import blake3
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deepseek_compress.calibration.settings import Calibration
from deepseek_compress.calibration.tokens import apportion, by_share, facts, read_windows, spread
from deepseek_compress.errors import DscError
from deepseek_compress.jobs import source_of
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.stages.text import normalized
from deepseek_compress.tasks import mixture
from tests.calibration.test_calibration_text import lines

SHARES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("mix")
    problems = mixture(seed=1, count=90, split="calibration")
    return [
        lines(folder / f"{name}.jsonl", *({"text": f"{p.prompt} {p.solution}"} for p in problems[i::3]))
        for i, name in enumerate("abc")
    ]


def mix(files: list[Path], *shares: float, **more: int) -> Calibration:
    sources = [{"path": str(file), "share": share} for file, share in zip(files, shares, strict=False)]
    return Calibration.model_validate({"sources": sources, "samples": 10, "length": 32, **more})


@given(SHARES, st.integers(0, 200))
def test_parts_are_within_one_of_their_share(shares: list[float], count: int) -> None:
    parts = apportion(shares, count)
    assert sum(parts) == count
    for share, part in zip(shares, parts, strict=True):
        assert abs(part - count * share / math.fsum(shares)) < 1 + 1e-9
    assert sorted(spread(parts)) == [i for i, part in enumerate(parts) for _ in range(part)]


@given(SHARES, st.integers(0, 60), st.integers(0, 60))
def test_parts_never_take_more_than_there_is(shares: list[float], count: int, more: int) -> None:
    there = apportion(shares, count + more)
    parts = apportion(shares, count, there)
    assert sum(parts) == count
    assert all(part <= most for part, most in zip(parts, there, strict=True))


def test_the_alabama_paradox() -> None:
    shares = [6.0, 6.0, 2.0]
    assert (apportion(shares, 10), apportion(shares, 11)) == ([4, 4, 2], [5, 5, 1])
    assert apportion(shares, 10, [5, 5, 1]) == [5, 4, 1]


@given(st.lists(st.integers(1, 30), min_size=2, max_size=2))
def test_two_sources_are_spread_evenly(counts: list[int]) -> None:
    order = spread(counts)
    for end in range(len(order) + 1):
        for i, count in enumerate(counts):
            assert abs(order[:end].count(i) - count * end / len(order)) <= 1


def test_windows_come_by_share(files: list[Path], tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    found = read_windows(mix(files, 0.7, 0.3), tokenizer)
    assert found.tokens.shape == (10, 32)
    assert found.taken.sum(0).tolist() == [7 * 32, 3 * 32]
    alone = [
        read_windows(mix([file], 1.0, samples=n), tokenizer).tokens for file, n in zip(files, (7, 3), strict=False)
    ]
    for i, part in enumerate(alone):
        assert torch.equal(found.tokens[found.taken[:, i] > 0], part)
    again = read_windows(mix(files, 7, 3), tokenizer)
    assert torch.equal(found.tokens, again.tokens)


def test_without_shares_sources_take_turns(files: list[Path], tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    wanted = Calibration.model_validate({"sources": [str(file) for file in files], "samples": 10, "length": 32})
    found = read_windows(wanted, tokenizer)
    assert found.taken.sum(1).tolist() == [32] * 10
    share = found.taken.sum(0) / 320
    assert (share - 1 / 3).abs().max() < 0.2
    one = Calibration.model_validate({**wanted.model_dump(), "sources": [str(files[0])]})
    same = read_windows(mix(files[:1], 5.0), tokenizer)
    assert torch.equal(read_windows(one, tokenizer).tokens, same.tokens)


def test_a_source_that_is_too_short_is_named(files: list[Path], tiny_llama: Path) -> None:
    with pytest.raises(DscError, match=r"/b\.jsonl: \d+ tokens of calibration text, 990 x 32 asked for"):
        read_windows(mix(files, 1, 99, samples=1000), load_tokenizer(tiny_llama))


def test_documents_by_share(files: list[Path], tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokens, longest = [0, 0], 0
    for document in by_share(mix(files, 3, 1).sources, tokenizer):
        tokens[document.source] += len(document.ids)
        longest = max(longest, len(document.ids))
        if sum(tokens) > 1000:
            break
    assert abs(tokens[0] - 0.75 * sum(tokens)) <= longest


def test_what_is_told_of_the_sources(files: list[Path], tiny_llama: Path) -> None:
    wanted = mix(files, 0.7, 0.3)
    told = facts(wanted, read_windows(wanted, load_tokenizer(tiny_llama)))
    first, second = told["sources"]
    digest = blake3.blake3(files[0].read_bytes()).hexdigest()
    assert first == {"name": "a.jsonl", "files": {"a.jsonl": digest}, "share": 0.7, "tokens": 224}
    assert (second["name"], second["tokens"]) == ("b.jsonl", 96)
    assert (told["samples"], told["length"]) == (10, 32)


def test_shares_of_all_or_of_none() -> None:
    with pytest.raises(ValidationError, match="a: no share, though others have one"):
        Calibration.model_validate({"sources": ["a", {"path": "b", "share": 1}]})
    with pytest.raises(ValidationError, match="greater than 0"):
        Calibration.model_validate({"sources": [{"path": "b", "share": 0}]})
    plain = Calibration.model_validate({"sources": ["a", {"path": "b"}]})
    assert plain.model_dump(mode="json")["sources"] == ["a", "b"]


def test_shares_on_the_command_line(tmp_path: Path) -> None:
    assert source_of("a.jsonl") == "a.jsonl"
    assert source_of("a.jsonl=0.7") == {"path": "a.jsonl", "share": 0.7}
    odd = tmp_path / "x=1"
    odd.write_text("text")
    assert source_of(str(odd)) == str(odd)
    assert source_of(f"{odd}=2") == {"path": str(odd), "share": 2.0}
    with pytest.raises(DscError, match="invalid share 'much'"):
        source_of("a.jsonl=much")


def test_shares_that_do_not_add_up_to_one_are_reported() -> None:
    def said(*shares: float | None) -> list[str]:
        sources = [
            {"path": f"{n}.jsonl", **({} if share is None else {"share": share})} for n, share in enumerate(shares)
        ]
        return normalized(Calibration.model_validate({"sources": sources}))

    assert said(0.7, 0.3) == said(None, None) == said(0.1, 0.2, 0.7) == []
    assert said(0.5, 0.3) == ["shares add up to 0.8, not 1; taken as 0.jsonl 0.625, 1.jsonl 0.375"]
