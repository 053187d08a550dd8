"""Text to token ids and back, from the files beside a checkpoint; no code of the checkpoint is ever run."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

from deepseek_compress.errors import DscError

TEMPLATE_SECONDS = 10.0  # a chat template is a program of the checkpoint's


class Tokenizer:
    """The tokenizer of a checkpoint directory."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        self.path = path
        file = path / "tokenizer.json"
        if not file.is_file():
            raise DscError(f"{file}: no such file", "a tokenizer.json must lie beside the checkpoint")
        try:
            self._fast = Fast.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise DscError(f"{file}: {error}", "download the file again") from None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`; with `special`, what the tokenizer adds at the ends (BOS) too."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=special).ids
        return ids

    def encode_many(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        return [item.ids for item in self._fast.encode_batch(list(texts), add_special_tokens=special)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=skip_special)
        return text

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._fast.get_vocab_size())

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text: generation_config.json, else config.json, else the tokenizer's own eos_token."""
        for name in ("generation_config.json", "config.json"):
            value = self.document(name).get("eos_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (int(value),)
        token = self.document("tokenizer_config.json").get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        found = self._fast.token_to_id(text) if isinstance(text, str) else None
        return () if found is None else (int(found),)

    @cached_property
    def bos_id(self) -> int | None:
        """The id that starts a text, where the model has one."""
        value = self.document("config.json").get("bos_token_id")
        return None if value is None else int(value)

    @cached_property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint says how messages become a prompt."""
        return (self.path / "chat_template.jinja").is_file() or "chat_template" in self.document(
            "tokenizer_config.json"
        )

    def chat(self, messages: Sequence[dict[str, str]], answer_next: bool = False) -> str:
        """The prompt of `messages` ({"role", "content"}) by the checkpoint's own template.

        `answer_next` ends it where the model's answer begins. Without a template: the contents, one a line. Raises
        DscError for messages that the template refuses.
        """
        if not self.has_chat_template:
            return "\n".join(message["content"] for message in messages)
        template = self._transformers.apply_chat_template
        try:
            with _at_most(TEMPLATE_SECONDS):
                return str(template(messages, tokenize=False, add_generation_prompt=answer_next))
        except Exception as error:  # a program of the checkpoint's, which raises whatever it likes
            what = f"the chat template of {self.path} refuses: {' '.join(str(error).split())[:200]}"
            raise DscError(what, "give other roles or another order") from None

    @cached_property
    def _transformers(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(self.path))

    def document(self, name: str) -> dict[str, Any]:
        """A JSON file beside the tokenizer; nothing in it where there is none. Raises DscError for what is no JSON."""
        file = self.path / name
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise DscError(f"{file}: not valid JSON ({error})", "download the file again") from None
        return found if isinstance(found, dict) else {}


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside after so long, where the system has the timer: a template may loop."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not finished after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer beside the checkpoint at `path`. Raises DscError where there is none."""
    return Tokenizer(Path(path))
