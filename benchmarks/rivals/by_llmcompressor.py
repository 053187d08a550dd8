"""llm-compressor: GPTQ (`gptq`: static act order, its default; `gptq-plain`: columns as they come; `-mse`: its observer
by squared error; `smooth-`: SmoothQuant before; `-8`: 8 bits where recipe w4a16-best of dsc has them), AWQ. Every
expert is calibrated with every token, its default.

Its AWQ pins memory for a device even where there is none, and stops; pinning does nothing here, so that it has a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import plain
from torch import Tensor

WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": plain.GROUP, "symmetric": False}


def eight_bits(model: Path) -> dict[str, object]:
    """The group of attention, and in a mixture of experts of all that no router chooses."""
    targets = ["re:.*self_attn.*proj.*"]
    if "n_routed_experts" in json.loads((model / "config.json").read_text()):
        targets += ["re:.*shared_experts.*proj$", r"re:.*\.mlp\.(gate|up|down)_proj$"]
    return {"targets": targets, "weights": {**WEIGHTS, "num_bits": 8, "symmetric": True}}


def recipe(method: str, model: Path) -> list[object]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    weights = {**WEIGHTS, **({"observer": "mse"} if "-mse" in method else {})}
    groups = {"eight": eight_bits(model)} if method.endswith("-8") else {}
    common = {
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {**groups, "four": {"targets": ["Linear"], "weights": weights}},
    }
    if method == "smooth-gptq-mse":  # its mappings for the architecture, its default strength
        return [SmoothQuantModifier(smoothing_strength=0.5), GPTQModifier(**common)]
    if method.startswith("gptq"):
        order = {"actorder": None} if method == "gptq-plain" else {}
        return [GPTQModifier(**common, **order)]
    if method == "awq":
        return [AWQModifier(), QuantizationModifier(**common)]
    raise SystemExit(f"{method}: no such method")


def quantize(model: Path, file: Path, out: Path, method: str) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot

    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    ids = plain.ids(file)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    net, words = plain.load(model), plain.tokenizer(model)
    oneshot(
        model=net,
        tokenizer=words,
        dataset=Dataset.from_list(rows),
        recipe=recipe(method, model),
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
    )
    net.save_pretrained(out, save_compressed=True)
    words.save_pretrained(out)


def decode(model: Path, quantized: Path, out: Path) -> Mapping[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    stored = plain.tensors(quantized)
    weights = {}
    for name, value in stored.items():
        base, _, part = name.rpartition(".")
        if part == "weight_packed":
            parts = {key[len(base) + 1 :]: stored[key] for key in stored if key.startswith(base + ".weight")}
            bits = 32 * value.shape[1] // int(parts["weight_shape"][1])
            kind = {**WEIGHTS, "num_bits": bits, "symmetric": "weight_zero_point" not in parts}
            scheme = QuantizationScheme(targets=["Linear"], weights=kind)
            weights[f"{base}.weight"] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        elif part not in ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"):
            weights[name] = value
    return weights


if __name__ == "__main__":
    plain.main(quantize, decode)
