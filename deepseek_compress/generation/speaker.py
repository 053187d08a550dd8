"""Something that answers: a prompt or messages in, pieces of text out, with the time each took."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_compress.errors import DscError
from deepseek_compress.generation.backends import Backend
from deepseek_compress.generation.sampling import Sampler, Sampling
from deepseek_compress.generation.text import OPEN, Detokenizer, Piece, Thoughts
from deepseek_compress.models.tokenizer import Tokenizer
from deepseek_compress.registry import build

Prompt = str | Sequence[dict[str, str]]  # plain text, or messages for the chat template


@dataclass
class Answer:
    """Answer to a prompt; complete when its pieces are all taken."""

    backend: str
    prompt_tokens: int = 0
    tokens: int = 0  # made, the one that ended it included
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    stopped: str = "interrupted"  # or "end", "length"

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first over the time they took."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 and self.decode_seconds else None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Tokens of the prompt over the time until the first token."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    def facts(self) -> dict[str, Any]:
        """For a report."""
        rates = {name: getattr(self, name) for name in ("prefill_tokens_per_s", "decode_tokens_per_s")}
        return {**self.__dict__, **rates}

    def __str__(self) -> str:
        parts = [f"{self.tokens} tokens"]
        parts += [f"{self.decode_tokens_per_s:.1f} tokens/s"] if self.decode_tokens_per_s else []
        parts += [f"prompt of {self.prompt_tokens} in {self.prefill_seconds:.2f} s", self.backend]
        return ", ".join(parts) + (" (limit reached: --max-tokens)" if self.stopped == "length" else "")


class Speaker(ABC):
    """A target that was opened. `note`: what to tell the user about the choice that was made."""

    note: str = ""
    defaults: Sampling = Sampling()  # the model's own settings
    has_chat: bool = True

    def prepare(self) -> None:  # noqa: B027 - most have nothing to do
        """Load what the first message needs, so that it does not wait for that."""

    @abstractmethod
    def reply(self, prompt: Prompt, sampling: Sampling, limit: int) -> tuple[Answer, Iterator[Piece]]:
        """Return the answer to be, and its pieces as they come: at most `limit` tokens."""


class Local(Speaker):
    """A backend in this process with its tokenizer."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, note: str = "") -> None:
        self.backend, self.tokenizer, self.note = backend, tokenizer, note
        self.defaults = published_sampling(tokenizer)
        self.has_chat = tokenizer.has_chat_template

    def prepare(self) -> None:
        """Import the template's library, which takes seconds."""
        self.tokenizer.chat([{"role": "user", "content": "."}], answer_next=True)

    def reply(self, prompt: Prompt, sampling: Sampling, limit: int) -> tuple[Answer, Iterator[Piece]]:
        """As `Speaker`. Raises `DscError` for a prompt that is empty or longer than the context."""
        text = prompt if isinstance(prompt, str) else self.tokenizer.chat([*prompt], answer_next=True)
        ids = self.tokenizer.encode(text, special=isinstance(prompt, str))
        if not text.strip() or not ids:
            raise DscError("the prompt is empty", "give --prompt TEXT, or --file FILE")
        most = self.backend.context
        if most is not None and len(ids) >= most:
            what = f"the prompt has {len(ids)} tokens, {self.backend.name} holds {most} with the answer"
            raise DscError(what, "give a shorter one, or begin a new session")
        answer = Answer(self.backend.name, len(ids))
        limit = limit if most is None else min(limit, most - len(ids))
        opened = text.rstrip().endswith(OPEN) and not isinstance(prompt, str)
        return answer, self._pieces(answer, ids, Sampler(sampling), limit, Thoughts(opened))

    def _pieces(
        self, answer: Answer, ids: Sequence[int], choose: Sampler, limit: int, thoughts: Thoughts
    ) -> Iterator[Piece]:
        words = Detokenizer(lambda some: self.tokenizer.decode(some, skip_special=False))
        began = time.perf_counter()
        token = choose(self.backend.prefill(ids))
        answer.prefill_seconds = time.perf_counter() - began
        while True:
            answer.tokens += 1
            if token in self.tokenizer.eos_ids:
                answer.stopped = "end"
                break
            yield from thoughts.add(words.add(token))
            if answer.tokens == limit:
                answer.stopped = "length"
                break
            began = time.perf_counter()
            token = choose(self.backend.step(token))
            answer.decode_seconds += time.perf_counter() - began
        yield from thoughts.add(words.end())
        yield from thoughts.end()


def published_sampling(tokenizer: Tokenizer) -> Sampling:
    """Return what generation_config.json says; greedy where it does not sample."""
    found = tokenizer.document("generation_config.json")
    if not found.get("do_sample"):
        return Sampling()
    names = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    values = {name: usual if found.get(name) is None else found[name] for name, usual in names.items()}
    return build(Sampling, values, "generation_config.json")
