"""How fast does a 4-bit asymmetric model decode in onnxruntime, and what do its 8-bit activations cost?

Sides, measured in turns in one run: our runtime in FP32 torch, the unquantised model in onnxruntime, the 4-bit one at
accuracy level 4 and 0, and at level 4 with an 8-bit embedding. First the files are checked against the runtime.
All sides compute the last token's logits of a prompt alone. Attention of all onnxruntime sides is the plain one:
version 1.31's tiled one takes longer for a prompt of 256 on this CPU (ORT_GQA_DISABLE_FLASH_ATTENTION=0: that one).

    python -m benchmarks.onnxruntime_decode MODEL [--quantized DIR] [--threads N] [--rounds N]

MODEL: a dense model in BF16, such as SmolLM2-135M. Without --quantized its linears are rounded to nearest, group 64.
The bars: decode 2.5 times torch and 2 times onnxruntime FP32 at level 4 with at most 0.015 nats more KL, 1.5 and 1.2
times at level 0; file 0.45 of BF16, 0.35 with the 8-bit embedding; first token of 256 no slower than torch.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import DATA, present
from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
from deepseek_compress.export.onnx import export_onnx
from deepseek_compress.export.verify import OnnxModel
from deepseek_compress.models.cache import KvCache
from deepseek_compress.models.families.table import family_of
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.numerics import WEIGHTS
from deepseek_compress.numerics.types import Statistics

PROMPT, DECODED = 256, 16
SIDES: dict[str, dict[str, Any]] = {
    "onnxruntime fp32": {"quantized": False},
    "4-bit, level 4": {"quantized": True, "accuracy_level": 4},
    "4-bit, level 0": {"quantized": True, "accuracy_level": 0},
    "4-bit, level 4, 8-bit embedding": {"quantized": True, "accuracy_level": 4, "embedding_bits": 8},
}


def quantize(source: Path, out: Path) -> Path:
    """Round every linear of the blocks to nearest: 4-bit asymmetric, group 64."""
    checkpoint = open_checkpoint(source)
    family = family_of(checkpoint.config)
    cfg = family.parse(checkpoint.config)
    layers = range(cfg.num_hidden_layers)
    chosen = {f"{family.prefix(i)}.{linear.name}.weight" for i in layers for linear in family.linears(cfg, i)}
    rtn = WEIGHTS["rtn"](num_bits=4, group_size=64)
    with CheckpointWriter(out, checkpoint) as writer:
        for name in checkpoint.header.tensors:
            if name in chosen:
                writer.add(name, rtn(checkpoint.read(name), Statistics()))
            else:
                writer.copy(name)
        writer.finish({}, {}, [])
    return out


def decode(step: Callable[[Any], Any], prompt: Any) -> tuple[float, float]:
    """Seconds to the first token, and the median of the next ones."""
    began = time.perf_counter()
    token = step(prompt)[:, -1:].argmax(-1)
    first, later = time.perf_counter() - began, []
    for _ in range(DECODED):
        began = time.perf_counter()
        token = step(token)[:, -1:].argmax(-1)
        later.append(time.perf_counter() - began)
    return first, float(np.median(later))


def torch_side(model: Model, prompt: torch.Tensor) -> tuple[float, float]:
    cache = KvCache(model.cfg.num_hidden_layers, PROMPT + DECODED + 1)
    with torch.no_grad():
        return decode(lambda tokens: model.forward(tokens, cache, last_only=True), prompt)


def onnx_side(model: OnnxModel, prompt: torch.Tensor) -> tuple[float, float]:
    model.start(1)
    return decode(model.step, prompt.numpy())


def divergence(path: Path, model: Model, windows: torch.Tensor, threads: int) -> float:
    """KL(FP32 runtime || file) in nats a token over `windows` (N, L)."""
    other = OnnxModel(path, threads)
    total = 0.0
    for window in windows:
        other.start(1)
        have = torch.from_numpy(other.step(window[None].numpy())).double().log_softmax(-1)
        with torch.no_grad():
            want = model.forward(window[None]).double().log_softmax(-1)
        total += float((want.exp() * (want - have)).sum(-1).mean())
    return total / len(windows)


def windows_of(model: Path, count: int, length: int) -> torch.Tensor:
    """The first windows of WikiText-2, or of random tokens where the text is absent."""
    text = DATA / "wt2.valid.txt"
    if not text.is_file():
        print(f"{text} is absent: divergence on random tokens")
        return torch.randint(0, 1000, (count, length), generator=torch.Generator().manual_seed(0))
    ids = load_tokenizer(model).encode(text.read_text()[:200_000])
    return torch.tensor(ids[: count * length]).view(count, length)


def main() -> None:
    """Export, check, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantized", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")  # read when a session is made
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    source = options.model
    packed = options.quantized or quantize(source, folder / "packed")
    stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    runtime = Model.load(source)
    windows = windows_of(source, 8, 256)
    files, sizes, losses = {}, {}, {}
    for name, knobs in SIDES.items():
        checkpoint = open_checkpoint(packed if knobs["quantized"] else source)
        rest = {key: value for key, value in knobs.items() if key != "quantized"}
        every, files[name] = folder / f"{len(files)}-all.onnx", folder / f"{len(files)}.onnx"
        export_onnx(checkpoint, every, "matmulnbits", **rest)
        losses[name] = divergence(every, runtime, windows, options.threads)
        sizes[name] = export_onnx(checkpoint, files[name], "matmulnbits", last_only=True, **rest)["bytes"] / stored
    sessions = {name: OnnxModel(path, options.threads) for name, path in files.items()}
    prompt = windows[:1, :PROMPT]
    best: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        taken = {"torch fp32": torch_side(runtime, prompt)}
        taken |= {name: onnx_side(session, prompt) for name, session in sessions.items()}
        for name, pair in taken.items():
            best[name] = [min(a, b) for a, b in zip(best.get(name, pair), pair, strict=True)]
    rows = [
        [
            name,
            round(1e3 * first, 1),
            round(1 / later, 1),
            round(best["torch fp32"][1] / later, 2),
            round(best["onnxruntime fp32"][1] / later, 2),
            losses.get(name),
            sizes.get(name),
        ]
        for name, (first, later) in best.items()
    ]
    columns = ["side", "first token ms", "decode tokens/s", "x torch", "x onnxruntime fp32", "KL nats", "of BF16"]
    facts = {"model": source.name, "threads": options.threads, "prompt": PROMPT, "rounds": options.rounds}
    present("onnxruntime_decode", columns, rows, facts)


if __name__ == "__main__":
    main()
