"""A made-up family: names of its own, a bias on the keys' side alone, tied embeddings. Nothing else knows of it."""

from __future__ import annotations

from typing import ClassVar

from deepseek_compress.models.config import FfnNames, ModelConfig, Names
from deepseek_compress.models.family import Family

FFN = FfnNames(mlp="feed", gate="w_in", up="w_side", down="w_out")


class MadeUp(Family):
    """A Llama whose tensors have other names and whose queries, keys and values have a bias."""

    model_type: ClassVar[str] = "made_up"
    names: ClassVar[Names] = Names(
        block="stack.{}", embedding="words.weight", head="speak.weight", norm="last_norm.weight",
        attention_norm="first", ffn_norm="second", attention="look",
        q="look.ask", k="look.match", v="look.tell", o="look.mix", ffn=FFN,
    )  # fmt: skip

    def has_bias(self, cfg: ModelConfig, name: str) -> bool:
        """On queries, keys and values."""
        return name in (self.names.q, self.names.k, self.names.v)
