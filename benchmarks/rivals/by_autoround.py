"""auto-round: learned rounding by signed gradients; METHOD is the number of iterations a block, such as `50`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import plain
from torch import Tensor


def quantize(model: Path, file: Path, out: Path, method: str) -> None:
    from auto_round import AutoRound

    ids = plain.ids(file)
    rounder = AutoRound(
        plain.load(model),
        tokenizer=plain.tokenizer(model),
        scheme="W4A16",
        group_size=plain.GROUP,
        sym=False,
        iters=int(method),
        dataset=list(ids.split(1)),
        nsamples=ids.shape[0],
        seqlen=ids.shape[1],
        device_map="cpu",
    )
    rounder.quantize_and_save(str(out), format="auto_round")


def decode(model: Path, quantized: Path, out: Path) -> Mapping[str, Tensor]:
    # Loaded through transformers on a CPU without a package that auto-round does not require, every layer is made anew
    # at random after one line in the log; so its packed form is decoded by its own function instead.
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    stored = plain.tensors(next(file.parent for file in quantized.rglob("config.json")))
    # what it drops when it saves, a router's correction bias, is the original's: its linears are judged
    weights = {name: value for name, value in plain.tensors(model).items() if not name.endswith(".weight")}
    weights |= {name: value for name, value in stored.items() if name.endswith("weight") and "qweight" not in name}
    for name, codes in stored.items():
        base, _, part = name.rpartition(".")
        if part == "qweight":
            zeros, scales = stored[f"{base}.qzeros"], stored[f"{base}.scales"].float()
            weights[f"{base}.weight"] = dequantize_gemm(codes, zeros, scales, 4, plain.GROUP).T
    return weights


if __name__ == "__main__":
    plain.main(quantize, decode)
