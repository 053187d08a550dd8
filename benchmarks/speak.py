"""Tokens a second of `dsc chat`'s own loop: FP32 in torch, the same weights in 4 bits in onnxruntime, genai, llama.cpp.

    python -m benchmarks.speak MODEL EXPORT [--genai FOLDER --genai-python PYTHON] [--gguf FILE]

MODEL is a checkpoint, EXPORT its `w4a16` as target onnxruntime, FOLDER as target genai, FILE as target gguf (Q4_1),
PYTHON that of an environment with onnxruntime-genai. One thread each; the sides take turns, and the best of the rounds
counts: other work on the machine only slows down. Every side answers the same question, and must say something. Bars:
onnxruntime at least 2.5 times torch, genai at least 0.9 of onnxruntime. llama.cpp's figures are its server's own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, present
from deepseek_compress.generation.sampling import Sampling
from deepseek_compress.generation.speaker import Speaker
from deepseek_compress.generation.targets import open_target

QUESTION = [{"role": "user", "content": "Write a short story about a lighthouse keeper who finds a map."}]
COLUMNS = ["side", "decode tokens/s", "prompt tokens/s", "x torch FP32", "text begins"]
GENAI = """
import json, sys, time
from pathlib import Path
from deepseek_compress.generation.backends.genai import GenaiBackend
backend, ids, count = GenaiBackend(Path(sys.argv[1]), 1), json.loads(sys.argv[2]), int(sys.argv[3])
for _ in range(int(sys.argv[4])):
    backend.truncate(0); backend._seen = []
    began = time.perf_counter(); token = int(backend.prefill(ids).argmax()); first = time.perf_counter() - began
    tokens, began = [token], time.perf_counter()
    while len(tokens) < count:
        tokens.append(int(backend.step(tokens[-1]).argmax()))
    print(json.dumps([len(ids) / first, (count - 1) / (time.perf_counter() - began), tokens]), flush=True)
"""
LLAMA = """
import json, sys
from pathlib import Path
from tests.llama_cpp import Asked
server = Asked(Path(sys.argv[1]))
asked = {"prompt": json.loads(sys.argv[2]), "n_predict": int(sys.argv[3]), "temperature": 0, "return_tokens": True}
found = server._post("completion", {**asked, "cache_prompt": False, "ignore_eos": True})
times = found["timings"]
print(json.dumps([times["prompt_per_second"], times["predicted_per_second"], found["tokens"]]), flush=True)
"""
BARS = {"onnxruntime w4a16": ("torch FP32", 2.5), "genai w4a16": ("onnxruntime w4a16", 0.9)}


def ours(speaker: Speaker, count: int) -> tuple[float, float, str]:
    """Prompt and decode tokens a second of one greedy answer, and its beginning."""
    speaker.backend.truncate(0)  # type: ignore[attr-defined]
    speaker.backend._seen = []  # type: ignore[attr-defined]
    answer, pieces = speaker.reply(QUESTION, Sampling(), count)
    text = "".join(piece.text for piece in pieces)
    return answer.prefill_tokens_per_s or 0.0, answer.decode_tokens_per_s or 0.0, text[:40]


def apart(python: Path, script: str, model: Path, ids: list[int], count: int, decode: Any) -> tuple[float, float, str]:
    """The same by another runtime, one round in a process of its own."""
    command = [str(python), "-c", script, str(model), json.dumps(ids), str(count), "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    prompt, rate, tokens = json.loads(done.stdout)
    return prompt, rate, decode(tokens)[:40]


def main() -> None:
    """Answer, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--genai", type=Path)
    parser.add_argument("--genai-python", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    speakers = {"torch FP32": open_target(str(options.model)), "onnxruntime w4a16": open_target(str(options.export), 1)}
    tokenizer = speakers["torch FP32"].tokenizer  # type: ignore[attr-defined]
    ids = tokenizer.encode(tokenizer.chat(QUESTION, answer_next=True))
    best: dict[str, tuple[float, float, str]] = {}
    for _ in range(options.rounds):
        found = {name: ours(speaker, options.tokens) for name, speaker in speakers.items()}
        if options.genai:
            python = options.genai_python
            found["genai w4a16"] = apart(python, GENAI, options.genai, ids, options.tokens, tokenizer.decode)
        if options.gguf:
            python = Path(sys.executable)
            found["llama.cpp Q4_1"] = apart(python, LLAMA, options.gguf, ids, options.tokens, tokenizer.decode)
        for name, (prompt, rate, text) in found.items():
            before = best.get(name, (0.0, 0.0, ""))
            best[name] = max(prompt, before[0]), max(rate, before[1]), text
    assert all(text.strip() for *_, text in best.values())
    base = best["torch FP32"][1]
    rows = [
        [n, round(rate, 1), round(prompt, 1), round(rate / base, 2), text] for n, (prompt, rate, text) in best.items()
    ]
    load = [round(value, 2) for value in os.getloadavg()]
    facts = {"model": options.model.name, "prompt": len(ids), "tokens": options.tokens, "rounds": options.rounds}
    met = {name: best[name][1] >= bar * best[other][1] for name, (other, bar) in BARS.items() if name in best}
    present("speak", COLUMNS, rows, {**facts, "bars met": met, "threads": 1, "load (1, 5, 15 min)": load})


if __name__ == "__main__":
    main()
