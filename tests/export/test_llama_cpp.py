"""GGUF files in a real llama.cpp: node-llama-cpp, whose package has its binaries.

`npm install node-llama-cpp` in a directory, and DSC_LLAMA_CPP=DIRECTORY.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.export.gguf import export_gguf
from deepseek_compress.models.resolve import resolve_model
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.tasks import mixture

from .conftest import write_quantised

NODE = Path(os.environ.get("DSC_LLAMA_CPP", "no-such-directory"))
SCRIPT = """
const {module, file, prompts, texts, count} = JSON.parse(process.argv[2]);
const {getLlama, LlamaLogLevel} = await import(module);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 1});
const model = await llama.loadModel({modelPath: file, useMmap: false});
const context = await model.createContext({contextSize: 256, threads: 1, sequences: 1});
const sequence = context.getSequence(), answers = [];
for (const tokens of prompts) {
    await sequence.clearHistory();
    const made = [];
    for await (const token of sequence.evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
        made.push(token);
        if (made.length >= count) break;
    }
    answers.push(made);
}
console.log(JSON.stringify({answers, tokens: texts.map((text) => Array.from(model.tokenize(text, false)))}));
await llama.dispose();
"""
LEAD = 0.05  # over the largest |logit|
pytestmark = [
    pytest.mark.verify,
    pytest.mark.skipif(not (NODE / "node_modules").is_dir(), reason="DSC_LLAMA_CPP names no node-llama-cpp"),
]


def asked(file: Path, prompts: list[list[int]], texts: list[str], count: int = 24) -> dict[str, Any]:
    script, module = file.with_suffix(".mjs"), NODE / "node_modules" / "node-llama-cpp" / "dist" / "index.js"
    script.write_text(SCRIPT)
    given = {"module": str(module), "file": str(file), "prompts": prompts, "texts": texts, "count": count}
    done = subprocess.run(["node", script, json.dumps(given)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def clear_tokens(model: Model, prompt: list[int], made: list[int]) -> list[bool]:
    """Whether each token is ours, where ours has a clear lead; after the same tokens before it."""
    with torch.no_grad():
        logits = model.forward(torch.tensor([prompt + made]))[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    clear = (best[:, 0] - best[:, 1]) > LEAD * logits.abs().amax(-1)
    return (logits.argmax(-1) == torch.tensor(made))[clear].tolist()


@pytest.mark.parametrize("scheme", ["w4a16", None])
@pytest.mark.parametrize("family", ["tiny_v2", "tiny_v3"])
def test_it_says_what_the_runtime_says(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, scheme: str | None
) -> None:
    folder = request.getfixturevalue(family)
    source = open_checkpoint(write_quantised(folder, tmp_path / "w4", scheme) if scheme else folder)
    export_gguf(source, tmp_path / "model.gguf")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 512, (length,), generator=generator).tolist() for length in (5, 17, 90)]
    model = Model.load(source)
    same: list[bool] = []
    for prompt, made in zip(prompts, asked(tmp_path / "model.gguf", prompts, [])["answers"], strict=True):
        same += clear_tokens(model, prompt, made)
    # llama.cpp rounds the inputs of packed weights to 8 bits, which may choose other experts in a random model
    assert len(same) > 10 and sum(same) >= (0.95 if scheme else 1.0) * len(same)


def test_nano_reads_and_answers(tmp_path: Path) -> None:
    """Its words are the tokens that our tokenizer gives, and its answers ours, token for token."""
    source = open_checkpoint(resolve_model("builtin:nano"))
    export_gguf(source, tmp_path / "model.gguf")
    texts = [problem.prompt for problem in mixture(7, 40, split="calibration")]
    tokenizer = load_tokenizer(source.path)
    prompts = [tokenizer.encode(text, special=True) for text in texts[:4]]
    found = asked(tmp_path / "model.gguf", prompts, texts)
    assert found["tokens"] == [tokenizer.encode(text) for text in texts]
    model = Model.load(source)
    for prompt, made in zip(prompts, found["answers"], strict=True):
        assert all(clear_tokens(model, prompt, made))
