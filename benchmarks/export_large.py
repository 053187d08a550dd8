"""Export of a 1.5-billion-parameter model: how much memory, how long, how large?

    python -m benchmarks.export_large [--shape NAME] [--layers N] [--targets NAME ...] [--scratch DIR]

A random BF16 checkpoint of R1-Distill-Qwen-1.5B's shape (28 layers: 1.78 G parameters with both embeddings, 3.6 GB) is
made 4-bit asymmetric data-free, and each target is written from that, without verification, which would hold the model
in FP32. Bar: at most 3 GB peak resident (PSS over all processes, imports included) for the graphs; what the builder of
an engine needs is TensorRT's own and is reported beside. Each file is opened by its client afterwards: onnx checks the
graph, onnxruntime runs two tokens. `--shape v2-lite --layers 4`: DeepSeek-V2-Lite's widths, with its experts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, measure, present
from benchmarks.make_checkpoint import V2_LITE, write_checkpoint
from benchmarks.v2_lite import size_of

PYTHON, DSC = (str(ROOT / ".venv" / "bin" / name) for name in ("python", "dsc"))
MEMORY_BAR = 3e9
QWEN_1_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16", "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536,
    "initializer_range": 0.02, "intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 21,
    "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False, "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
TARGETS: dict[str, list[str]] = {
    "onnx": [],
    "onnxruntime": [],
    "onnxruntime, 8-bit embedding": ["--set", "embedding_bits=8"],
    "bf16": [],
    "tensorrt-rtx": ["--set", "compute_capabilities=[sm89]"],
}
SHAPES = {"qwen-1.5b": ("R1-Distill-Qwen-1.5B", QWEN_1_5B), "v2-lite": ("DeepSeek-V2-Lite", V2_LITE)}
BARRED = ("onnx", "onnxruntime", "onnxruntime, 8-bit embedding", "bf16")  # what we write ourselves
COLUMNS = ("target", "wall s", "CPU s", "peak GB", "file GB", "of BF16", "largest tensor GB", "client")

CLIENT = """
import sys
from pathlib import Path
from deepseek_compress.export.verify import OnnxModel
import numpy as np, onnx
path, source = map(Path, sys.argv[1:])
onnx.checker.check_model(str(path))
model = OnnxModel(path, 2)
model.start(1)
logits = model.step(np.array([[1, 2]]))
assert np.isfinite(logits).all(), "not finite"
print(f"onnx checks it, onnxruntime gives logits {logits.shape}")
"""


def ask_client(folder: Path, source: Path) -> str:
    """What a client says about a graph."""
    command = [PYTHON, "-c", CLIENT, str(folder / "model.onnx"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return lines[-1][:200] if lines else "no answer"


def export(name: str, packed: Path, out: Path, stored: int, largest: int) -> list[Any]:
    """One target: cost, size and what a client says."""
    target = name.split(",")[0]
    command = [DSC, "export", str(packed), "-o", str(out), "--target", target, "--set", "verify=false", *TARGETS[name]]
    cost = measure(command)
    if cost.returncode:
        return [name, cost.wall_s, cost.cpu_s, cost.peak_bytes / 1e9, None, None, largest / 1e9, cost.output[-300:]]
    written = size_of(out)
    told = ask_client(out, packed) if (out / "model.onnx").exists() and target.startswith("onnx") else ""
    shutil.rmtree(out)
    return [
        name, round(cost.wall_s, 1), round(cost.cpu_s, 1), round(cost.peak_bytes / 1e9, 2), round(written / 1e9, 3),
        round(written / stored, 3), round(largest / 1e9, 3), told,
    ]  # fmt: skip


def main() -> None:
    """Write, quantise, export, delete, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen-1.5b")
    parser.add_argument("--layers", type=int, help="the shape's own unless given")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=tuple(TARGETS))
    parser.add_argument("--scratch", type=Path, default=None)
    options = parser.parse_args()
    name, shape = SHAPES[options.shape]
    layers = options.layers or shape["num_hidden_layers"]
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        if shutil.disk_usage(scratch).free < 16e9:
            raise SystemExit(f"{scratch}: less than 16 GB free; give --scratch")
        source, packed = scratch / "model", scratch / "packed"
        made = write_checkpoint(source, {**shape, "num_hidden_layers": layers}, "bf16", 2, 0, {})
        stored = size_of(source)
        done = measure([DSC, "quantize", str(source), "-o", str(packed), "-r", "w4a16-fast"])
        if done.returncode:
            raise SystemExit(f"quantize failed:\n{done.output[-3000:]}")
        shutil.rmtree(source)
        largest = shape["vocab_size"] * shape["hidden_size"] * 4  # the embedding in FP32
        rows = []
        for target in options.targets:
            rows.append(export(target, packed, scratch / "out", stored, largest))
            print(rows[-1], file=sys.stderr, flush=True)
    facts = {
        "model": f"{name}'s shape, {layers} layers, random, 4-bit asymmetric, group 128",
        "parameters": made["parameters"],
        "bar_gb": MEMORY_BAR / 1e9,
        "passed": all(row[3] <= MEMORY_BAR / 1e9 and row[4] for row in rows if row[0] in BARRED),
        "load": round(os.getloadavg()[0], 1),
    }
    present("export_large" if shape is QWEN_1_5B else f"export_{options.shape}", COLUMNS, rows, facts)


if __name__ == "__main__":
    main()
