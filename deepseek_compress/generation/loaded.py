"""A model that was opened for questions: one call, one answer."""

from __future__ import annotations

from typing import Any

from deepseek_compress.generation.sampling import Sampling
from deepseek_compress.generation.speaker import Answer, Prompt, Speaker
from deepseek_compress.registry import build


class Loaded:
    """Model that `dsc.load` returns: `generate` answers, `last` has the statistics of the last answer."""

    def __init__(self, speaker: Speaker) -> None:
        self.speaker = speaker
        self.last: Answer | None = None

    def generate(
        self, prompt: Prompt, *, max_tokens: int = 512, raw: bool = False, greedy: bool = False, **sampling: Any
    ) -> str:
        """Answer a text, or messages `[{"role": "user", "content": TEXT}]`.

        A text goes through the chat template where the model has one, unless `raw`. `sampling`: temperature, top_p,
        top_k, seed; the model's own where none is given. Raises `DscError`.
        """
        chat = isinstance(prompt, str) and self.speaker.has_chat and not raw
        asked: Prompt = [{"role": "user", "content": str(prompt)}] if chat else prompt
        self.last, pieces = self.speaker.reply(asked, choose_sampling(self.speaker, sampling, greedy), max_tokens)
        return "".join(piece.text for piece in pieces)


def check_sampling(given: dict[str, Any]) -> None:
    """Raise `DscError` for values that no model takes, before one is loaded."""
    build(Sampling, given, "sampling")


def choose_sampling(speaker: Speaker, given: dict[str, Any], greedy: bool = False) -> Sampling:
    """Return the model's own settings, changed by what was given: a share or count alone means that it samples."""
    check_sampling(given)
    if greedy:
        return Sampling(seed=given.get("seed", 0))
    if {"top_p", "top_k"} & set(given) and not speaker.defaults.temperature:
        given = {"temperature": 1.0, **given}
    return speaker.defaults.model_copy(update=given)
