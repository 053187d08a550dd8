"""How long does a GPU take for a model, and does it make the model that the CPU makes?

    python -m benchmarks.gpu_model [--device cuda] [--only v3_block,data_free,nano,qwen] [--scratch DIR]
    python -m benchmarks.gpu_model --device cpu --tiny      # a dry run at small sizes, of the code alone

| part | what | bar |
|---|---|---|
| v3_block | `-r w4a16` of a full block of DeepSeek-V3 with 128 x 512 tokens, its output too | 115 s, 40 GB; R1 in 2 h |
| data_free | `-r w4a16-fast` of it, beside the disk: its bytes read, the output's written and read back | told |
| nano | the built-in model from CPU and GPU: codes that differ, KL to each other over KL to the original | 1 %, 1/20 |
| qwen | `-r w4a16` of R1-Distill-Qwen-1.5B's shape, random | 120 s |

Everything is written from a seed and deleted after; nothing is fetched. Needs Python 3.11, torch, nvcc and the packages
of `NEEDED`, whose wheels may lie anywhere on PYTHONPATH. Wall times are of whole commands. Without a GPU it says "not
measured".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("pydantic", "blake3", "numpy", "safetensors", "tokenizers", "transformers", "typer", "rich", "yaml", "scipy")
PARAMETERS = 671e9  # of DeepSeek-R1
BARS = {"block_s": 115.0, "gpu_bytes": 40e9, "hours": 2.0, "codes": 0.01, "kl": 1 / 20, "qwen_s": 120.0}
PROBE = 1 << 30  # bytes of the file that the disk is measured with
QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16", "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02,
    "intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 21, "num_attention_heads": 12,
    "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "sliding_window": None, "tie_word_embeddings": False, "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
TINY_V3: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "n_routed_experts": 8, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 128,
    "kv_lora_rank": 128,
}  # fmt: skip
TINY_QWEN = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "vocab_size": 8192}  # fmt: skip
Options = argparse.Namespace


def inside(record: Path, whole: bool, arguments: list[str]) -> None:
    """`dsc` in this process; the GPU's peak goes to `record`. `whole`: the last block's output is computed too."""
    try:
        if whole:
            from benchmarks import v3_block

            v3_block.inside(record.with_suffix(".times"), arguments)
        else:
            from deepseek_compress import cli

            sys.argv = ["dsc", *arguments]
            cli.main()
    finally:
        peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
        record.write_text(json.dumps({"gpu_peak_bytes": peak}))


def dsc(scratch: Path, *arguments: object, whole: bool = False) -> dict[str, Any]:
    """Run a command; seconds and the peak of the GPU. The program ends where it fails."""
    from benchmarks.common import measure

    record = scratch / "record.json"
    words = [str(word) for word in arguments]
    command = [sys.executable, "-m", "benchmarks.gpu_model", "--inside", str(record), "01"[whole], *words]
    print(" ".join(["dsc", *words]), file=sys.stderr, flush=True)
    cost = measure(command, {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}, ROOT)
    if cost.returncode:
        raise SystemExit(f"dsc {' '.join(words)} failed:\n{cost.output[-3000:]}")
    return {"wall_s": round(cost.wall_s, 1), **json.loads(record.read_text())}


def sizes(options: Options, samples: int, length: int) -> list[object]:
    """Calibration: as much as is asked for, or a little."""
    count, long = (2, 32) if options.tiny else (samples, length)
    return ["--samples", count, "--length", long]


def write_block(options: Options, out: Path) -> dict[str, Any]:
    """A block of DeepSeek-V3 with its text and tokenizer."""
    from benchmarks import make_v3_block

    if not options.tiny:
        return make_v3_block.make(out)
    made: dict[str, Any] = make_v3_block.make(out, 8, shards=1, sizes=TINY_V3)
    return made


def v3_block(options: Options, scratch: Path) -> dict[str, Any]:
    """The calibrated block, and the same without data beside the disk's rate."""
    source, out = scratch / "block", scratch / "out"
    made = write_block(options, source)
    common = ["-o", out, "--device", options.device, "--group-size", 32 if options.tiny else 128]
    text = ["--calibration", source / "text.txt", *sizes(options, 128, 512)]
    found: dict[str, Any] = {}
    if "v3_block" in options.only:
        knobs = ["--set", "weights.gptaq.largest=1"]  # as for all of the model, which is above the limit
        run = dsc(scratch, "quantize", source, "-r", "w4a16", *common, *text, *knobs, whole=True)
        hours = run["wall_s"] * PARAMETERS / made["linear_parameters"] / 3600
        shutil.rmtree(out)
        enough = run["gpu_peak_bytes"] is None or run["gpu_peak_bytes"] <= BARS["gpu_bytes"]
        passed = run["wall_s"] <= BARS["block_s"] and enough and hours <= BARS["hours"]
        found["v3_block"] = {**run, "hours_for_r1": round(hours, 2), "input_bytes": made["bytes"], "passed": passed}
    if "data_free" in options.only:
        run = dsc(scratch, "quantize", source, "-r", "w4a16-fast", *common)
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        read_rate, write_rate = disk(scratch)
        floor = made["bytes"] / read_rate + 2 * written / write_rate  # what is written is read back
        shutil.rmtree(out)
        found["data_free"] = {**run, "disk_s": round(floor, 1), "output_bytes": written}
    shutil.rmtree(source)
    return found


def disk(scratch: Path) -> tuple[float, float]:
    """Bytes a second, read and written with a sync, by one thread."""
    file, block = scratch / "probe", os.urandom(1 << 24)
    began = time.perf_counter()
    with open(file, "wb", buffering=0) as opened:
        for _ in range(PROBE // len(block)):
            opened.write(block)
        os.fsync(opened.fileno())
        written = PROBE / (time.perf_counter() - began)
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    with open(file, "rb", buffering=0) as opened:
        while opened.read(len(block)):
            pass
    read = PROBE / (time.perf_counter() - began)
    file.unlink()
    return read, written


def nano(options: Options, scratch: Path) -> dict[str, Any]:
    """The built-in model from both devices: codes that differ, KL to the original and to each other."""
    from deepseek_compress.checkpoint import open_checkpoint
    from deepseek_compress.tasks import mixture

    text = scratch / "unseen.txt"
    problems = mixture(1, 40 if options.tiny else 400, split="test")
    text.write_text("\n".join(f"{problem.prompt} {problem.solution}" for problem in problems))
    both = {"cpu": scratch / "cpu", "other": scratch / "other"}
    for name, out in both.items():
        device = "cpu" if name == "cpu" else options.device
        words = ["-r", "w4a16", "--group-size", 64, "--device", device, *sizes(options, 64, 512)]
        dsc(scratch, "quantize", "builtin:nano", "-o", out, *words)
    mine, theirs = (open_checkpoint(out) for out in both.values())
    packed = [name for name, info in mine.header.tensors.items() if info.encoding == "packed"]
    pairs = [(mine.read_quantized(name), theirs.read_quantized(name)) for name in packed]
    codes = [(one.codes != other.codes) for one, other in pairs if one is not None and other is not None]
    differ = sum(int(each.sum()) for each in codes) / sum(each.numel() for each in codes)

    def kl(model: Path, reference: object) -> float:
        page = Path(tempfile.mkdtemp(dir=scratch)) / "kl.json"
        words = ["--text", text, "--windows", 2 if options.tiny else 32, "--length", 128]
        options_ = ["--set", "efficiency=false", "--device", "cpu"]
        dsc(scratch, "evaluate", model, "--reference", reference, "-o", page, *words, *options_)
        return float(json.loads(page.read_text())["models"][-1]["metrics"]["kl_divergence"])

    own = [kl(out, "builtin:nano") for out in both.values()]
    each_other = kl(both["other"], both["cpu"])
    passed = differ <= BARS["codes"] and each_other <= BARS["kl"] * min(own)
    return {"nano": {"codes_that_differ": differ, "kl_to_original": own, "kl_to_each_other": each_other,
                     "passed": passed}}  # fmt: skip


def qwen(options: Options, scratch: Path) -> dict[str, Any]:
    """R1-Distill-Qwen-1.5B's shape, with random weights."""
    from benchmarks.make_checkpoint import write_checkpoint
    from benchmarks.make_v3_block import write_words

    source, out = scratch / "qwen", scratch / "out"
    made = write_checkpoint(source, {**QWEN, **(TINY_QWEN if options.tiny else {})}, "bf16", 2, 0, {})
    write_words(source, torch.Generator().manual_seed(0))
    text = ["--calibration", source / "text.txt", *sizes(options, 128, 512)]
    run = dsc(scratch, "quantize", source, "-o", out, "-r", "w4a16", "--device", options.device, *text)
    return {"qwen": {**run, "parameters": made["parameters"], "passed": run["wall_s"] <= BARS["qwen_s"]}}


PARTS: dict[str, Callable[[Options, Path], dict[str, Any]]] = {
    "v3_block": v3_block, "data_free": v3_block, "nano": nano, "qwen": qwen,
}  # fmt: skip


def unable(device: str) -> str | None:
    """Why nothing can be measured here."""
    if device != "cpu" and not torch.cuda.is_available():
        return "no CUDA device"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    names = " ".join({"yaml": "pyyaml"}.get(name, name) for name in missing)
    return f"missing: {', '.join(missing)}; pip install {names}" if missing else None


def main() -> None:
    """Measure each part; a table and one JSON line last."""
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]), sys.argv[3] == "1", sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs; no bar counts")
    options = parser.parse_args()
    if (why := unable(options.device)) is not None:
        print(f"gpu_model: not measured, {why}")
        print(json.dumps({"benchmark": "gpu_model", "measured": False, "why": why}))
        return
    torch.set_num_threads(1)  # of what is written from a seed
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        for part in dict.fromkeys(PARTS[name] for name in options.only):
            found |= part(options, Path(name))
    for part_name, facts in found.items():
        print(part_name, "  ".join(f"{key} {value}" for key, value in facts.items()))
    device = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
    measured = options.device != "cpu" and not options.tiny
    print(json.dumps({"benchmark": "gpu_model", "measured": measured, "device": device, "bars": BARS, **found}))


if __name__ == "__main__":
    main()
