"""An OpenAI-compatible server: one of ours that answers, refuses, or dies in the middle."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from deepseek_compress.errors import DscError
from deepseek_compress.generation.backends.server import Server
from deepseek_compress.generation.sampling import Sampling
from deepseek_compress.generation.speaker import Prompt

Serve = Callable[[list[bytes], int], Server]
HI = [{"role": "user", "content": "hi"}]


def chunk(**choice: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def chat(text: str) -> bytes:
    return chunk(delta={"content": text}, finish_reason=None)


END = chunk(delta={}, finish_reason="stop")
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 9}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def asked() -> list[tuple[str, dict[str, Any]]]:
    """What the server was asked: path and body."""
    return []


@pytest.fixture
def serve(asked: list[tuple[str, dict[str, Any]]]) -> Iterator[Serve]:
    """(lines, status) -> a client of a server that sends them and then closes the connection."""
    running = []

    def start(lines: list[bytes], status: int = 200) -> Server:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"data": [{"id": "tiny"}]}')

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                asked.append((self.path, json.loads(body)))
                self.send_response(status)
                self.send_header("Content-Length", str(sum(map(len, lines)) + (0 if DONE in lines else 999)))
                self.end_headers()
                for line in lines:
                    self.wfile.write(line)

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return Server(f"http://127.0.0.1:{server.server_address[1]}/v1/")

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_an_answer(serve: Serve, asked: list[tuple[str, dict[str, Any]]]) -> None:
    server = serve([chat("<thi"), chat("nk>2</think>Gr"), chat("öße"), END, USAGE, DONE], 200)
    answer, pieces = server.reply(HI, Sampling(temperature=0.5, top_k=7, seed=3), 30)
    assert [(p.text, p.thought) for p in pieces] == [
        ("<think>", True), ("2", True), ("</think>", True), ("Gr", False), ("öße", False),
    ]  # fmt: skip
    assert (answer.stopped, answer.prompt_tokens, answer.tokens) == ("end", 5, 9)
    path, body = asked[0]
    assert path == "/v1/chat/completions"
    wanted = {"model": "tiny", "messages": HI, "max_tokens": 30, "temperature": 0.5, "top_k": 7, "seed": 3}
    assert wanted.items() <= body.items()


def test_plain_text_and_a_field_for_thoughts(serve: Serve, asked: list[tuple[str, dict[str, Any]]]) -> None:
    server = serve([chunk(text=" b", finish_reason="length"), DONE], 200)
    answer, pieces = server.reply("a", Sampling(), 1)
    assert "".join(piece.text for piece in pieces) == " b"
    assert answer.stopped == "length"
    assert asked[0][0] == "/v1/completions"
    server = serve([chunk(delta={"reasoning_content": "so"}), chat("4"), END, DONE], 200)
    assert [(p.text, p.thought) for p in server.reply(HI, Sampling(), 9)[1]] == [("so", True), ("4", False)]


@pytest.mark.parametrize(
    ("lines", "status", "said"),
    [
        ([chat("a"), chat("b")], 200, "broke off after 2 tokens"),
        ([chat("a"), DONE], 200, "broke off after 1 tokens"),
        ([chat("a"), b'data: {"error": "out of memory"}\n\n', DONE], 200, "out of memory.* after 1 tokens"),
        ([b"data: {no JSON\n\n", DONE], 200, "not JSON after 0 tokens"),
        ([b'{"message": "too long"}', DONE], 400, "400 .*too long"),
        ([b'{"error": {"message": "too\\nlong"}}'], 400, "400 too long; give a shorter prompt"),
    ],
)
def test_a_server_that_fails(serve: Serve, lines: list[bytes], status: int, said: str) -> None:
    with pytest.raises(DscError, match=said) as caught:
        list(serve(lines, status).reply(HI, Sampling(), 9)[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", ["", " \n", []])
def test_an_empty_prompt(serve: Serve, prompt: Prompt) -> None:
    with pytest.raises(DscError, match="the prompt is empty"):
        serve([], 200).reply(prompt, Sampling(), 9)


def test_no_server() -> None:
    with pytest.raises(DscError, match="no answer"):
        Server("http://127.0.0.1:9")
    with pytest.raises(DscError, match="no answer"):
        Server("http://no host")
