"""transformers' own models, loaded from the tiny checkpoints by hand, for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_compress.checkpoint import Checkpoint, open_checkpoint


def state_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor in float32, by its published name."""
    return {name: checkpoint.read(name) for name in checkpoint.header.tensors}


def transformers_model(path: Path, **changes: Any) -> torch.nn.Module:
    """The model of `path` in float32, its experts stacked as transformers 5 holds them."""
    import transformers

    checkpoint = open_checkpoint(path)
    config = {
        key: value for key, value in checkpoint.config.items() if key not in ("quantization_config", "torch_dtype")
    }
    auto = transformers.AutoConfig.for_model(**{**config, **changes})
    auto._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(auto, dtype=torch.float32).eval()
    state = state_of(checkpoint)
    for name, target in model.state_dict().items():
        target.copy_(published_value(name, state, tied="lm_head.weight" not in state))
    return model


def published_value(name: str, state: dict[str, Tensor], tied: bool) -> Tensor:
    """The value of a transformers tensor from the published ones."""
    if tied and name == "lm_head.weight":
        return state["model.embed_tokens.weight"]
    if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return state[name]
    stem, _, last = name.rpartition(".")
    count = len({key.split(".experts.")[1].split(".")[0] for key in state if key.startswith(stem + ".")})
    parts = ["gate_proj", "up_proj"] if last == "gate_up_proj" else ["down_proj"]
    return torch.stack([torch.cat([state[f"{stem}.{e}.{part}.weight"] for part in parts]) for e in range(count)])


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
