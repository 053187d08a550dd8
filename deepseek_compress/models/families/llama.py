"""Llama (R1-Distill-Llama): grouped-query attention, llama3 rotary scaling, no biases."""

from __future__ import annotations

from typing import ClassVar

from deepseek_compress.models.family import Family


class Llama(Family):
    """The base family as it is."""

    model_type: ClassVar[str] = "llama"
