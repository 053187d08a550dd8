"""`make verify`: a model in 4 bits, exported to each target, says the runtime's 64 greedy tokens where these are clear.

The built-in model always; SmolLM2-135M, or another Llama or Qwen2, where DSC_SMOLLM2 names its directory.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from deepseek_compress import pipeline, resources
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.export import TARGETS
from deepseek_compress.generation.speaker import Local
from deepseek_compress.generation.targets import open_target
from deepseek_compress.models.resolve import resolve_model
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.recipe import Changes, read_recipe
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.export import Export
from deepseek_compress.tasks import mixture
from tests.generation.test_genai import PYTHON, ROOT
from tests.generation.test_genai import SCRIPT as GENAI
from tests.llama_cpp import Asked

COUNT = 64
SMOLLM2 = Path(os.environ.get("DSC_SMOLLM2", "no-such-directory"))
MODELS = [
    "nano",
    pytest.param("smollm2", marks=pytest.mark.skipif(not SMOLLM2.is_dir(), reason="DSC_SMOLLM2 names no model")),
]
# A lead over the largest |logit| that what computes cannot turn: exact graphs, 8-bit inputs, BF16 weights
LEADS = {"onnx": 1e-3, "compressed-tensors": 1e-3, "onnxruntime": 0.05, "genai": 0.05, "gguf": 0.05, "bf16": 0.05}
QUESTIONS = ["Write a short story about a lighthouse keeper.", "Why is the sky blue?"]
Greedy = Callable[[Sequence[int], int], list[int]]
pytestmark = pytest.mark.verify


@pytest.fixture(scope="module")
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of this name in 4 bits, data-free."""
    source = resolve_model("builtin:nano") if request.param == "nano" else SMOLLM2
    out = tmp_path_factory.mktemp(request.param) / "w4"
    pipeline.run(read_recipe(resources.recipe_path("w4a16-fast"), Changes((), {"model": str(source)})), out, flat=True)
    return out


def prompts_of(folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    if tokenizer.has_chat_template:
        asked = [tokenizer.chat([{"role": "user", "content": text}], answer_next=True) for text in QUESTIONS]
        return [tokenizer.encode(text) for text in asked]
    return [tokenizer.encode(problem.prompt, special=True) for problem in mixture(3, 4, split="calibration")]


def opened(target: str, folder: Path) -> Greedy:
    """What answers there, by its own loop."""
    if target == "gguf":
        return Asked(folder / "model.gguf").greedy
    if target == "genai" and PYTHON.exists():
        return lambda ids, count: _genai(folder, ids)[:count]
    speaker = open_target(str(folder), 1)
    assert isinstance(speaker, Local)
    backend = speaker.backend

    def greedy(ids: Sequence[int], count: int) -> list[int]:
        tokens = [int(backend.prefill(ids).argmax())]
        while len(tokens) < count and tokens[-1] not in speaker.tokenizer.eos_ids:
            tokens.append(int(backend.step(tokens[-1]).argmax()))
        return tokens

    return greedy


def _genai(folder: Path, ids: Sequence[int]) -> list[int]:
    env = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    command = [str(PYTHON), "-c", GENAI, str(folder), json.dumps([*ids])]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    made: list[int] = json.loads(done.stdout)[0]
    return made


def judged(model: Model, prompt: Sequence[int], made: Sequence[int], lead: float) -> list[bool]:
    """Whether each token is the runtime's after the same tokens before it, where the runtime's lead is clear."""
    with torch.no_grad():
        logits = model.forward(torch.tensor([[*prompt, *made]]))[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    clear = (best[:, 0] - best[:, 1]) > lead * logits.abs().amax(-1)
    return (logits.argmax(-1) == torch.tensor(made))[clear].tolist()


@pytest.mark.parametrize("target", [name for name in TARGETS if "tensorrt" not in name])
@pytest.mark.parametrize("packed", MODELS, indirect=True)
def test_each_target_says_the_same(
    packed: Path, target: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    stage, source = Export.model_validate({"target": target}), open_checkpoint(packed)
    problems = stage.problems(source.header)
    if problems:
        assert all(problem.fix for problem in problems), "refused with the way out"
        pytest.skip(f"refused: {problems[0]}")
    try:
        stage.run(source, Context("export", tmp_path / "out", "", 0, tell=lambda line: None))
    except DscError as error:
        pytest.fail(f"neither written nor refused before: {error}")
    greedy, model = opened(target, tmp_path / "out"), Model.load(source)
    same: list[bool] = []
    asked = 0
    for prompt in prompts_of(packed):
        made = greedy(prompt, COUNT)
        asked += len(made)
        same += judged(model, prompt, made, LEADS[target])
    share = len(same) / asked
    record_property("clear_share", round(share, 3))
    print(f"{packed.parent.name} {target}: {sum(same)} of {len(same)} clear tokens equal, {share:.0%} of {asked} clear")
    assert all(same)
    assert share > 0.3
