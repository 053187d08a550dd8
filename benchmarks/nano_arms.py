"""Ways to train a small student of the built-in model, on the same number of tokens: exact match on unseen problems.

    python -m benchmarks.nano_arms [--tokens 200000] [--problems 500] [--seeds 3] [--arms PATTERN ...]

The student has the layers and experts that keep at most a third of the teacher's parameters. Pairs that decide on
defaults: trained on data against distilled; verified traces against unverified; shuffled against a curriculum; off
policy against on policy; imitating alone against progressive. A verdict is the difference of the means over the seeds
with its standard error; the traces are written once a seed and both arms see the same number of their tokens.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import present
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.evaluation import reasoning
from deepseek_compress.models.resolve import resolve_model
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.distill import Distill
from deepseek_compress.stages.traces import Traces

COLUMNS = ("arm", "seed", "tokens", "share of parameters", "exact match", "CPU s", "load")
RATE = 1e-3
JOINT = {"joint": 0.5, "loss": {"forward_kl": 1.0, "contrastive": 0.1}, "learning_rate": RATE / 5}


class Arm(NamedTuple):
    """Knobs of `distill`; `traces` those of the stage whose text it is trained on; `then` those of a second phase."""

    name: str
    knobs: Mapping[str, Any]
    traces: Mapping[str, Any] | None = None
    then: Mapping[str, Any] | None = None


ARMS = (
    Arm("data", {"loss": "cross_entropy"}),
    Arm("distilled", {}),
    Arm("verified traces", {"loss": "cross_entropy"}, {"verifier": "builtin", "attempts": 2}),
    Arm("unverified traces", {"loss": "cross_entropy"}, {"verifier": "none", "attempts": 1}),
    Arm("curriculum", {"curriculum": {"by": "loss", "phases": 3}}),
    Arm("on policy", {"on_policy": 0.5}),
    Arm("progressive", {}, None, JOINT),
)
PAIRS = (
    ("distilled", "data"), ("verified traces", "unverified traces"), ("curriculum", "distilled"),
    ("on policy", "distilled"), ("progressive", "distilled"),
)  # fmt: skip


def train(arm: Arm, seed: int, tokens: int, size: Mapping[str, Any], problems: int, work: Path) -> Path:
    """The student of an arm."""
    teacher = resolve_model("builtin:nano")
    outputs = {"model": teacher}

    def context(name: str) -> Context:
        return Context(name, work / name, "", seed, {"sources": ["builtin"]}, outputs=outputs, tell=print)

    common: dict[str, Any] = {"learning_rate": RATE, **arm.knobs}
    if arm.traces is not None:
        stage = build(Traces, {"count": problems, "limit": 160, "least": 0.7, **arm.traces}, "traces")
        outputs["traces"] = stage.run(open_checkpoint(teacher), context("traces")).path
        common["text"] = "traces"
    first = tokens if arm.then is None else tokens * 2 // 3
    stage = build(Distill, {**common, **size, "tokens": first}, "distill")
    student = stage.run(open_checkpoint(teacher), context("student")).path
    if arm.then is None:
        return student
    stage = build(Distill, {**arm.then, "tokens": tokens - first}, "distill")
    return stage.run(open_checkpoint(student), context("joint")).path


def row(arm: Arm, seed: int, given: argparse.Namespace) -> list[Any]:
    """One training, judged."""
    work = Path(tempfile.mkdtemp(prefix="dsc-nano-arms-"))
    began, size = time.process_time(), {"layers": given.layers, "experts": given.experts}
    student = train(arm, seed, given.tokens, size, given.traces, work)
    model, words = Model.load(student), load_tokenizer(student)
    verdicts = reasoning.answer(model, words, reasoning.prepare(reasoning.load_suite("builtin", given.problems), words))
    right = sum(verdict.exact for verdict in verdicts) / len(verdicts)
    share = _parameters(student) / _parameters(resolve_model("builtin:nano"))
    shutil.rmtree(work)
    seconds, load = round(time.process_time() - began), round(os.getloadavg()[0], 1)
    return [arm.name, seed, given.tokens, round(share, 3), right, seconds, load]


def _parameters(path: Path) -> int:
    return sum(info.elements for info in open_checkpoint(path).header.tensors.values())


def verdicts(rows: Sequence[Sequence[Any]]) -> dict[str, str]:
    """For each pair the difference of exact match, seed by seed."""
    found = {}
    for better, worse in PAIRS:
        ours, theirs = ({r[1]: r[4] for r in rows if r[0] == name} for name in (better, worse))
        gained = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        if gained:
            error = statistics.stdev(gained) / len(gained) ** 0.5 if len(gained) > 1 else float("nan")
            found[f"{better} against {worse}"] = f"{statistics.mean(gained):+.4f} +- {error:.4f} ({len(gained)} seeds)"
    return found


def main() -> None:
    """Run the arms that are asked for and present them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000, help="each student is trained on")
    parser.add_argument("--problems", type=int, default=500, help="that judge")
    parser.add_argument("--traces", type=int, default=1500, help="problems that the teacher is asked")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", default=["*"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[Any]] = []
    for arm in (arm for arm in ARMS if any(fnmatch(arm.name, shell) for shell in given.arms)):
        for seed in range(given.seeds):
            rows.append(row(arm, seed, given))
            present("nano_arms", COLUMNS, rows, {"settings": vars(given), "verdicts": verdicts(rows)})


if __name__ == "__main__":
    main()
