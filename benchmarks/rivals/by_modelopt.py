"""NVIDIA ModelOpt: AWQ lite (its INT4_AWQ_CFG, groups of 64). Symmetric: its 4-bit form has no zero points."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import plain
import torch
from torch import Tensor


def quantize(model: Path, file: Path, out: Path, method: str) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    net, ids = plain.load(model), plain.ids(file)
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    for entry in config["quant_cfg"]:
        sizes = entry.get("cfg", {}).get("block_sizes", {})
        if -1 in sizes:
            sizes[-1] = plain.GROUP

    def calibrate(net: torch.nn.Module) -> None:
        with torch.no_grad():
            for row in ids.split(1):
                net(row)

    mtq.quantize(net, config, calibrate)
    export_hf_checkpoint(net, export_dir=out)


def decode(model: Path, quantized: Path, out: Path) -> Mapping[str, Tensor]:
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8

    stored = plain.tensors(quantized)
    weights = {}
    for name, value in stored.items():
        if value.dtype != torch.uint8:
            weights[name] = value
            continue
        base = name.removesuffix("weight")
        scale = stored[f"{base}weight_scale"].float()
        codes = torch.stack((value & 15, value >> 4), 1).reshape(-1, value.shape[1]).to(torch.int8)
        codes = torch.where(codes > 7, codes - 16, codes)  # two's complement
        weight = codes.float() * scale.repeat_interleave(plain.GROUP, 1)
        if not torch.equal(pack_int4_in_uint8(weight, scale, plain.GROUP), value):
            raise SystemExit(f"{name}: packed again by ModelOpt it differs")
        smooth = stored.get(f"{base}pre_quant_scale")  # multiplies the layer's input where no norm could take it
        weights[name] = weight if smooth is None else weight * smooth.float()
    return weights


if __name__ == "__main__":
    plain.main(quantize, decode)
