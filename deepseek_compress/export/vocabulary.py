"""A byte-level BPE tokenizer.json as GGUF's metadata.

llama.cpp has its own code for how text is cut before the merges and chooses it by a name, `tokenizer.ggml.pre`. Here
the name follows from the rules in tokenizer.json, compared word for word; rules that are not in `CUTS` are refused,
since a wrong name gives other tokens without a message. Source: llama.cpp, convert_hf_to_gguf.py, src/llama-vocab.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_compress.errors import DscError
from deepseek_compress.models.tokenizer import Tokenizer, load_tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {  # rules of the pre-tokenizer -> llama.cpp's name
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    ("each digit", "gpt-2"): "smollm",
    ("gpt-2",): "gpt-2",
}
DEEPSEEK = "<｜begin▁of▁sentence｜>"  # R1-Distill-Qwen cuts as Qwen2 does and has a name of its own


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp must know of a tokenizer."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos: int | None
    eos: int | None
    adds_bos: bool
    template: str | None

    def describe(self, writer: Any) -> None:
        """Add it to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        if self.bos is not None:
            writer.add_bos_token_id(self.bos)
        if self.eos is not None:
            writer.add_eos_token_id(self.eos)
        writer.add_add_bos_token(self.adds_bos)
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer beside a checkpoint whose embedding has `size` rows; rows without a token are unused ones.

    Raises `DscError` for a tokenizer that is not byte-level BPE, or is cut in a way llama.cpp has no known name for.
    """
    tokenizer = load_tokenizer(folder)
    document = tokenizer.document("tokenizer.json")
    model, added = document["model"], document.get("added_tokens") or []
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "BPE with byte fallback" if model.get("byte_fallback") else model.get("type")
        raise DscError(f"{folder}: a tokenizer of type {kind} has no GGUF form here", "export onnx or onnxruntime")
    known = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
    largest = max(known.values())
    if largest >= size:
        raise DscError(f"{folder}: token {largest} has no row in an embedding of {size}", "check the tokenizer's files")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for word, index in known.items():
        tokens[index], types[index] = word, NORMAL
    for token in added:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    cut = tuple(_rules(document.get("pre_tokenizer") or {}))
    if cut not in CUTS:
        raise DscError(f"{folder}: llama.cpp has no known name for its pre-tokenizer", "export onnx or onnxruntime")
    name = "deepseek-r1-qwen" if CUTS[cut] == "qwen2" and DEEPSEEK in known else CUTS[cut]
    ends, (bos, adds_bos) = tokenizer.eos_ids, _first(tokenizer, known)
    return Vocabulary(
        pre=name,
        tokens=tokens,
        types=types,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        bos=bos,
        eos=ends[0] if ends else None,
        adds_bos=adds_bos,
        template=_template(tokenizer),
    )


def _rules(step: dict[str, Any]) -> list[str]:
    """The rules of a pre-tokenizer in order; mapping bytes to letters is none."""
    kind = step.get("type")
    if kind == "Sequence":
        return [rule for inner in step["pretokenizers"] for rule in _rules(inner)]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return ["gpt-2"] if step.get("use_regex", True) else []
    if kind == "Digits" and step.get("individual_digits"):
        return ["each digit"]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return [str(step["pattern"].get("Regex"))]
    return [f"another rule: {kind}"]


def _first(tokenizer: Tokenizer, known: dict[str, int]) -> tuple[int | None, bool]:
    """The token that starts a text, and whether the tokenizer adds it. config.json comes last: R1-Distill-Qwen's names
    the token that ends one."""
    special = tokenizer.encode("a", special=True)
    if special[:1] != tokenizer.encode("a")[:1]:
        return special[0], True
    token = tokenizer.document("tokenizer_config.json").get("bos_token")
    text = token.get("content") if isinstance(token, dict) else token
    return known.get(str(text), tokenizer.bos_id), False


def _template(tokenizer: Tokenizer) -> str | None:
    """The chat template, where there is one: a file of its own, or a string in tokenizer_config.json."""
    file = tokenizer.path / "chat_template.jinja"
    found = (
        file.read_text(encoding="utf-8")
        if file.is_file()
        else tokenizer.document("tokenizer_config.json").get("chat_template")
    )
    return found if isinstance(found, str) else None
