"""An OpenAI-compatible server (vLLM, llama-server, TensorRT-LLM): it has the tokenizer, the template and the loop."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from deepseek_compress.errors import DscError
from deepseek_compress.generation.sampling import Sampling
from deepseek_compress.generation.speaker import Answer, Prompt, Speaker
from deepseek_compress.generation.text import Piece, Thoughts

PATIENCE = 300.0  # seconds without a byte
DATA = "data:"


class Server(Speaker):
    """`url`: http://host:port, with or without /v1. It is asked for its model's name once."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        with self._open("models") as answer:
            try:
                self.model = str(json.load(answer)["data"][0]["id"])
                self.name = f"{self.model} at {self.url}"
            except (ValueError, LookupError, TypeError):
                raise DscError(
                    f"{self.url}/models: no list of models", "give the address of an OpenAI server"
                ) from None

    def reply(self, prompt: Prompt, sampling: Sampling, limit: int) -> tuple[Answer, Iterator[Piece]]:
        """As `Speaker`; tokens are those the server counts, or the pieces it sends."""
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise DscError("the prompt is empty", "give --prompt TEXT, or --file FILE")
        asked: dict[str, Any] = {
            "model": self.model, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": limit,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed,
        }  # fmt: skip
        asked |= {"top_k": sampling.top_k} if sampling.top_k else {}
        asked |= {"prompt": prompt} if isinstance(prompt, str) else {"messages": [*prompt]}
        answer = Answer(self.name)
        return answer, self._pieces(answer, "completions" if isinstance(prompt, str) else "chat/completions", asked)

    def _pieces(self, answer: Answer, road: str, asked: Mapping[str, Any]) -> Iterator[Piece]:
        thoughts, began, first = Thoughts(), time.perf_counter(), 0.0
        for event in self._events(road, asked, answer):
            usage = event.get("usage") or {}
            answer.prompt_tokens = int(usage.get("prompt_tokens") or answer.prompt_tokens)
            for choice in event.get("choices") or []:
                delta = choice.get("delta") or {}
                thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
                text = delta.get("content") or choice.get("text") or ""
                if (thought or text) and not first:
                    first = time.perf_counter()
                    answer.prefill_seconds = first - began
                answer.tokens += bool(thought or text)
                answer.decode_seconds = time.perf_counter() - first if first else 0.0
                if choice.get("finish_reason"):
                    answer.stopped = "length" if choice["finish_reason"] == "length" else "end"
                yield from [Piece(thought, True)] if thought else []
                yield from thoughts.add(text)
            answer.tokens = int(usage.get("completion_tokens") or answer.tokens)
        yield from thoughts.end()
        if answer.stopped == "interrupted":
            raise self._broken(answer, "broke off")

    def _events(self, road: str, asked: Mapping[str, Any], answer: Answer) -> Iterator[dict[str, Any]]:
        with self._open(road, asked) as stream:
            try:
                for raw in stream:
                    line = raw.decode("utf-8", "replace").strip()
                    if line == f"{DATA} [DONE]":
                        return
                    if line.startswith(DATA):
                        event = json.loads(line.removeprefix(DATA))
                        if "error" in event:
                            raise self._broken(answer, f"says {str(event['error'])[:200]!r}")
                        yield event
            except (OSError, http.client.HTTPException) as error:
                raise self._broken(answer, f"broke off ({error or type(error).__name__})") from None
            except ValueError:
                raise self._broken(answer, "sent what is not JSON") from None

    def _broken(self, answer: Answer, what: str) -> DscError:
        return DscError(f"{self.url} {what} after {answer.tokens} tokens", "see the server's log, then ask again")

    def _open(self, road: str, asked: Mapping[str, Any] | None = None) -> Any:
        data = None if asked is None else json.dumps(asked).encode()
        request = urllib.request.Request(f"{self.url}/{road}", data, {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=PATIENCE)
        except urllib.error.HTTPError as error:
            said = f"{self.url}/{road}: {error.code} {_message(error.read(4000))}"
            raise DscError(said, "give a shorter prompt where that is too long, else see the server's log") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            what = getattr(error, "reason", None) or error or type(error).__name__
            raise DscError(f"{self.url}: no answer ({what})", "start the server, or check the address") from None


def _message(body: bytes) -> str:
    """Return what a server says about an error: the message of OpenAI's form, else the text, on one line."""
    text = body.decode("utf-8", "replace")
    with suppress(ValueError, LookupError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:300]
