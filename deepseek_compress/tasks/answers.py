"""The final answer of a completion, and whether it is the reference's: `####`, `\\boxed{}`, a choice, a number.

What is read is the text after the chain of thought. In this order: the last `\\boxed{...}`, what follows the last
`####`, what follows the last "answer is"; of a question with choices a letter; else the last number. Two answers are
equal where both are numbers of equal value (`1,000.0` and `$1000`), or the same words whatever their case and spaces.
An unclosed `<think>` has no answer: a model that was cut in its thoughts did not answer.

`strict` and `flexible` are the two filters of lm-evaluation-harness for GSM8K, to compare with its figures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from deepseek_compress.tasks.arithmetic import NUMBER, number
from deepseek_compress.tasks.vocabulary import END_THINK, THINK

LETTERS = "ABCDEFGHIJ"
READ = 1 << 16  # characters at the end of a completion that are read
_BOXED = "\\boxed{"
_NUMBER = re.compile(rf"-?\$?{NUMBER}%?(?:/\d+)?")
_SAYS = re.compile(r"answer(?:\s+is)?\s*[:=]?\s*([^\n]{1,200})", re.IGNORECASE)
_LETTER = re.compile(rf"(?<![A-Za-z])\(?([{LETTERS}])\)?(?![A-Za-z])")
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def spoken(text: str) -> str | None:
    """Return what comes after the chain of thought; None where the chain was begun and not closed."""
    _, closed, after = text.rpartition(END_THINK)
    if closed:
        return after
    return None if THINK in text else text


def final_answer(text: str, choices: Sequence[str] = ()) -> str | None:
    """Return the answer that a completion gives, None where it gives none."""
    said = spoken(text[-READ:] if END_THINK in text[-READ:] else text)
    if said is None:
        return None
    said = said[-READ:]
    marked = boxed(said) or _after_hashes(said)
    if choices:
        return _choice(marked or _last(_SAYS, said) or said, choices)
    if marked:
        return marked
    stated = _last(_SAYS, said)
    found = _NUMBER.findall(stated or "") or _NUMBER.findall(said)
    if stated and not _NUMBER.search(stated):
        return stated.strip().strip("*. ") or None
    return (found[0] if stated and _NUMBER.search(stated) else found[-1]) if found else said.strip() or None


def equal(answer: str | None, reference: str, choices: Sequence[str] = ()) -> bool:
    """Whether an answer is the reference's."""
    if answer is None:
        return False
    if choices:
        return _choice(answer, choices) == _choice(reference, choices)
    mine, theirs = number(_bare(answer)), number(_bare(reference))
    if mine is not None and theirs is not None:
        return mine == theirs
    return _bare(answer) == _bare(reference)


def boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{...}` whose braces are balanced."""
    at = text.rfind(_BOXED)
    while at >= 0:
        depth, start = 1, at + len(_BOXED)
        for end in range(start, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if not depth:
                return text[start:end].strip() or None
        at = text.rfind(_BOXED, 0, at)
    return None


def mentioned(text: str, reference: str) -> bool:
    """Whether a chain of thought held the right answer: it was boxed, stated, or stood behind an equals sign."""
    if boxed(text) is not None and equal(boxed(text), reference):
        return True
    stated = [found for said in _SAYS.findall(text) for found in _NUMBER.findall(said)[:1]]
    results = re.findall(rf"=\s*(-?\$?{NUMBER}%?)(?!\s*[-+*/]\s*\d)", text)
    return any(equal(found, reference) for found in [*stated, *results])


def strict(text: str) -> str:
    """lm-evaluation-harness's `strict-match` of GSM8K."""
    found = _STRICT.search(text)
    return found[1].strip() if found else "[invalid]"


def flexible(text: str) -> str:
    """lm-evaluation-harness's `flexible-extract` of GSM8K."""
    found = [next(filter(None, groups), "") for groups in _FLEXIBLE.findall(text)]
    return found[-1].strip() if found else "[invalid]"


def harness_equal(answer: str, reference: str) -> bool:
    """lm-evaluation-harness's `exact_match` with the settings of GSM8K."""
    return _harness(answer) == _harness(reference)


def _harness(text: str) -> str:
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def _bare(text: str) -> str:
    text = text.strip().strip("$*").replace("\\$", "").replace("\\%", "%").rstrip(".").strip()
    fraction = re.fullmatch(r"(-?)\\d?frac\{(-?\d+)\}\{(-?\d+)\}", text)
    return f"{fraction[1]}{fraction[2]}/{fraction[3]}" if fraction else " ".join(text.split()).casefold()


def _after_hashes(text: str) -> str | None:
    _, found, after = text.rpartition("####")
    return (after.strip().splitlines() or [""])[0].strip() or None if found else None


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1].strip() or None if found else None


def _choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of a choice: written as one, or as the choice's own words."""
    for letter, words in zip(LETTERS, choices, strict=False):
        if _bare(text) == _bare(words):
            return letter
    found = [letter for letter in _LETTER.findall(text) if LETTERS.index(letter) < len(choices)]
    if found:
        return str(found[0] if len(text) < 40 else found[-1])
    named = [letter for letter, words in zip(LETTERS, choices, strict=False) if words.casefold() in text.casefold()]
    return named[0] if len(named) == 1 else None
