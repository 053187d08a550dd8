"""llm-compressor's 2:4: SparseGPT and Wanda, each with its defaults; every expert is calibrated with every token.

Both fail by themselves on latent attention, since a linear there has inputs of four dimensions: those are flattened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plain
from torch import Tensor

KNOBS = {"sparsity": 0.5, "mask_structure": "2:4", "ignore": ["re:.*lm_head", "re:.*mlp.gate$"]}


def recipe(method: str) -> list[object]:
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier

    return [{"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method](**KNOBS)]


def flattened(module: Any, name: str) -> None:
    """Give a function of the rival's that takes inputs of a linear no more than three dimensions."""
    plainly = getattr(module, name)
    setattr(
        module, name, lambda inp, *rest, **more: plainly(inp.flatten(1, -2) if inp.dim() > 3 else inp, *rest, **more)
    )


def quantize(model: Path, file: Path, out: Path, method: str) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.sparsegpt import base as sparsegpt
    from llmcompressor.modifiers.pruning.wanda import base as wanda

    flattened(sparsegpt, "accumulate_hessian")
    flattened(wanda, "accumulate_row_scalars")
    ids = plain.ids(file)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    net, words = plain.load(model), plain.tokenizer(model)
    oneshot(
        model=net,
        tokenizer=words,
        dataset=Dataset.from_list(rows),
        recipe=recipe(method),
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
    )
    net.save_pretrained(out, save_compressed=False)
    words.save_pretrained(out)


def decode(model: Path, quantized: Path, out: Path) -> Mapping[str, Tensor]:
    return plain.tensors(quantized)


if __name__ == "__main__":
    plain.main(quantize, decode)
