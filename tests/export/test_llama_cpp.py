"""GGUF files in a real llama.cpp: its words are our tokenizer's tokens, its answers the runtime's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.export.gguf import export_gguf
from deepseek_compress.models.resolve import resolve_model
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.tasks import mixture
from tests.llama_cpp import Asked

from .conftest import write_quantised

pytest.importorskip("xllamacpp", reason="pip install 'deepseek-compress[llama-cpp]'")
LEAD = 0.05  # over the largest |logit|


def clear_tokens(model: Model, prompt: list[int], made: list[int]) -> list[bool]:
    """Whether each token is ours, where ours has a clear lead; after the same tokens before it."""
    with torch.no_grad():
        logits = model.forward(torch.tensor([prompt + made]))[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    clear = (best[:, 0] - best[:, 1]) > LEAD * logits.abs().amax(-1)
    return (logits.argmax(-1) == torch.tensor(made))[clear].tolist()


@pytest.mark.parametrize(
    ("family", "scheme"),
    [("tiny_v2", "w4a16"), *(pytest.param(*case, marks=pytest.mark.verify) for case in (
        ("tiny_v2", None), ("tiny_v3", "w4a16"), ("tiny_v3", None),
    ))],
)  # fmt: skip
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
    server = Asked(tmp_path / "model.gguf")
    for prompt in prompts:
        same += clear_tokens(model, prompt, server.greedy(prompt, 24))
    # llama.cpp rounds the inputs of packed weights to 8 bits, which may choose other experts in a random model
    assert len(same) > 10 and sum(same) >= (0.95 if scheme else 1.0) * len(same)


def test_nano_reads_and_answers(tmp_path: Path) -> None:
    """Its words are the tokens that our tokenizer gives, and its answers ours, token for token."""
    source = open_checkpoint(resolve_model("builtin:nano"))
    export_gguf(source, tmp_path / "model.gguf")
    texts = [problem.prompt for problem in mixture(7, 40, split="calibration")]
    tokenizer = load_tokenizer(source.path)
    prompts = [tokenizer.encode(text, special=True) for text in texts[:4]]
    server, model = Asked(tmp_path / "model.gguf"), Model.load(source)
    assert [server.tokens(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    for prompt in prompts:
        same = clear_tokens(model, prompt, server.greedy(prompt, 24))
        assert same and all(same)
