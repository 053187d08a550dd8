"""A tokenizer.json as GGUF's metadata: byte-level BPE, or whole words.

llama.cpp has its own code for how text is cut before the merges and chooses it by a name, `tokenizer.ggml.pre`. Here
the name follows from the rules in tokenizer.json, compared word for word; rules that are not in `CUTS` are refused,
since a wrong name gives other tokens without a message. Words that are cut at white space become the words of a unigram
model, each after a space ("▁add"), which gives the same tokens for known words; unknown words that begin with a known
one are cut after it. Source: llama.cpp, conversion/base.py, src/llama-vocab.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_compress.errors import DscError
from deepseek_compress.models.tokenizer import Tokenizer, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # gguf.TokenType
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (  # letters with case, as DeepSeek-V2's tokenizer.json lists them
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
CUTS = {  # rules of the pre-tokenizer -> llama.cpp's name
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    ("each digit", "gpt-2"): "smollm",
    ("gpt-2",): "gpt-2",
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
        + "\r\n"
        + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
        "[\r\n]*" + r"|\s*" + "[\r\n]+" + r"|\s+(?!\S)|\s+",
    ): "deepseek-v3",
    (
        "[\r\n]",
        rf"\s?[{_CASED}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        "each digit",
    ): "deepseek-llm",
}
SPACE = "▁"
DEEPSEEK = "<｜begin▁of▁sentence｜>"  # R1-Distill-Qwen cuts as Qwen2 does and has a name of its own


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's vocabulary in llama.cpp's terms."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos: int | None
    eos: int | None
    adds_bos: bool
    template: str | None
    unknown: int | None = None  # of whole words: the token of all others

    def describe(self, writer: Any) -> None:
        """Add it to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model("gpt2" if self.unknown is None else "t5")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.unknown is None:
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores([0.0] * len(self.tokens))
            writer.add_unk_token_id(self.unknown)
            writer.add_add_space_prefix(True)
            writer.add_remove_extra_whitespaces(True)
            writer.add_add_eos_token(False)
        if self.bos is not None:
            writer.add_bos_token_id(self.bos)
        if self.eos is not None:
            writer.add_eos_token_id(self.eos)
        writer.add_add_bos_token(self.adds_bos)
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Return the tokenizer of a checkpoint whose embedding has `size` rows; rows without a token are unused ones.

    Raises `DscError` for a tokenizer that is neither byte-level BPE nor whole words, or is cut in a way that llama.cpp
    has no known name for.
    """
    tokenizer = load_tokenizer(folder)
    document = tokenizer.document("tokenizer.json")
    model, added = document["model"], document.get("added_tokens") or []
    whole = _whole_words(document)
    if not whole and (model.get("type") != "BPE" or model.get("byte_fallback")):
        kind = "BPE with byte fallback" if model.get("byte_fallback") else model.get("type")
        raise DscError(f"{folder}: a tokenizer of type {kind} has no GGUF form here", "export onnx or onnxruntime")
    known = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
    largest = max(known.values())
    if largest >= size:
        raise DscError(f"{folder}: token {largest} has no row in an embedding of {size}", "check the tokenizer's files")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for word, index in known.items():
        tokens[index], types[index] = (SPACE if whole else "") + word, NORMAL
    for token in added:
        tokens[token["id"]], types[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    unknown = known[model["unk_token"]] if whole else None
    if unknown is not None:
        types[unknown] = UNKNOWN
    name = "default" if whole else _cut(folder, document, known)
    ends, (bos, adds_bos) = tokenizer.eos_ids, _first(tokenizer, known)
    return Vocabulary(
        pre=name,
        tokens=tokens,
        types=types,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())],
        bos=bos,
        eos=ends[0] if ends else None,
        adds_bos=adds_bos,
        template=template_of(tokenizer),
        unknown=unknown,
    )


def _whole_words(document: dict[str, Any]) -> bool:
    """Whether a text is cut at white space and each word is a token."""
    cut = (document.get("pre_tokenizer") or {}).get("type")
    return document["model"].get("type") == "WordLevel" and cut == "WhitespaceSplit" and not document.get("normalizer")


def _cut(folder: Path, document: dict[str, Any], known: dict[str, int]) -> str:
    """llama.cpp's name for the way text is cut before the merges."""
    cut = tuple(_rules(document.get("pre_tokenizer") or {}))
    if cut not in CUTS:
        raise DscError(f"{folder}: llama.cpp has no known name for its pre-tokenizer", "export onnx or onnxruntime")
    return "deepseek-r1-qwen" if CUTS[cut] == "qwen2" and DEEPSEEK in known else CUTS[cut]


def _rules(step: dict[str, Any]) -> list[str]:
    """Return the rules of a pre-tokenizer in order; mapping bytes to letters is none."""
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
    """Return the token that starts a text, and whether the tokenizer adds it. config.json comes last:
    R1-Distill-Qwen's names the token that ends one."""
    special = tokenizer.encode("a", special=True)
    if special[:1] != tokenizer.encode("a")[:1]:
        return special[0], True
    token = tokenizer.document("tokenizer_config.json").get("bos_token")
    text = token.get("content") if isinstance(token, dict) else token
    return known.get(str(text), tokenizer.bos_id), False


def template_of(tokenizer: Tokenizer) -> str | None:
    """Return the chat template, where there is one: a file of its own, or a string in tokenizer_config.json."""
    file = tokenizer.path / "chat_template.jinja"
    found = (
        file.read_text(encoding="utf-8")
        if file.is_file()
        else tokenizer.document("tokenizer_config.json").get("chat_template")
    )
    return found if isinstance(found, str) else None
