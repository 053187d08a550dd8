"""Where the KL of a 4-bit mixture of experts comes from: its parts alone, changed choices of experts, few tokens.

    python -m benchmarks.decompose [--case moe] [--recipe w4a16] [--windows N] [--set KNOB=VALUE ...]

Compresses the model of a case of the accuracy benchmark and puts the changed weights into the original one group at a
time; the KL is taken on the tuning windows of both texts. Second-order costs of independent errors add up; what the
whole has beyond their sum is interaction. With the original's choices forced, every token goes to the experts that the
original model chose, with the weights that the compressed router gives them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy import last_line
from benchmarks.cases import DSC, Case, case
from benchmarks.common import ROOT, measure, present
from deepseek_compress.models import moe as routing
from deepseek_compress.models.runtime import Model

BATCH = 16  # windows
COLUMNS = ("what is compressed", "KL like", "share", "KL other", "share of other")
LOW_RANK = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
PARTS: dict[str, Callable[[str], bool]] = {
    "everything": lambda name: True,
    "routed experts": lambda name: ".experts." in name,
    "shared experts": lambda name: "shared_experts" in name,
    "dense MLP": lambda name: ".mlp." in name and "experts" not in name,
    "attention": lambda name: "self_attn" in name,
    "attention: low-rank projections": lambda name: any(f".{part}." in name for part in LOW_RANK),
    "attention: o_proj": lambda name: ".o_proj." in name,
    "gate and up, everywhere": lambda name: ".gate_proj." in name or ".up_proj." in name,
    "down, everywhere": lambda name: ".down_proj." in name,
}

Choices = list[Tensor]


@contextmanager
def chosen(into: Choices | None = None, forced: Choices | None = None) -> Iterator[None]:
    """Record the experts of every routed call in their order, or force those that were recorded."""
    choose, replay = routing._choose, iter(forced or [])

    def watched(*arguments: Any) -> Tensor:
        found = choose(*arguments) if forced is None else next(replay)
        if into is not None:
            into.append(found)
        return found

    routing._choose = watched
    try:
        yield
    finally:
        routing._choose = choose


@torch.no_grad()
def log_probabilities(model: Model, windows: Tensor) -> Tensor:
    """float32 (windows, length - 1, vocabulary)."""
    return torch.cat([model(some)[:, :-1].log_softmax(-1) for some in torch.split(windows, BATCH)])


def kl(expected: Tensor, found: Tensor) -> float:
    """Nats a token."""
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def mixed(original: Model, compressed: Model, part: Callable[[str], bool]) -> Model:
    """`original` with the linears of one part from `compressed`."""
    weights = {n: compressed.weights[n] if part(n) else weight for n, weight in original.weights.items()}
    return Model(original.family, original.cfg, weights)


def judged(original: Model, compressed: Model, windows: Mapping[str, Tensor]) -> tuple[list[list[Any]], list[str]]:
    """The table's rows, and for each routed block the share of tokens whose experts change."""
    rows: dict[str, list[float]] = {name: [] for name in [*PARTS, "everything, choices of the original forced"]}
    changed: list[str] = []
    for kind, some in windows.items():
        theirs: Choices = []
        with chosen(theirs):
            expected = log_probabilities(original, some)
        for name, part in PARTS.items():
            ours: Choices = []
            with chosen(ours):
                found = log_probabilities(mixed(original, compressed, part), some)
            rows[name].append(kl(expected, found))
            if name == "everything":
                changed.append(f"{kind}: {', '.join(moved(theirs, ours, original))}")
        with chosen(forced=theirs):
            rows["everything, choices of the original forced"].append(kl(expected, log_probabilities(compressed, some)))
    whole = rows["everything"]
    table = []
    for name, values in rows.items():
        cells = [(round(value, 6), round(value / all_, 3)) for value, all_ in zip(values, whole, strict=True)]
        table.append([name, *(cell for pair in cells for cell in pair)])
    return table, changed


def moved(before: Choices, after: Choices, model: Model) -> list[str]:
    """For each routed block the share of tokens with another set of experts."""
    layers = [layer for layer in range(model.cfg.num_hidden_layers) if model.cfg.is_moe(layer)]
    found = []
    for place, layer in enumerate(layers):
        pairs = zip(before[place :: len(layers)], after[place :: len(layers)], strict=True)
        same = torch.cat([(a.sort(1).values == b.sort(1).values).all(1) for a, b in pairs])
        found.append(f"block {layer} {1 - float(same.float().mean()):.3f}")
    return found


def by_tokens(out: Path) -> dict[str, Any]:
    """Relative output error of the routed experts' linears in four parts by the tokens an expert saw."""
    blocks = json.loads((out / "dsc_layers.json").read_text())["blocks"]
    linears = [x for block in blocks for x in block["linears"] if x["role"] == "expert" and x["output_error"]]
    tokens, errors = (np.array([x[key] for x in linears]) for key in ("tokens", "output_error"))
    order = np.argsort(tokens, kind="stable")
    quarters = {
        f"{tokens[part].min()} to {tokens[part].max()} tokens": round(float(errors[part].mean()), 5)
        for part in np.array_split(order, 4)
    }
    ranks = [np.argsort(np.argsort(values, kind="stable")) for values in (tokens, errors)]
    return {"mean_output_error": quarters, "rank_correlation": round(float(np.corrcoef(*ranks)[0, 1]), 3)}


def compress(subject: Case, recipe: str, knobs: list[str], out: Path) -> None:
    """Run `dsc quantize` on the calibration text of the case."""
    text = ["--calibration", str(subject.calibration), "--samples", str(subject.samples)]
    settings = [word for knob in knobs for word in ("--set", knob)]
    command = [*DSC, "quantize", str(subject.model), "-o", str(out), "-r", recipe, "--group-size", str(subject.group)]
    done = measure([*command, "--length", str(subject.length), *text, *settings], {"PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise SystemExit(last_line(done.output))


def main() -> int:
    """Compress, take apart, present."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", default="moe")
    parser.add_argument("--recipe", default="w4a16")
    parser.add_argument("--windows", type=int, default=80, help="of each text, the first ones")
    parser.add_argument("--set", nargs="*", default=[], dest="knobs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    subject = case(options.case)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        compress(subject, options.recipe, options.knobs, out)
        windows = {
            kind: torch.tensor(subject.judging_windows(kind, "tuning")[: options.windows]) for kind in subject.texts
        }
        table, changed = judged(Model.load(subject.model), Model.load(out), windows)
        errors = by_tokens(out)
    facts = {
        "case": options.case,
        "recipe": " ".join([options.recipe, *options.knobs]),
        "windows": options.windows,
        "judged_on": "tuning windows",
    }
    present("decompose", COLUMNS, table, {**facts, "tokens_with_other_experts": changed, "experts": errors})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
