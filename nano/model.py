"""The model under training: transformers' DeepseekV3ForCausalLM in FP32 with batched experts.

transformers visits the experts one after the other. On a GPU all experts are computed for all tokens instead, in two
large products, and the weights of the router (zero where an expert was not chosen) pick the sum: the same function,
eight times the arithmetic of two experts in sixteen, and still far faster at this size. On a CPU each expert gets its
own tokens only.
"""

from __future__ import annotations

import contextlib
import functools
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

TAKEN_OUT = -100.0  # a score is below 1: an expert with this bias is never chosen
CONFIG = Path(__file__).parent.parent / "builtin" / "nano" / "config.json"


def build(device: torch.device, seed: int, source: Path = CONFIG, **changes: int) -> nn.Module:
    """Return a freshly initialised model; `changes` override sizes of the configuration in `source`."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = json.loads(source.read_text())
    rope = {"rope_type": "default", "rope_theta": float(config.pop("rope_theta"))}
    for key in ("quantization_config", "torch_dtype", "rope_scaling"):
        config.pop(key, None)
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**config, **changes}, rope_parameters=rope))
    model.set_attn_implementation("sdpa")
    model = model.float().to(device)
    for moe in mixtures(model):
        moe.experts.forward = types.MethodType(_experts, moe.experts)
    return model


def mixtures(model: nn.Module) -> list[nn.Module]:
    """List the mixture-of-experts modules, in the order of the layers."""
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def _gated(gate: Tensor, up: Tensor, gates: Tensor) -> Tensor:
    return functional.silu(gate) * up * gates.unsqueeze(-1)


@functools.cache
def _fused_gated() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`_gated` compiled, where the compiler works; it saves most of the memory traffic of the experts."""
    compiled = torch.compile(_gated, dynamic=True)
    try:
        trial = [torch.randn(*shape, device="cuda", requires_grad=True) for shape in ((8, 2, 4), (8, 2, 4), (8, 2))]
        compiled(*trial).sum().backward()
    except Exception as error:  # whatever the compiler raises: it is only faster
        print(f"not compiled: {error}")
        return _gated
    return compiled


def _experts(self: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """hidden (S, H), chosen and weights (S, k) -> (S, H); keeps how often each expert was chosen."""
    count = len(self.gate_up_proj)
    gates = torch.zeros(len(hidden), count, dtype=hidden.dtype, device=hidden.device)
    gates = gates.scatter(1, chosen, weights.to(hidden.dtype))  # (S, E)
    self.chosen = (gates.detach() > 0).float()
    if hidden.is_cuda:
        gate, up = functional.linear(hidden, self.gate_up_proj.flatten(0, 1)).view(len(hidden), count, -1).chunk(2, -1)
        inner = _fused_gated()(gate, up, gates)  # (S, E, I)
        return inner.flatten(1) @ self.down_proj.transpose(1, 2).flatten(0, 1)
    out = torch.zeros_like(hidden)
    for expert in range(count):
        rows = gates[:, expert].nonzero().squeeze(1)
        gate, up = functional.linear(hidden[rows], self.gate_up_proj[expert]).chunk(2, -1)
        inner = functional.silu(gate) * up
        out = out.index_add(0, rows, functional.linear(inner, self.down_proj[expert]) * gates[rows, expert, None])
    return out


@contextlib.contextmanager
def missing_experts(model: nn.Module, generator: torch.Generator | None) -> Iterator[None]:
    """Take one random expert out of each group for a while (none where `generator` is None).

    A model that has learnt to do without any of them is a teacher whose students may lose experts.
    """
    taken: list[tuple[Tensor, Tensor, Tensor]] = []
    for moe in mixtures(model) if generator is not None else []:
        bias = moe.gate.e_score_correction_bias
        width = len(bias) // model.config.n_group
        picked = torch.randint(width, (model.config.n_group,), generator=generator) + width * torch.arange(
            model.config.n_group
        )
        taken.append((bias, picked.to(bias.device), bias[picked.to(bias.device)].clone()))
        bias[picked.to(bias.device)] = TAKEN_OUT
    yield
    for bias, picked, before in taken:
        bias[picked] = before


@torch.no_grad()
def spread(model: nn.Module, sigma: float, seed: int) -> None:
    """Give the channels the uneven scales that large models have, without changing what the model computes.

    The gain of each channel of a norm is divided by exp(sigma n), n normal, and the columns of the linears behind it
    are multiplied by it. Large models grow such channels by themselves (Dettmers et al. 2022, LLM.int8(), section 4;
    Lin et al. 2023, AWQ, section 3); a small one that is trained for minutes does not.
    """
    generator = torch.Generator().manual_seed(seed)

    def pair(norm: nn.Module, *columns: Tensor) -> None:
        scale = torch.exp(sigma * torch.randn(len(norm.weight), generator=generator)).to(norm.weight.device)
        norm.weight.div_(scale)
        for weight in columns:
            weight.mul_(scale)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        pair(layer.input_layernorm, attention.q_a_proj.weight, attention.kv_a_proj_with_mqa.weight)
        pair(attention.q_a_layernorm, attention.q_b_proj.weight)
        pair(attention.kv_a_layernorm, attention.kv_b_proj.weight)
        inner = mlp.shared_experts if hasattr(mlp, "experts") else mlp
        routed = (mlp.experts.gate_up_proj, mlp.gate.weight) if hasattr(mlp, "experts") else ()
        pair(layer.post_attention_layernorm, inner.gate_proj.weight, inner.up_proj.weight, *routed)


@torch.no_grad()
def balance(model: nn.Module, real: Tensor, gamma: float) -> None:
    """One step of the balancing without an auxiliary loss (DeepSeek-V3 report, section 2.1.2).

    An expert that was chosen more often than the mean gets its bias lowered by `gamma`, the others raised; one that
    was taken out is left alone. `real` (S,) is 0 for padding.
    """
    for moe in mixtures(model):
        bias = moe.gate.e_score_correction_bias
        load, there = (moe.experts.chosen * real.unsqueeze(1)).sum(0), bias > TAKEN_OUT / 2
        bias += gamma * torch.sign(load[there].mean() - load) * there


@torch.no_grad()
def chain_exact(model: nn.Module, ids: Tensor, weights: Tensor, batch: int = 256) -> Tensor:
    """bool (rows,): whether greedy decoding would write the reference solution word for word.

    One pass answers it: each word of the solution must be the likeliest after the reference words before it. A lower
    bound of the exact match, which forgives a different chain.
    """
    found = []
    for start in range(0, len(ids), batch):
        rows, wanted = ids[start : start + batch], weights[start : start + batch, 1:] == 1
        best = model(input_ids=rows, use_cache=False).logits[:, :-1].argmax(-1)
        found.append(((best == rows[:, 1:]) | ~wanted).all(1))
    return torch.cat(found)


@torch.no_grad()
def generate(model: nn.Module, prompts: list[list[int]], longest: int, eos: int) -> list[list[int]]:
    """Greedy continuations, all prompts together, recomputed at each step (the rows are short)."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()) + longest, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    every = torch.arange(len(prompts), device=device)
    open_ = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for step in range(longest):
        end = int(lengths.max()) + step
        logits = model(input_ids=ids[:, :end], use_cache=False).logits
        best = logits[every, lengths + step - 1].argmax(-1)
        ids[every, lengths + step] = torch.where(open_, best, torch.zeros_like(best))
        open_ = open_ & (best != eos)
        if not bool(open_.any()):
            break
    cut = lengths.tolist()
    rows = [row[cut[index] : cut[index] + longest] for index, row in enumerate(ids.tolist())]
    return [row[: row.index(eos)] if eos in row else row for row in rows]
