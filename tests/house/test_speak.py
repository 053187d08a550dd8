"""dsc generate and dsc chat as a person meets them."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_compress.checkpoint.files import write_sealed
from deepseek_compress.cli import speak
from deepseek_compress.generation.sampling import Sampling
from deepseek_compress.generation.speaker import Answer, Prompt, Speaker
from deepseek_compress.generation.text import Piece
from deepseek_compress.models.resolve import resolve_model
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.tasks import mixture
from tests.export.conftest import write_quantised
from tests.house.conftest import Dsc
from tests.house.test_cli import dsc_process, errors

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture
def talker(tiny_llama: Path, tmp_path: Path) -> Path:
    """A Llama with a chat template."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "talker"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def expected(model: Path, prompt: str, count: int, special: bool) -> str:
    tokenizer = load_tokenizer(model)
    (ids,) = Model.load(model).generate([tokenizer.encode(prompt, special=special)], count)
    return tokenizer.decode(ids, skip_special=False)


def test_the_answer_of_each_export_is_the_runtimes(dsc: Dsc, tiny_llama: Path) -> None:
    write_quantised(tiny_llama, Path("w4"), "w4a16")
    want = expected(Path("w4"), "so is that all", 12, special=True)
    for target in ("w4", "onnx", "onnxruntime", "genai", "compressed-tensors"):
        if target != "w4":
            level = ("--set", "accuracy_level=0") if target in ("onnxruntime", "genai") else ()
            shown = dsc("export", "w4", "-o", target, "--target", target, *level)
            assert shown.exit_code == 0, shown.output
            assert shown.stdout.splitlines()[-1] == f"next: dsc generate {target} --prompt TEXT"
        shown = dsc("generate", target, "--prompt", "so is that all", "--max-tokens", 12)
        assert shown.exit_code == 0, shown.output
        assert shown.stdout == want + "\n", target
        assert "sampling: greedy" in shown.stderr
        assert " tokens/s" in shown.stderr
        assert "\033" not in shown.output


def test_generate_as_json_and_from_a_file(dsc: Dsc, talker: Path) -> None:
    Path("p.txt").write_text("so is that all")
    words = ["generate", talker, "--file", "p.txt", "--max-tokens", 5, "--json"]
    found = json.loads(dsc(*words).stdout)
    assert found["text"] == expected(talker, "so is that all ", 5, special=False), "through the template"
    assert (found["tokens"], found["stopped"], found["backend"]) == (5, "length", "runtime")
    assert found["decode_tokens_per_s"] > 0
    assert found["next"].startswith("dsc chat ")
    raw = json.loads(dsc(*words, "--raw").stdout)
    assert raw["text"] == expected(talker, "so is that all", 5, special=True)
    drawn = [json.loads(dsc(*words, "--temperature", 2, "--top-k", 50, "--seed", seed).stdout) for seed in (1, 1, 2)]
    assert drawn[0]["text"] == drawn[1]["text"] != drawn[2]["text"]
    assert drawn[0]["sampling"] == {"temperature": 2.0, "top_p": 1.0, "top_k": 50, "seed": 1}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["generate", "MODEL"], "error: give one of --prompt and --file; "),
        (["generate", "MODEL", "--prompt", " "], "error: the prompt is empty; "),
        (["generate", "MODEL", "--file", "none.txt"], "error: none.txt: No such file or directory; "),
        (["generate", "MODEL", "--prompt", "a", "--top-p", "2"], "error: sampling.top_p: "),
        (["generate", "nowhere", "--prompt", "a"], "error: nowhere: no such file or directory; give a checkpoint, "),
        (["chat", "MODEL"], "error: MODEL: has no chat template; use dsc generate MODEL --prompt TEXT"),
        (["chat", "http://127.0.0.1:9"], "error: http://127.0.0.1:9/v1: no answer"),
        (["generate", "x.gguf", "--prompt", "a"], "error: x.gguf: no such file or directory; give a checkpoint, "),
        (["generate", "config.gguf", "--prompt", "a"], "error: config.gguf: no GGUF file; export it again"),
        (["generate", "edge", "--prompt", "a"], "error: edge: written for TensorRT-Edge-LLM, which alone reads these"),
    ],
)
def test_a_mistake_is_one_line(dsc: Dsc, tiny_llama: Path, words: list[str], line: str) -> None:
    Path("MODEL").symlink_to(tiny_llama)
    Path("config.gguf").write_text("{}")
    Path("edge").mkdir()
    write_sealed(Path("edge/dsc_manifest.json"), {"knobs": {"target": "edge-llm"}})
    shown = dsc(*words)
    assert shown.exit_code == 1
    (found,) = (text for text in errors(shown.stderr) if not text.startswith("sampling"))
    assert found.startswith(line)
    assert shown.stdout == ""


def test_a_chat_in_a_pipe_remembers_what_was_said(talker: Path, tmp_path: Path) -> None:
    process = dsc_process("chat", talker, "--max-tokens", 4, cwd=tmp_path, stdin="so is\n\nthat all\n")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    first = expected(talker, "so is ", 4, special=False)
    second = expected(talker, f"so is {first.strip()} that all ", 4, special=False)
    assert out == f"{first}\n{second}\n"
    assert "\033" not in out + err


@pytest.mark.parametrize(("command", "code"), [("generate", 130), ("chat", 0)])
def test_ctrl_c_stops_the_answer(talker: Path, tmp_path: Path, command: str, code: int) -> None:
    """In a chat it stops the answer alone: the next message is answered."""
    config = json.loads((talker / "config.json").read_text())
    (talker / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 30000}))
    (talker / "generation_config.json").write_text('{"eos_token_id": 511}')
    prompt = ["--prompt", "so is"] if command == "generate" else []
    process = dsc_process(
        command, talker, *prompt, "--max-tokens", 25000, cwd=tmp_path, stdin="so is\n" if not prompt else ""
    )
    assert process.stdout
    process.stdout.read(40)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert ("(stopped)" in err) == (command == "chat")


def test_a_gguf_file_answers_in_llama_cpp(dsc: Dsc) -> None:
    """The built-in model says what our runtime says; what is too long, or no chat, is one line."""
    pytest.importorskip("xllamacpp")
    shown = dsc("export", "builtin:nano", "-o", "g", "--target", "gguf")
    assert shown.stdout.splitlines()[-1] == "next: dsc generate g --prompt TEXT"
    prompt = next(iter(mixture(5, 1, split="calibration"))).prompt
    found = json.loads(dsc("generate", "g", "--prompt", prompt, "--raw", "--max-tokens", 12, "--json").stdout)
    assert found["text"].split() == expected(resolve_model("builtin:nano"), prompt, 12, special=True).split()
    assert (found["tokens"], found["stopped"], found["backend"]) == (12, "length", "llama.cpp")
    shown = dsc("generate", "g/model.gguf", "--prompt", "3 + " * 2000)
    assert shown.exit_code == 1
    (line,) = (text for text in errors(shown.stderr) if not text.startswith("sampling"))
    assert "400" in line and "exceeds the available context size" in line
    shown = dsc("chat", "g")
    assert "error: g: has no chat template; " in shown.stderr


def test_an_answer_stopped_before_its_first_word_was_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    class Slow(Speaker):
        def reply(self, prompt: Prompt, sampling: Sampling, limit: int) -> tuple[Answer, Iterator[Piece]]:
            asked.append([message["content"] for message in prompt if not isinstance(message, str)])
            if len(asked) == 1:
                raise KeyboardInterrupt
            return Answer("slow", tokens=1, stopped="end"), iter([Piece("yes", False)])

    monkeypatch.setattr("deepseek_compress.generation.targets.open_target", lambda *given: Slow())
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\nthree\n"))
    speak.chat("slow")
    assert asked == [["one"], ["two"], ["two", "yes", "three"]]


KILLED = """
import sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{"data": [{"id": "tiny"}]}')
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200); self.end_headers()
        while True:
            self.wfile.write(b'data: {"choices": [{"delta": {"content": "so "}}]}\\n\\n'); self.wfile.flush()
            time.sleep(0.05)
    def log_message(self, *args): pass
server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def test_a_server_that_is_killed_in_mid_answer(tmp_path: Path) -> None:
    server = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        process = dsc_process("generate", url, "--prompt", "hi", cwd=tmp_path)
        assert process.stdout
        assert process.stdout.read(6) == "so so "
    finally:
        server.kill()
        server.wait()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = (text for text in errors(err) if text.startswith("error: "))
    assert "broke off" in line and "after " in line and "ask again" in line


def test_memory_bounds_the_check_of_an_export(dsc: Dsc, tiny_llama: Path) -> None:
    shown = dsc("export", tiny_llama, "-o", "e", "--memory", "1KiB")
    assert shown.exit_code == 0, shown.output
    assert "not compared with the runtime: comparing a block" in shown.stderr
