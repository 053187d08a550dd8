"""Qwen3 (R1-0528-Qwen3-8B): a Llama that normalises each head of queries and keys before it rotates them."""

from __future__ import annotations

from typing import ClassVar

from deepseek_compress.models.family import Family


class Qwen3(Family):
    """Llama with a norm over the channels of a head of q and of k."""

    model_type: ClassVar[str] = "qwen3"
    qk_norm: ClassVar[bool] = True
