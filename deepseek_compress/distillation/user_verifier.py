"""A verifier of the user's own.

    def verify(question: str, answer: str, completion: str) -> bool | tuple[bool, int, int]

True or False says whether the completion's answer is right; with two numbers, how many of its steps hold and how many
it writes.
"""

from __future__ import annotations

from typing import Any

from deepseek_compress.user_code import UserFunction


class UserVerifier(UserFunction):
    """Judges completions."""

    option, gives, forms = "--verifier", "verdict", "True, False or (bool, valid, written)"

    def __call__(self, origin: str, question: str, answer: str, completion: str) -> tuple[bool, int, int]:
        """(right, steps that hold, steps). Raises DscError where it raises, does not end, or says something else."""
        value = self.value(origin, question, answer, completion)
        verdict = _verdict(value)
        if verdict is None:
            raise self.refused(value, origin)
        return verdict


def _verdict(value: Any) -> tuple[bool, int, int] | None:
    if isinstance(value, bool):
        return value, 0, 0
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], bool):
        right, valid, written = value
        if all(type(count) is int for count in (valid, written)) and 0 <= valid <= written:
            return right, valid, written
    return None
