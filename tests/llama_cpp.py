"""A GGUF file in a real llama.cpp (package xllamacpp), asked in token ids."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_compress.generation.backends.llama_cpp import LlamaCpp


class Asked:
    """The server of one file."""

    def __init__(self, file: Path, threads: int = 1) -> None:
        self.speaker = LlamaCpp(file, threads)
        self.url = self.speaker.url.removesuffix("/v1")

    def tokens(self, text: str) -> list[int]:
        """As llama.cpp cuts a text, without special tokens."""
        found: list[int] = self._post("tokenize", {"content": text, "add_special": False, "parse_special": False})[
            "tokens"
        ]
        return found

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens after `ids`, the end token not among them."""
        asked = {"prompt": [*ids], "n_predict": count, "temperature": 0, "return_tokens": True}
        found: list[int] = self._post("completion", asked)["tokens"]
        return found

    def _post(self, road: str, body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{road}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
