"""A model's activations on a batch, as training needs them: the head's input, hidden states, router outputs.

The forward pass is that of `Model.hidden_states`, block by block, so that each block can be computed again on the way
back instead of kept (gradient checkpointing, Chen et al. 2016, arXiv 1604.06174).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deepseek_compress.distillation.documents import Batch
from deepseek_compress.models import moe
from deepseek_compress.models.rope import places
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tap import tapped
from deepseek_compress.models.weights import Weights


@dataclass
class View:
    """A model's pass over a batch. N positions where a token is predicted."""

    final: Tensor  # (N, hidden), the input of the head
    hidden: list[Tensor] = field(default_factory=list)  # (N, hidden) after each block, where asked for
    routers: dict[int, Tensor] = field(default_factory=dict)  # layer -> float32 (N, experts), gate weights


def view(
    model: Model, batch: Batch, *, hidden: bool = False, routers: bool = False, checkpointing: bool = False
) -> View:
    """Run `model` over `batch`; with `checkpointing` only the inputs of blocks are kept for the way back."""
    batch = batch.to(model.head.device)
    tokens = batch.tokens[:, :-1]
    positions = places(len(tokens), 0, tokens.shape[1], tokens.device)
    seen: dict[int, Tensor] = {}
    states: list[Tensor] = []

    def tap(layer: int, weights: Weights, x: Tensor) -> None:
        cfg = model.cfg.moe
        if cfg is not None and model.cfg.is_moe(layer) and layer not in seen:  # a recomputed block comes twice
            scores = moe.score(cfg, weights, x.flatten(0, 1)[batch.places])
            seen[layer] = scores / scores.sum(-1, keepdim=True)

    family = tapped(model.family, tap) if routers else model.family
    state = family.embed(model.cfg, model.weights[model.cfg.names.embedding], tokens)
    for layer, weights in enumerate(model.blocks):
        arguments = (model.cfg, layer, weights, state, positions, None, None, tokens)
        if checkpointing:
            state = checkpoint(family.run_block, *arguments, use_reentrant=False)
        else:
            state = family.run_block(*arguments)
        if hidden:
            states.append(state.flatten(0, 1)[batch.places])
    final = family.final_hidden(model.cfg, model.top, state).flatten(0, 1)[batch.places]
    return View(final, states, seen)
