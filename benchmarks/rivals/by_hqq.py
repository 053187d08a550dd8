"""HQQ: half-quadratic quantisation, without calibration; its zero points are real numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import plain
import torch
from torch import Tensor


def quantize(model: Path, file: Path, out: Path, method: str) -> None:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    net = plain.load(model)
    config = BaseQuantizeConfig(nbits=4, group_size=plain.GROUP)
    AutoHQQHFModel.quantize_model(net, quant_config=config, compute_dtype=torch.float32, device="cpu")
    AutoHQQHFModel.save_quantized(net, str(out))


def decode(model: Path, quantized: Path, out: Path) -> Mapping[str, Tensor]:
    from hqq.core.quantize import HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel

    net = AutoHQQHFModel.from_quantized(str(quantized), compute_dtype=torch.float32, device="cpu")
    weights = plain.tensors(model)  # what it leaves alone, fused experts for one, is as it was
    for name, layer in net.named_modules():
        if isinstance(layer, HQQLinear):
            weights[f"{name}.weight"] = layer.dequantize().float()
    return weights


if __name__ == "__main__":
    plain.main(quantize, decode)
