"""Tiny checkpoints of the families that only the model tests need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import V3_CONFIG, finish_directory, published_state, write_shards

V32_CONFIG: dict[str, Any] = {
    **V3_CONFIG,
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_topk": 24,  # fewer than the tests' tokens, so that the indexer decides
    "index_head_dim": 48,
    "index_n_heads": 4,
}


@pytest.fixture(scope="session")
def tiny_v32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3.2 in small, BF16."""
    out = tmp_path_factory.mktemp("tiny_v32")
    write_shards(out, published_state(V32_CONFIG, seed=6), shards=1)
    return finish_directory(out, V32_CONFIG)
