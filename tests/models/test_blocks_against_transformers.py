"""Each block alone and the whole model against transformers, in float32, on the tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.models.families.table import family_of
from deepseek_compress.models.weights import ResidentWeights, StreamedWeights
from tests.models.reference import relative, state_of, transformers_model

BOUND = 2e-6  # largest difference over largest value, float32; measured 3.5e-7
FAMILIES = ["tiny_v3", "tiny_v32", "tiny_v4", "tiny_v3_bf16", "tiny_v2", "tiny_qwen2", "tiny_qwen3", "tiny_llama"]
TOKENS = torch.randint(0, 512, (3, 80), generator=torch.Generator().manual_seed(7))  # 80 > 64 = original length


def hidden_states(path: Path) -> list[Tensor]:
    """transformers' input of each block, and its logits last."""
    model = transformers_model(path)
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _m, args, kw: inputs.append(args[0].clone()), with_kwargs=True)
    outputs: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(
        lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        logits = model(TOKENS).logits
    return [*inputs, outputs[0], logits]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_blocks_and_logits(name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    checkpoint = open_checkpoint(path)
    family = family_of(checkpoint.config)
    assert family.problems(checkpoint.header) == []
    cfg = family.parse(checkpoint.config)
    state = state_of(checkpoint)
    states = hidden_states(path)
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    assert torch.equal(family.embed(cfg, state[family.names.embedding], TOKENS), states[0])
    for layer in range(cfg.num_hidden_layers):
        prefix = family.prefix(layer) + "."
        ours = family.run_block(cfg, layer, ResidentWeights(state, prefix), states[layer], positions, tokens=TOKENS)
        assert relative(ours, states[layer + 1]) < BOUND
        streamed = family.run_block(
            cfg, layer, StreamedWeights(checkpoint, prefix), states[layer], positions, tokens=TOKENS
        )
        assert torch.equal(streamed, ours)
    hidden = family.final_hidden(cfg, ResidentWeights(state), states[-2])
    head = state.get(family.names.head, state[family.names.embedding])
    assert relative(hidden @ head.T, states[-1]) < BOUND
