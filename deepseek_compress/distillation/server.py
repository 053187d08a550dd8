"""Predictions of a teacher behind an OpenAI-compatible server: `prompt_logprobs` of vLLM's `/v1/completions`.

The server is sent token ids and answers, for each position, the log-probabilities of the k likeliest tokens and of the
token that follows, by id. All others are one bucket: which of them the teacher prefers is lost, and `record` tells how
much probability that is. Servers give probabilities at temperature 1 only.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import torch

from deepseek_compress.distillation.documents import Document
from deepseek_compress.distillation.words import Words
from deepseek_compress.errors import DscError

TIMEOUT = 600.0  # seconds of one answer
KEY = "OPENAI_API_KEY"


class Server:
    """A teacher that is asked over HTTP."""

    def __init__(self, url: str, count: int, vocabulary: int, model: str | None = None) -> None:
        """`url` as in http://host:8000/v1; `model` None: the first that the server names."""
        self.url, self.count, self.vocabulary = url.rstrip("/"), count, vocabulary
        self.mass = 0.0  # probability of what is kept, summed over `positions`
        self.positions = 0
        self.model = model or self._first()

    def words(self, documents: Sequence[Document], first: int) -> Words:
        """Return the likeliest tokens at every position of the documents, in order."""
        rows = [row for document in documents for row in self._document(document)]
        ids, log_probs = (torch.tensor([row[part] for row in rows]) for part in (0, 1))
        self.mass += float(log_probs.exp().sum())
        self.positions += len(rows)
        return Words(ids, log_probs, torch.full((len(rows),), self.count))

    def _document(self, document: Document) -> list[tuple[list[int], list[float]]]:
        asked = {"model": self.model, "prompt": document.ids, "max_tokens": 1, "prompt_logprobs": self.count}
        answer = self._ask("/completions", asked)
        try:
            said = answer["choices"][0]["prompt_logprobs"]
            rows = [_likeliest(place, self.count) for place in said[1:]]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            what = f"{self.url}: no prompt_logprobs in its answer"
            raise DscError(what, "serve the teacher with vLLM, which gives them") from None
        if len(rows) != len(document.ids) - 1:
            what = f"{self.url}: {len(rows)} positions for a prompt of {len(document.ids)} tokens"
            raise DscError(what, "turn off the server's cutting of prompts")
        short = min(len(ids) for ids, _ in rows)
        if short < self.count:
            what = f"{self.url}: {short} log-probabilities a position, {self.count} asked for"
            raise DscError(what, f"start it with --max-logprobs {self.count}, or set count: {short}")
        largest = max(max(ids) for ids, _ in rows)
        if largest >= self.vocabulary:
            what = f"{self.url}: says token {largest}, the tokenizer here has {self.vocabulary}"
            raise DscError(what, "name a student with the tokenizer of the teacher")
        return rows

    def _first(self) -> str:
        try:
            return str(self._ask("/models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise DscError(f"{self.url}: names no model", "set server_model") from None

    def _ask(self, path: str, body: Any = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        data = None if body is None else json.dumps(body).encode("utf-8")
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(500).decode("utf-8", "replace").split())
            raise DscError(f"{self.url}{path}: HTTP {error.code} {said}", "check the server's log") from None
        except (OSError, ValueError) as error:
            what = f"{self.url}{path}: {getattr(error, 'reason', None) or error}"
            raise DscError(what, "give the address of a running server, http://HOST:PORT/v1") from None


def _likeliest(place: dict[str, Any], count: int) -> tuple[list[int], list[float]]:
    """{id: {"logprob"}} -> ids and log-probabilities, likeliest first. The token that follows may come as one more."""
    best = sorted(((float(said["logprob"]), int(token)) for token, said in place.items()), reverse=True)[:count]
    return [token for _, token in best], [max(score, -60000.0) for score, _ in best]
