"""What 8-bit activations and a KV cache of few bits cost in accuracy.

    python -m benchmarks.activations [--cases smollm2 nano] [--only PATTERN ...] [--scratch DIR]

Each checkpoint is made by the command line with the calibration text of `benchmarks.accuracy` (64 x 512 tokens, groups
of 64) and judged as there, on 20 windows of 512 tokens that nobody calibrated on: KL to the original, perplexity,
agreement on the likeliest token. Rows about the cache change nothing but the cache, of the original model and of the
4-bit one; rows that name their inputs round them otherwise over the same weights. `added` is the KL above that of the
row it is compared with (the original has none). Bars: W4A8 dynamic adds at most 0.015 to W4A16, W8A8 at most 0.015, a
cache of 8 bits at most 0.001. Every computation is in float32; `bytes a token` is what the keys and values of one token
take in all blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.accuracy import original, told
from benchmarks.cases import DSC, Case, case
from benchmarks.common import present
from deepseek_compress.evaluation.divergence import measure as divergence
from deepseek_compress.models.activations import InputScheme
from deepseek_compress.models.cache import cache_bytes
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.activations import Dynamic
from deepseek_compress.numerics.kv_cache import ANCHOR, KvRounding

COLUMNS = ("model", "scheme", "cache", "KL", "added", "bar", "perplexity", "top-1", "bytes a token", "passed")
Settings = tuple[str, ...]


class Row(NamedTuple):
    """A recipe with changes (None: the original model), how its cache is stored, and what it may add to which row.

    `inputs`: how they are rounded over the weights that the recipe made; None: as the recipe says.
    """

    label: str
    recipe: str | None
    settings: Settings = ()
    cache: KvRounding | None = None
    against: str = "original"
    bar: float | None = None
    inputs: InputScheme | None = None


CACHES = {
    "8 bits": KvRounding(num_bits=8),
    "4 bits": KvRounding(num_bits=4),
    "4 bits, deltas": KvRounding(num_bits=4, delta=True),
    "4 bits, groups of 32, deltas": KvRounding(num_bits=4, group_size=32, delta=True),
}
BARS = {8: 0.001, 4: None}
UNROUNDED, ZERO_POINTS = InputScheme(lambda x: x), InputScheme(Dynamic(symmetric=False))
ROWS = (
    Row("W4A16", "w4a16"),
    *(Row("original", None, cache=kind, bar=BARS[kind.num_bits]) for kind in CACHES.values()),
    Row("W4A16", "w4a16", cache=CACHES["8 bits"], against="W4A16", bar=0.001),
    Row("W4A8, nothing moved", "w4a8", ("migration=null",), against="W4A16"),
    Row("W4A8", "w4a8", against="W4A16", bar=0.015),
    Row("W4A16 of W4A8: 16-bit inputs", "w4a8", against="W4A16", inputs=UNROUNDED),
    Row("W8A8, nothing moved", "w8a8", ("migration=null",)),
    Row("W8A8", "w8a8", bar=0.015),
    Row("W8A8, zero points of inputs", "w8a8", bar=0.015, inputs=ZERO_POINTS),
)


def made(row: Row, subject: Case, scratch: Path) -> Path:
    """The directory of the row's checkpoint, made once."""
    if row.recipe is None:
        return subject.model
    out = scratch / "-".join([subject.name, row.recipe, *row.settings]).replace("=", "-")
    if not (out / "config.json").exists():
        command = [*DSC, "quantize", str(subject.model), "-o", str(out), "-r", row.recipe]
        command += ["--calibration", str(subject.calibration), "--samples", str(subject.samples)]
        command += ["--length", str(subject.length)]
        command += [] if row.recipe == "w8a8" else ["--group-size", str(subject.group)]  # w8a8: one scale a row
        command += [part for setting in row.settings for part in ("--set", setting)]
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return out


def judged(row: Row, subject: Case, scratch: Path) -> dict[str, Any]:
    """What `judge` says of the row, once."""
    named = f"{subject.name}, {row.label}, {_cache(row)}.json"
    kept = scratch / named.replace(" ", "_")
    if not kept.exists():
        kept.write_text(json.dumps(judge(made(row, subject, scratch), row, subject)))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def _cache(row: Row) -> str:
    return next((name for name, kind in CACHES.items() if kind == row.cache), "16 bits")


def judge(path: Path, row: Row, subject: Case) -> dict[str, Any]:
    """KL and the rest of the model at `path` with its cache as the row says."""
    samples, trace = original(subject)
    model = Model.load(path, kv_cache=row.cache)
    if row.inputs is not None:
        model = Model(model.family, model.cfg, model.weights, row.inputs, row.cache)
    size = cache_bytes(model.cfg, row.cache)
    found = divergence(model, samples, trace)
    return {
        "KL": round(found.kl_divergence or 0.0, 5),
        "perplexity": round(found.perplexity, 3),
        "top-1": round(found.top1_agreement or 0.0, 4),
        "bytes a token": None if size is None else size.stored,
    }


def verdict(row: Row, result: dict[str, Any], before: dict[str, float]) -> dict[str, Any]:
    """What the row adds to the one it is compared with."""
    added = None if row.against not in before else round(result["KL"] - before[row.against], 5)
    passed = None if added is None or row.bar is None else added <= row.bar
    return {**result, "added": added, "bar": row.bar, "passed": passed}


def unpacking(repeats: int = 20) -> dict[str, float]:
    """CPU microseconds that 4,096 keys of 8 heads and 128 channels take from 8-bit codes to float32, on one thread.

    Deltas are added up within the tokens that begin with one that stands alone.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (8, 4096, 128), dtype=torch.uint8, generator=generator)
    scale, zero = (torch.rand(8, 4096, 1, generator=generator) for _ in range(2))

    def plain() -> Tensor:
        return (codes.float() - zero).mul_(scale)

    def deltas() -> Tensor:
        return plain().view(8, -1, ANCHOR, 128).cumsum(2).view(8, 4096, 128)

    keys = torch.randn(1, 8, 4096, 128, generator=generator).cumsum(2)
    stored = KvRounding(num_bits=4, delta=True).keys(keys, torch.arange(4096)[None], None)[0].view(8, -1, ANCHOR, 128)
    steps = torch.cat((stored[:, :, :1], stored[:, :, 1:] - stored[:, :, :-1]), dim=2)
    assert torch.allclose(steps.cumsum(2), stored, rtol=1e-4, atol=1e-4), "reading is adding up"
    found = {}
    for read in (plain, deltas):
        read()
        began = time.process_time()
        for _ in range(repeats):
            read()
        found[read.__name__] = round(1e6 * (time.process_time() - began) / repeats)
    return found


def table(subject: Case, wanted: Sequence[str], scratch: Path) -> list[list[Any]]:
    """The rows of one model."""
    lines, before = [], {"original": 0.0}
    for row in ROWS:
        if any(fnmatch(row.label, pattern) for pattern in wanted):
            result, cache = verdict(row, judged(row, subject, scratch), before), _cache(row)
            if row.cache is None:
                before[row.label] = result["KL"]
            print(f"{subject.name}, {row.label}, cache {cache}: {result}", file=sys.stderr, flush=True)
            known = {**result, "model": subject.name, "scheme": row.label, "cache": cache}
            lines.append([known.get(column) for column in COLUMNS])
    return lines


def main() -> int:
    """Make, judge and present the rows asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=["smollm2", "moe", "nano"])
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of names")
    parser.add_argument(
        "--scratch", type=Path, help="where checkpoints and what was judged lie; what is there is taken"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.cases:
            lines += table(case(name), options.only, options.scratch or Path(temporary))
    facts = {
        "calibration": {name: told(case(name)) for name in options.cases},
        "judged_on": "judging windows of the text of the same kind; W8: one scale a row",
        "microseconds_to_unpack_4096_keys_of_8_heads": unpacking(),
        "passed": all(line[-1] for line in lines if line[-1] is not None),
    }
    present("activations", COLUMNS, lines, facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
