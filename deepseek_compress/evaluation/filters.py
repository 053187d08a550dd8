"""A filter of the user's own, between a model and those who use it.

    def check(prompt: str, answer: str | None) -> bool | str

True, or a reason, blocks; False or "" lets pass. It is asked once for each prompt (`answer` is None: the filter of what
comes in) and once for each answer (of what goes out).
"""

from __future__ import annotations

from deepseek_compress.user_code import UserFunction

SECONDS = 30.0  # that one call may take


class Filter(UserFunction):
    """Blocks prompts and answers."""

    option, gives, forms = "--filter", "answer", "True, False or a reason"

    def __call__(self, origin: str, prompt: str, answer: str | None) -> str:
        """Why it is blocked, empty where it passes. Raises DscError where the function fails or says something else."""
        value = self.value(origin, prompt, answer)
        if not isinstance(value, bool | str):
            raise self.refused(value, origin)
        return "blocked" if value is True else value or ""
