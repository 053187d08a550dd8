"""GPTQModel: GPTQ with its own defaults (`gptq`: act order within groups), or in full act order (`gptq-order`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import plain
import torch
from torch import Tensor

# It starts half as many workers as there are cores and then asks for two of them: it crashes on fewer than three cores.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def quantize(model: Path, file: Path, out: Path, method: str) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    order = {"desc_act": True, "act_group_aware": False} if method == "gptq-order" else {"act_group_aware": True}
    config = QuantizeConfig(bits=4, group_size=plain.GROUP, sym=False, device="cpu", mse=2.4, **order)
    net = GPTQModel.load(str(model), config, dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in plain.ids(file).tolist()]
    net.quantize(rows, batch_size=1)
    net.save(str(out))


def decode(model: Path, quantized: Path, out: Path) -> Mapping[str, Tensor]:
    from gptqmodel import BACKEND, GPTQModel

    # its kernel runs in 16 bits only; the scales, stored in 16 bits, are widened, so that decoding adds no rounding
    net = GPTQModel.load(str(quantized), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    # what it drops when it saves, a router's correction bias, is the original's: its linears are judged
    weights = {name: value for name, value in plain.tensors(model).items() if not name.endswith(".weight")}
    weights |= {name: value for name, value in plain.tensors(quantized).items() if name.endswith(".weight")}
    for name, layer in net.model.named_modules():
        if hasattr(layer, "qweight"):
            layer.scales = layer.scales.float()
            weights[f"{name}.weight"] = layer.dequantize_weight().T.float()
    return weights


if __name__ == "__main__":
    plain.main(quantize, decode)
