"""A verifier of the user's own: its verdicts, and one line for each way in which it fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_compress.distillation.user_verifier import UserVerifier
from deepseek_compress.errors import DscError

CODE = """
import sys, time
from beside import LIMIT
def verify(question, answer, completion):
    print("noise on standard output")
    if question == "raise": raise KeyError("x")
    if question == "exit": sys.exit(3)
    if question == "die": import os; os._exit(1)
    if question == "hang": time.sleep(60)
    if question == "odd": return {"a": 1}
    if question == "steps": return len(completion) < LIMIT, 2, 3
    return completion == answer
"""


@pytest.fixture
def verifier(tmp_path: Path) -> Iterator[UserVerifier]:
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "beside.py").write_text("LIMIT = 4\n")
    found = UserVerifier(f"{tmp_path / 'mine.py'}:verify", seconds=5.0)
    yield found
    found.close()


def test_verdicts(verifier: UserVerifier) -> None:
    assert verifier("a:1", "q", "4", "4") == (True, 0, 0)
    assert verifier("a:2", "q", "4", "5") == (False, 0, 0)
    assert verifier("a:3", "steps", "", "123") == (True, 2, 3)
    assert verifier("a:4", "steps", "", "1234 \n ü") == (False, 2, 3)


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("raise", r"raised KeyError: 'x' at a\.jsonl:7"),
        ("exit", r"raised SystemExit: 3 at a\.jsonl:7"),
        ("die", r"ended at a\.jsonl:7"),
        ("odd", r"returned .* at a\.jsonl:7, not True, False"),
    ],
)
def test_failures_are_one_line(question: str, said: str, verifier: UserVerifier) -> None:
    with pytest.raises(DscError, match=rf"mine\.py:verify {said}"):
        verifier("a.jsonl:7", question, "", "")
    assert verifier("a:1", "q", "4", "4") == (True, 0, 0), "the next call starts it again"


def test_one_that_never_ends_is_stopped(verifier: UserVerifier) -> None:
    assert verifier("a:1", "q", "4", "4") == (True, 0, 0)
    verifier.seconds = 0.5
    with pytest.raises(DscError, match=r"gave no verdict within 0\.5 s at a:2"):
        verifier("a:2", "hang", "", "")


def test_what_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(: pass")
    with pytest.raises(DscError, match=r"bad\.py:f cannot be loaded: SyntaxError"):
        UserVerifier(f"{tmp_path / 'bad.py'}:f", 5.0)("a:1", "", "", "")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(DscError, match=r"cannot be loaded: AttributeError"):
        UserVerifier(f"{tmp_path / 'empty.py'}:f", 5.0)("a:1", "", "", "")
    with pytest.raises(DscError, match="names no function; write it as"):
        UserVerifier("bad.py", 5.0)
    with pytest.raises(DscError, match="no such file"):
        UserVerifier("nowhere.py:f", 5.0)
