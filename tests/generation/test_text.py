"""Tokens to text as they come."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from deepseek_compress.generation.text import Detokenizer, Thoughts
from deepseek_compress.models.tokenizer import Tokenizer


def bytes_tokenizer(path: Path) -> Tokenizer:
    """A byte-level tokenizer without merges: each byte of UTF-8 is a token."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return Tokenizer(path)


def test_no_half_characters(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer(tmp_path)
    text = "Größe 深度求索 👩‍💻!"
    words = Detokenizer(tokenizer.decode)
    pieces = [words.add(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces.count("") > 10
    cut = Detokenizer(tokenizer.decode)
    assert [cut.add(token) for token in tokenizer.encode("深")[:2]] == ["", ""]
    assert cut.end() == "\ufffd", "an answer that ends within a character says so"
    assert cut.end() == ""


def test_spaces_between_words_stay(tiny_llama: Path) -> None:
    """A word-level tokenizer puts spaces between tokens, which are lost where each is decoded alone."""
    tokenizer = Tokenizer(tiny_llama)
    ids = list(range(20, 40))
    words = Detokenizer(tokenizer.decode)
    assert "".join([*(words.add(token) for token in ids), words.end()]) == tokenizer.decode(ids)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "a", "<", "</", "th", "ink>", " ", "x < y"]), max_size=12),
    st.integers(1, 5),
)
def test_thoughts_are_split_the_same_however_the_text_comes(parts: list[str], step: int) -> None:
    text = "".join(parts)
    split, whole = Thoughts(), Thoughts()
    pieces = [piece for i in range(0, len(text), step) for piece in split.add(text[i : i + step])]
    pieces += split.end()
    want = [*whole.add(text), *whole.end()]
    assert "".join(piece.text for piece in pieces) == text

    def letters(some: list) -> list[tuple[str, bool]]:  # type: ignore[type-arg]
        return [(letter, piece.thought) for piece in some for letter in piece.text]

    assert letters(pieces) == letters(want)


def test_an_answer_that_begins_inside_a_thought() -> None:
    thoughts = Thoughts(opened=True)
    pieces = [*thoughts.add("so 4</th"), *thoughts.add("ink>4"), *thoughts.end()]
    assert [(piece.text, piece.thought) for piece in pieces] == [("so 4", True), ("</think>", True), ("4", False)]
