"""Qwen2 (R1-Distill-Qwen): a Llama whose queries, keys and values have a bias; o_proj has none."""

from __future__ import annotations

from typing import ClassVar

from deepseek_compress.models.family import Family


class Qwen2(Family):
    """Llama with biases on q, k and v."""

    model_type: ClassVar[str] = "qwen2"
    qkv_bias: ClassVar[bool] = True
