"""Questions of the user's: JSON Lines or Parquet whose entries have `question` and `answer`, and perhaps `choices`.

    {"question": "...", "answer": "... <<48/2=24>> ...\\n#### 24"}        GSM8K: the chain, then the answer
    {"question": "...", "answer": "... \\\\boxed{3/4}"}                    MATH
    {"question": "...", "choices": ["red", "green"], "answer": "B"}       a letter, a number from 0, or the words
    {"question": "...", "answer": "42"}                                   the answer alone

`problem` or `prompt` may stand for `question`, `solution` or `target` for `answer`. Entries that do not serve are
reported together, with file and line.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from deepseek_compress import limits
from deepseek_compress.checkpoint.files import open_regular
from deepseek_compress.errors import DscError, raise_problems
from deepseek_compress.tasks import answers
from deepseek_compress.tasks.arithmetic import equations, holds
from deepseek_compress.tasks.problem import Problem, Verdict

QUESTION, ANSWER = ("question", "problem", "prompt"), ("answer", "solution", "target")
FORM = '{"question": "...", "answer": "..."}, with "choices": [...] where there are some'
KIND = "file"
REPORTED = 20  # malformed entries of a file


def read_questions(path: Path, most: int | None = None) -> list[Problem]:
    """Return the first `most` questions of a file, all of them for None.

    Raises `Problems` with every malformed entry, and DscError for a file that holds none.
    """
    if not path.is_file():
        raise DscError(f"{path}: no such file", "give a .jsonl or .parquet file of questions and answers, or builtin")
    found, bad = [], []
    for origin, entry in entries(path):
        try:
            if isinstance(entry, DscError):
                raise entry
            found.append(problem_of(origin, entry, path.name.partition(".")[0]))
        except DscError as error:
            bad.append(error)
            if len(bad) == REPORTED:
                break
        if most is not None and len(found) == most:
            break
    raise_problems(bad)
    if not found:
        raise DscError(f"{path}: no questions in it", f"each line must be {FORM}")
    return found


def problem_of(origin: str, entry: Any, family: str) -> Problem:
    """One entry as a problem. Raises DscError naming `origin`."""
    if not isinstance(entry, Mapping):
        raise DscError(f"{origin}: not a JSON object", f"each line must be {FORM}")
    question, answer = (next((entry[k] for k in keys if entry.get(k) is not None), None) for keys in (QUESTION, ANSWER))
    if not isinstance(question, str) or not question.strip() or not isinstance(answer, str | int | float):
        given = ", ".join(map(repr, entry))[:200] or "none"
        raise DscError(f"{origin}: found the keys {given}", f"each line must be {FORM}")
    choices = _choices(origin, entry.get("choices"))
    written = str(answer).strip()
    for text in (question, written, *choices):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DscError(f"{origin}: an unpaired UTF-16 surrogate", "write the text as UTF-8")
    if choices:
        reference = _chosen(origin, answer, choices)
        listed = "\n".join(f"{letter}. {words}" for letter, words in zip(answers.LETTERS, choices, strict=False))
        meta = {"choices": choices, "solution": reference}
        return Problem(family, KIND, f"{question.strip()}\n\n{listed}", (), reference, meta)
    reference = answers.final_answer(written) or ""
    if not reference:
        raise DscError(f"{origin}: the answer is empty", "give the right answer")
    return Problem(family, KIND, question.strip(), (), reference, {"solution": written})


def judge(problem: Problem, completion: str, scorer: str = "numbers") -> Verdict:
    """Whether the answer is the reference's, and which of the chain's arithmetic steps hold.

    `scorer`: `numbers` as the module `answers` says; `strict` and `flexible` as lm-evaluation-harness scores GSM8K.
    """
    choices = problem.meta.get("choices", ())
    if scorer == "numbers" or choices:
        answer = answers.final_answer(completion, choices)
        exact = answers.equal(answer, problem.answer, choices)
    else:
        answer = (answers.strict if scorer == "strict" else answers.flexible)(completion)
        exact = answers.harness_equal(answer, problem.solution)
    steps = [holds(*step) for step in equations(completion)]
    wrong = next((number for number, good in enumerate(steps) if not good), None)
    midway = not exact and not choices and answers.mentioned(completion, problem.answer)
    return Verdict(exact, float(exact), sum(steps), len(steps), wrong, answer, midway)


def _choices(origin: str, given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    given = given.get("text") if isinstance(given, Mapping) else given  # ARC's {"text": [...], "label": [...]}
    good = isinstance(given, list) and all(isinstance(words, str) and words.strip() for words in given)
    if not good or not 2 <= len(given) <= len(answers.LETTERS):
        what = f"{origin}: choices must be 2 to {len(answers.LETTERS)} texts"
        raise DscError(what, f"each line must be {FORM}")
    return tuple(words.strip() for words in given)


def _chosen(origin: str, answer: Any, choices: tuple[str, ...]) -> str:
    """Return the letter of the right choice."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answers.LETTERS[answer]
    text = str(answer).strip()
    letters = answers.LETTERS[: len(choices)]
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    same = [letter for letter, words in zip(letters, choices, strict=True) if words.casefold() == text.casefold()]
    if len(same) != 1:
        raise DscError(
            f"{origin}: the answer {text[:40]!r} is not one of the choices", f"give one of {', '.join(letters)}"
        )
    return same[0]


def entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, entry) of a file; the error of one that cannot be decoded in its place."""
    if path.suffix == ".parquet":
        from deepseek_compress.calibration.parquet import read_rows

        for number, row in read_rows(path, (*QUESTION, *ANSWER, "choices"), FORM):
            yield f"{path}: row {number}", row
        return
    with io.BufferedReader(cast(io.RawIOBase, open_regular(path))) as file:
        for number, line in enumerate(iter(lambda: file.readline(limits.LINE_BYTES + 1), b""), start=1):
            origin = f"{path}:{number}"
            if len(line) > limits.LINE_BYTES:
                yield origin, DscError(f"{origin}: a line of more than {limits.LINE_BYTES >> 20} MiB", "cut it")
                return
            if line.strip():
                try:
                    yield origin, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    yield origin, DscError(f"{origin}: not UTF-8 text ({error.reason})", "give JSON Lines")
                except (ValueError, RecursionError) as error:
                    yield origin, DscError(f"{origin}: not valid JSON ({error})", f"each line must be {FORM}")
