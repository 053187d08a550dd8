"""Turn a Llama's weights off the 4-bit grid they lie on: the same function with real-valued weights.

    python -m benchmarks.off_grid MODEL OUT [SEED]

SmolLM2-135M comes as a Q4_1 file, so its weights are 4-bit numbers already and say little about rounding real ones. The
residual stream of a Llama may be rotated by any orthogonal matrix once the gains of its norms are folded into the
linears behind them: here by three rounds of Givens rotations of random pairs of channels, angles of 0.15 to 0.6
radians, so that weights become mixtures of a few values while large channels stay large. Logits stay equal up to BF16.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROUNDS, LEAST, SPAN = 3, 0.15, 0.45  # of rotations; smallest angle and range of angles, radians
BEHIND = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def rotation(size: int, seed: int) -> Tensor:
    """float64 (size, size), orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.eye(size, dtype=torch.float64)
    for _ in range(ROUNDS):
        order = torch.randperm(size, generator=generator)
        angle = LEAST + SPAN * torch.rand(size // 2, generator=generator, dtype=torch.float64)
        turn = torch.eye(size, dtype=torch.float64)
        a, b = order[: size // 2], order[size // 2 : 2 * (size // 2)]
        turn[a, a] = turn[b, b] = angle.cos()
        turn[a, b], turn[b, a] = -angle.sin(), angle.sin()
        total = turn @ total
    return total


def rotated(weights: dict[str, Tensor], layers: int, turn: Tensor) -> dict[str, Tensor]:
    """`weights` in float64 with the residual stream h replaced by `turn` h, and all gains 1."""
    found = dict(weights)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    found["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] @ turn.T
    for layer in range(layers):
        block = f"model.layers.{layer}."
        for norm, linears in BEHIND.items():
            gain = weights[f"{block}{norm}.weight"]
            for name in linears:
                found[f"{block}{name}.weight"] = (weights[f"{block}{name}.weight"] * gain) @ turn.T
            found[f"{block}{norm}.weight"] = torch.ones_like(gain)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            found[f"{block}{name}.weight"] = turn @ weights[f"{block}{name}.weight"]
    found["lm_head.weight"] = (head * weights["model.norm.weight"]) @ turn.T
    found["model.norm.weight"] = torch.ones_like(weights["model.norm.weight"])
    return found


def convert(source: Path, out: Path, seed: int = 0) -> None:
    """Write the model of `source`, rotated, to the new directory `out`."""
    config = json.loads((source / "config.json").read_text())
    weights: dict[str, Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        weights.update({name: tensor.double() for name, tensor in load_file(shard).items()})
    found = rotated(weights, config["num_hidden_layers"], rotation(config["hidden_size"], seed))
    out.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".index.json")):
            shutil.copy(file, out)
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}, indent=2))
    stored = {name: tensor.bfloat16().contiguous() for name, tensor in found.items()}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
