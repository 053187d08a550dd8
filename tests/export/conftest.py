"""Quantised tiny checkpoints, made once: what the export parts read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
from deepseek_compress.models.families.table import family_of
from deepseek_compress.numerics import WEIGHTS
from deepseek_compress.numerics.types import Statistics

DYNAMIC: dict[str, Any] = {"method": "dynamic", "num_bits": 8, "granularity": "token"}
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "w4a16": ({"num_bits": 4, "group_size": 32, "symmetric": False}, None),
    "w4a8": ({"num_bits": 4, "group_size": 32, "symmetric": False}, DYNAMIC),
    "w4a8-attention": ({"num_bits": 4, "group_size": 32, "symmetric": False}, {**DYNAMIC, "attention": True}),
    "w8a8": ({"num_bits": 8, "group_size": 32, "symmetric": True}, DYNAMIC),
}
Quantise = Callable[[Path, str], Path]


def write_quantised(source: Path, out: Path, scheme: str) -> Path:
    """`source` with every linear of its blocks rounded to nearest by `SCHEMES[scheme]`."""
    knobs, activations = SCHEMES[scheme]
    checkpoint = open_checkpoint(source)
    family = family_of(checkpoint.config)
    cfg = family.parse(checkpoint.config)
    chosen = {
        f"{family.prefix(layer)}.{linear.name}.weight"
        for layer in range(cfg.num_hidden_layers)
        for linear in family.linears(cfg, layer)
    }
    quantise = WEIGHTS["rtn"](**knobs)
    with CheckpointWriter(out, checkpoint, activations=activations) as writer:
        for name in checkpoint.header.tensors:
            if name in chosen:
                writer.add(name, quantise(checkpoint.read(name), Statistics()))
            else:
                writer.add(name, checkpoint.read(name, dtype=torch.bfloat16))
        writer.finish({}, {}, [])
    return out


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Quantise:
    """(source, scheme) -> the quantised checkpoint, made once a session."""
    made: dict[tuple[Path, str], Path] = {}

    def get(source: Path, scheme: str) -> Path:
        if (source, scheme) not in made:
            out = tmp_path_factory.mktemp(f"{source.name}_{scheme}") / "out"
            made[source, scheme] = write_quantised(source, out, scheme)
        return made[source, scheme]

    return get
