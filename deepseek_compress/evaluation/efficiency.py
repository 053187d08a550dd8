"""Efficiency of a checkpoint: bytes on disk, bits per weight, speed and peak memory in the evaluation runtime.

Speed and memory are taken in a process of its own, so that neither the models before it nor the caller's caches count;
a fork server has imported torch for all of them. One sequence at a time: a prompt is read whole (prefill), then tokens
follow one by one with a cache (decode); the median of a few runs counts. Peak memory is the highest resident size the
process ever had (`VmHWM`; `ru_maxrss` would inherit the parent's), what it touches of the libraries included.

These are numbers of the PyTorch runtime, which multiplies with unpacked float32 weights: a 4-bit checkpoint is as
fast here as its 16-bit source. Engines have their own numbers.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from deepseek_compress import processes
from deepseek_compress.checkpoint import Checkpoint, open_checkpoint
from deepseek_compress.errors import DscError

PROMPT, NEW, REPEATS = 256, 64, 3  # tokens of the prompt, tokens decoded, runs of which the median counts
PATIENCE = 20.0  # seconds after which no further run is begun: a model that large needs no median
UNKNOWN: dict[str, Any] = {"prefill_tokens_per_s": None, "decode_tokens_per_s": None, "peak_bytes": None}


def sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    """`bytes` (sum of *.safetensors), `parameters` (unpacked elements without scales), `bits_per_weight`."""
    total = sum(file.stat().st_size for file in checkpoint.path.glob("*.safetensors"))
    parameters = sum(info.elements for info in checkpoint.header.tensors.values())
    return {"bytes": total, "parameters": parameters, "bits_per_weight": 8 * total / parameters if parameters else None}


def speed_and_memory(path: Path, device: str = "cpu") -> dict[str, Any]:
    """`prefill_tokens_per_s`, `decode_tokens_per_s` and `peak_bytes` of the checkpoint at `path`, run on `device`.

    Raises `DscError` with what the process says where it fails (for instance for want of memory).
    """
    worker = processes.Workers(1, [__name__, *_PRELOAD])
    try:
        return dict(worker.submit(measure, path.resolve(), PROMPT, NEW, device).result())
    except processes.lost():
        said = "its process was killed"
    except Exception as error:
        said = str(error) or type(error).__name__
    finally:
        worker.kill()
    raise DscError(f"{path}: its speed could not be measured: {said}", "free memory, or set efficiency: false")


_PRELOAD = ("deepseek_compress.models.runtime", "deepseek_compress.planning.device")  # what `measure` imports


def measure(path: Path, prompt: int = PROMPT, new: int = NEW, device: str = "cpu") -> dict[str, Any]:
    """Load the checkpoint and time it, in this process."""
    import torch

    from deepseek_compress.models.runtime import Model
    from deepseek_compress.planning.device import synchronize

    model = Model.load(open_checkpoint(path), device=device)
    longest = model.cfg.max_position_embeddings or prompt + new
    prompt = max(1, min(prompt, longest - new))
    tokens = torch.randint(model.cfg.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    def once() -> tuple[float, float]:
        with torch.no_grad():
            cache = model.cache(prompt + new) if model.family.cached else None
            began, text = now(), tokens
            following = model.forward(text, cache, last_only=True)[:, -1].argmax(-1)
            between = now()
            for _ in range(new):
                text = following[:, None] if cache else torch.cat((text, following[:, None]), dim=1)  # all of it again
                following = model.forward(text, cache, last_only=True)[:, -1].argmax(-1)
            return prompt / (between - began), new / (now() - between)

    began = time.perf_counter()
    runs = [once()]
    while len(runs) <= REPEATS and time.perf_counter() - began < PATIENCE:
        runs.append(once())
    runs = runs[1:] or runs  # the first run pays for memory and threads
    return {
        "prefill_tokens_per_s": statistics.median(run[0] for run in runs),
        "decode_tokens_per_s": statistics.median(run[1] for run in runs),
        "peak_bytes": peak(),
    }


def peak() -> int | None:
    """Highest resident size of this process in bytes, None where the system does not tell it."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((row for row in text.splitlines() if row.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else None
