"""Importance of each layer, routed expert, channel of an MLP and head of attention, measured on calibration text.

    influence   of a layer: mean over tokens of 1 - cos(h, h'), h what enters it and h' what leaves it
                (ShortGPT, Men et al. 2024, arXiv 2403.03853)
    loss        of a layer: KL(model || model without it), nats a token (Kim et al. 2024, Shortened LLaMA, arXiv
                2402.02834); a layer whose output hardly turns can still decide what the next one does
    activation  of an expert: mean over the tokens routed to it of gate weight x norm of its output
                (REAP, Lasby et al. 2025, arXiv 2510.13999)
    frequency   of an expert: how many tokens the router sends to it
    parts       of a channel between gate/up and down: mean magnitude of its activation x norm of its column of down;
                of heads that share keys and values: the sum of that over their channels of o_proj's input
                (Minitron, Muralidharan et al. 2024, arXiv 2407.14679, section 2.2, with what a channel adds to the
                hidden state instead of the activation alone)

All of it belongs to the text: measure on what the student is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.distillation.documents import Batch
from deepseek_compress.distillation.objective import pieces
from deepseek_compress.distillation.shrink import readers
from deepseek_compress.distillation.views import view
from deepseek_compress.models import moe
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tap import tapped
from deepseek_compress.models.weights import HookedWeights, Weights

LAYERS = ("influence", "loss", "even")
EXPERTS = ("activation", "frequency")


@torch.no_grad()
def influence(model: Model, batches: Sequence[Batch]) -> Tensor:
    """Of each layer, float32 (layers,)."""
    total, count = torch.zeros(model.cfg.num_hidden_layers, device=model.head.device), 0
    for batch in batches:
        states = [state.flatten(0, 1)[batch.places] for state in model.hidden_states(batch.tokens[:, :-1])]
        for layer in range(len(total)):
            before, after = (states[index].flatten(1) for index in (layer, layer + 1))
            total[layer] += (1 - functional.cosine_similarity(before, after, dim=-1)).sum()
        count += len(batch.places)
    return (total / count).cpu()


@torch.no_grad()
def loss_without(model: Model, batches: Sequence[Batch]) -> Tensor:
    """KL of the model to itself without each layer, float32 (layers,). Layers before the one left out run once."""
    total, count = torch.zeros(model.cfg.num_hidden_layers), 0
    for batch in batches:
        tokens = batch.tokens[:, :-1]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        states = model.hidden_states(tokens)
        wanted = _final(model, states[-1], batch)
        for layer in range(len(total)):
            state = states[layer]
            for later in range(layer + 1, len(total)):
                state = model.family.run_block(model.cfg, later, model.blocks[later], state, positions, tokens=tokens)
            total[layer] += _kl(model.head, wanted, _final(model, state, batch))
        count += len(batch.places)
    return total / count


def _final(model: Model, state: Tensor, batch: Batch) -> Tensor:
    return model.family.final_hidden(model.cfg, model.top, state).flatten(0, 1)[batch.places]


def _kl(head: Tensor, wanted: Tensor, given: Tensor) -> float:
    total = 0.0
    for rows in pieces(len(wanted), len(head)):
        p, q = (functional.linear(h[rows], head).log_softmax(-1) for h in (wanted, given))
        total += float(functional.kl_div(q, p, reduction="sum", log_target=True))
    return total


@torch.no_grad()
def expert_use(model: Model, batches: Sequence[Batch], by: str) -> dict[int, Tensor]:
    """Of each expert of each layer that has them: {layer: float32 (E,)}."""
    cfg = model.cfg.moe
    if cfg is None:
        return {}
    sums: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    places, device = Tensor(), model.head.device

    def tap(layer: int, weights: Weights, x: Tensor) -> None:
        assert cfg is not None
        if not model.cfg.is_moe(layer):
            return
        flat = x.flatten(0, 1)[places]
        routing = moe.route(cfg, weights, flat)
        gates = routing.gate_weights.flatten()
        for expert, chosen in enumerate(moe.by_expert(routing, cfg.experts)):
            counts.setdefault(layer, torch.zeros(cfg.experts, device=device))[expert] += len(chosen)
            if by == "activation" and len(chosen):
                out = moe.run_expert(cfg, weights, expert, flat[chosen // cfg.top_k])
                total = sums.setdefault(layer, torch.zeros(cfg.experts, device=device))
                total[expert] += (gates[chosen] * out.norm(dim=-1)).sum()

    watched = Model(tapped(model.family, tap), model.cfg, model.weights)
    for batch in batches:
        places = batch.places
        view(watched, batch)
    if by == "frequency":
        return {layer: count.cpu() for layer, count in counts.items()}
    return {layer: (sums[layer] / count.clamp(min=1)).cpu() for layer, count in counts.items()}


@torch.no_grad()
def parts(model: Model, batches: Sequence[Batch]) -> dict[tuple[int, str], Tensor]:
    """Of each channel of each MLP and expert float32 (intermediate,), of the heads of each attention (shared keys,).

    By layer and name in the block. Where no token came by, the norms of the columns alone decide.
    """
    sums: dict[tuple[int, str], Tensor] = {}
    counts: dict[tuple[int, str], int] = {}

    def hook_of(layer: int, reading: dict[str, str]) -> Callable[[str, Tensor], None]:
        def hook(name: str, x: Tensor) -> None:
            if name in reading:
                place, flat = (layer, reading[name]), x.flatten(0, -2)
                sums[place] = sums.get(place, 0) + flat.abs().sum(0, dtype=torch.float32)
                counts[place] = counts.get(place, 0) + len(flat)

        return hook

    watched = Model(model.family, model.cfg, model.weights)
    reading = [readers(model.family, model.cfg, layer) for layer in range(model.cfg.num_hidden_layers)]
    watched.blocks = [HookedWeights(model.blocks[i], hook_of(i, reading[i])) for i in range(len(reading))]
    for batch in batches:
        for row, size in enumerate(batch.sizes):  # one by one: padding would count too
            watched.hidden_states(batch.tokens[row : row + 1, :size])
    found = {}
    for layer, names in enumerate(reading):
        for linear, part in names.items():
            norms = model.blocks[layer][f"{linear}.weight"].float().norm(dim=0)
            place = (layer, part)
            added = (norms * sums[place] / counts[place] if place in sums else norms).cpu()
            heads = linear == model.family.names.o
            found[place] = added.view(model.cfg.num_key_value_heads, -1).sum(1) if heads else added
    return found
