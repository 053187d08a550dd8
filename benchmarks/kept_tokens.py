"""Memory of a cache against KL on long text: fewer bits, differences, and keeping only some tokens.

    python -m benchmarks.kept_tokens [--cases smollm2 moe] [--length 2048] [--windows 4] [--reuse]

SmolLM2-135M (an ordinary cache) and the benchmark's own DeepSeek-V3 (latent attention; at most the 1,024 tokens that it
has places for), WikiText-2's validation text, KL to the model with a 16-bit cache over all positions. The bytes of a
token are a mean over a text of that length, grids and what is held between two decisions included. `62 %` rows keep as
many tokens as fit into 38 % of the 16-bit bytes, half of them newest, half important. Intervals at 95 % by bootstrap
over windows, where there are two and more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cases import WIKITEXT, Case, case
from benchmarks.common import REPORTS, present
from benchmarks.peers import cache
from deepseek_compress.evaluation.divergence import Sample, measure, record
from deepseek_compress.evaluation.statistics import Bootstrap
from deepseek_compress.evaluation.trace import Trace
from deepseek_compress.models.cache import cache_bytes
from deepseek_compress.models.config import ModelConfig
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.numerics.kv_cache import EVERY, KvRounding

SHARE = 0.38  # of the bytes of a 16-bit cache: 62 % less
SINKS = 4
COLUMNS = ("model", "scheme", "bytes a token", "less memory", "KL", "low", "high", "windows", "length")


class Scheme(NamedTuple):
    """A row: its name and the knobs; with `fitted`, `window` and `important` are what fits into SHARE."""

    label: str
    knobs: dict[str, Any]
    fitted: bool = False
    newest: float = 0.5  # share of the tokens fitted that are the newest; the others are important ones


SCHEMES = (
    Scheme("8 bits", {"num_bits": 8}),
    Scheme("4 bits", {"num_bits": 4}),
    Scheme("4 bits, differences", {"num_bits": 4, "delta": True}),
    Scheme("62 %: 8 bits kept, rest 4 bits", {"num_bits": 8, "rest": 4}, True),
    Scheme("62 %: combined (8 bits kept, rest 4 bits, differences)", {"num_bits": 8, "rest": 4, "delta": True}, True),
    Scheme("62 %: 16 bits, newest and important, rest dropped", {"num_bits": 16}, True),
    Scheme("62 %: 16 bits, newest alone, rest dropped", {"num_bits": 16}, True, 1.0),
    Scheme("62 %: 8 bits, newest and important, rest dropped", {"num_bits": 8}, True),
)


def rounding(scheme: Scheme, cfg: ModelConfig, length: int) -> KvRounding:
    """The scheme for texts of `length` tokens."""
    if not scheme.fitted:
        return KvRounding(**scheme.knobs)
    best = None
    for count in range(8, length, 8):
        newest = max(1, round(scheme.newest * count))
        how = KvRounding(**scheme.knobs, window=newest, sinks=SINKS, important=count - newest)
        size = cache_bytes(cfg, how, length)
        assert size is not None
        if size.stored > SHARE * size.plain or count + SINKS + EVERY > length:
            break
        best = how
    if best is None:
        raise SystemExit(f"{scheme.label}: nothing fits at {length} tokens; give a larger --length")
    return best


def windows_of(subject: Case, count: int, length: int) -> list[Sample]:
    """The first windows of the text."""
    tokens = load_tokenizer(subject.model).encode(WIKITEXT.read_text(encoding="utf-8"))
    if len(tokens) < count * length:
        raise SystemExit(f"{WIKITEXT}: {len(tokens)} tokens, fewer than {count} windows of {length}")
    return [Sample(tokens[i * length : (i + 1) * length], 1) for i in range(count)]


def judged(model: Model, how: KvRounding, samples: list[Sample], trace: Trace) -> list[float]:
    """KL of each window, nats a token."""
    changed = Model(model.family, model.cfg, model.weights, kv_cache=how)
    found = measure(changed, samples, trace)
    assert found.kl is not None
    return [kl / tokens for kl, tokens in zip(found.kl, found.tokens, strict=True)]


def run(name: str, count: int, length: int, reuse: bool) -> list[list[Any]]:
    """All rows of a model; each is kept as soon as it is measured."""
    subject, lines = case(name), []
    model = Model.load(subject.model)
    length = min(length, model.cfg.max_position_embeddings)
    samples = windows_of(subject, count, length)
    with tempfile.TemporaryDirectory() as folder:
        trace: Trace | None = None
        for scheme in SCHEMES:
            how = rounding(scheme, model.cfg, length)
            kept = cache() / "kept_tokens" / f"{name}-{count}-{length}-{digest_of(how)}.json"
            if reuse and kept.exists():
                found = json.loads(kept.read_text())
            else:
                trace = trace or record(model, samples, Path(folder))[0]
                found = judged(model, how, samples, trace)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(found))
            size = cache_bytes(model.cfg, how, length)
            assert size is not None
            low, high = Bootstrap(len(found)).ratio(found) or (None, None) if len(found) > 1 else (None, None)
            less = round(1 - size.stored / size.plain, 3)
            mean = sum(found) / len(found)
            lines.append([name, told(scheme, how), round(size.stored, 1), less, mean, low, high, count, length])
            print(lines[-1], flush=True)
    return lines


def digest_of(how: KvRounding) -> str:
    """Of the knobs."""
    return hashlib.sha256(how.model_dump_json().encode()).hexdigest()[:12]


def told(scheme: Scheme, how: KvRounding) -> str:
    """The label with what fits."""
    return f"{scheme.label} ({how.window} + {how.important})" if scheme.fitted else scheme.label


def picture(lines: list[list[Any]], path: Path) -> None:
    """KL against the share of the 16-bit bytes, a panel a model; lower left is better."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kept_tokens"
    from matplotlib import pyplot

    names = list(dict.fromkeys(line[0] for line in lines))
    figure, panels = pyplot.subplots(1, len(names), figsize=(7 * len(names), 5), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for place, (_, label, _, less, mean, *_) in enumerate(line for line in lines if line[0] == name):
            panel.plot(1 - less, mean, "o", color="#c0392b" if "dropped" in label else "#34495e")
            panel.annotate(
                label, (1 - less, mean), xytext=(6, 3 - 9 * (place % 2)), textcoords="offset points", fontsize=7
            )
        panel.axvline(SHARE, color="#888888", linewidth=0.8)
        panel.set(yscale="log", title=name, xlabel="bytes of a token, share of 16 bits", ylabel="KL, nats a token")
        panel.margins(x=0.4, y=0.15)
        panel.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    """Measure, draw, present."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=["smollm2", "moe"])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--reuse", action="store_true", help="take rows measured before")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [line for name in options.cases for line in run(name, options.windows, options.length, options.reuse)]
    REPORTS.mkdir(exist_ok=True)
    picture(lines, REPORTS / "kept_tokens.svg")
    present("kept_tokens", COLUMNS, lines, {"text": WIKITEXT.name, "sinks": SINKS, "decided_every": EVERY})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
