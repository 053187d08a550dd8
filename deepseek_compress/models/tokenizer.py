"""Text to token ids and back, from the files of a checkpoint; no code of the checkpoint is ever run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from deepseek_compress import limits
from deepseek_compress.checkpoint.files import read_bytes, read_json
from deepseek_compress.errors import DscError
from deepseek_compress.models.config import token_ids


class Tokenizer:
    """The tokenizer of a checkpoint directory."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        self.path = path
        file = path / "tokenizer.json"
        if not file.is_file():
            raise DscError(f"{file}: no such file", "put the model's tokenizer.json there")
        content = read_bytes(file)
        with _library_errors(str(file)):
            self._fast = Fast.from_buffer(content)
            # The file may ask for a text that is cut, or filled up to any length
            self._fast.no_truncation()
            self._fast.no_padding()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`; with `special`, what the tokenizer adds at the ends (BOS) too."""
        with _library_errors(f"{self.path}: tokenizer"):
            ids: list[int] = self._fast.encode(text, add_special_tokens=special).ids
            return ids

    def encoded(self, text: str, piece: int, special: bool = False) -> Iterator[list[int]]:
        """Yield the ids of a text of any length, `piece` characters at a time; each piece but the first begins at a
        space.

        `special`: the first has what the tokenizer adds at the ends of a text.
        """
        start = 0
        while start < len(text):
            end = start + piece
            if end < len(text):
                space = max(text.rfind(" ", start + piece // 2, end), text.rfind("\n", start + piece // 2, end))
                end = space if space > 0 else end
            yield self.encode(text[start:end], special and not start)
            start = end

    def encode_many(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        with _library_errors(f"{self.path}: tokenizer"):
            return [item.ids for item in self._fast.encode_batch(list(texts), add_special_tokens=special)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of `ids`."""
        with _library_errors(f"{self.path}: tokenizer"):
            text: str = self._fast.decode(list(ids), skip_special_tokens=skip_special)
            return text

    def token(self, index: int) -> str | None:
        """Return the vocabulary's spelling of the token of this id; None where it has none."""
        found: str | None = self._fast.id_to_token(index)
        return found

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._fast.get_vocab_size())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its tokens and their ids: equal for tokenizers whose models can be compared."""
        tokens = sorted(self._fast.get_vocab().items(), key=lambda item: (item[1], item[0]))
        return hashlib.sha256(json.dumps(tokens).encode("utf-8")).hexdigest()

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text: generation_config.json, else config.json, else the tokenizer's own eos_token."""
        for name in ("generation_config.json", "config.json"):
            value = self.document(name).get("eos_token_id")
            if value is not None:
                return token_ids(f"{self.path / name}: eos_token_id", value)
        token = self.document("tokenizer_config.json").get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        found = self._fast.token_to_id(text) if isinstance(text, str) else None
        return () if found is None else (int(found),)

    @cached_property
    def bos_id(self) -> int | None:
        """The id that starts a text, where the model has one."""
        value = self.document("config.json").get("bos_token_id")
        return None if value is None else token_ids(f"{self.path / 'config.json'}: bos_token_id", value)[0]

    @cached_property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint says how messages become a prompt."""
        return (self.path / "chat_template.jinja").is_file() or "chat_template" in self.document(
            "tokenizer_config.json"
        )

    def chat(self, messages: Sequence[dict[str, str]], answer_next: bool = False) -> str:
        """Return the prompt of `messages` ({"role", "content"}) by the checkpoint's own template.

        `answer_next` ends it where the model's answer begins. Without a template: the contents, one a line. Raises
        DscError for messages that the template refuses.
        """
        if not self.has_chat_template:
            return "\n".join(message["content"] for message in messages)
        template = self._transformers.apply_chat_template
        try:
            with limits.bounded(limits.TEMPLATE_SECONDS, limits.TEMPLATE_BYTES):
                text = str(template(messages, tokenize=False, add_generation_prompt=answer_next))
        except Exception as error:  # a program of the checkpoint's, which raises whatever it likes
            said = " ".join(str(error).split())[:200] or type(error).__name__
            what = f"the chat template of {self.path} refuses: {said}"
            raise DscError(what, "give other roles or another order") from None
        if not text.strip():
            raise DscError(f"the chat template of {self.path} renders no text", "remove it, or download it again")
        return text

    @cached_property
    def _transformers(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        with _library_errors(f"{self.path}: tokenizer files"):
            return PreTrainedTokenizerFast.from_pretrained(str(self.path))

    def document(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the tokenizer's directory, empty where there is none. Raises DscError for invalid
        JSON."""
        file = self.path / name
        return read_json(file) if file.is_file() else {}


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turn what a tokenizer library raises into one line; a panic of its native code is no Exception."""
    try:
        yield
    except (DscError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise DscError(f"{what}: {said}", "download the file again") from None


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of the checkpoint at `path`. Raises DscError where there is none."""
    return Tokenizer(Path(path))
