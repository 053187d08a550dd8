"""Does a student stay where its loss is least, and does a cut one come back? KL and perplexity, before and after.

    python -m benchmarks.distillation MODEL --text FILE [--parts self cut qat] [--tokens 50000] [--seeds 3]

`self`: 150 steps that begin at the teacher, at the default learning rate, with all of its distribution (dense) and with
what a cache keeps of it (sampled). `cut`: a student with four of five layers, trained on the same tokens by the
default, by what a cache keeps, and by the default of before: T = 4, the 16 likeliest tokens and a bucket that is
tempered as if it were uniform, 0.3 of the text itself, learning rate 5e-4. `qat`: 3-bit weights by GPTQ, before and
after a training as they are stored; on weights that lie on a 4-bit grid it says little (`benchmarks.off_grid`). Judged
on the end of the file, which nobody is trained on.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import present
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.distillation import words
from deepseek_compress.distillation.documents import Batch, Document
from deepseek_compress.distillation.losses import Target, losses_of
from deepseek_compress.distillation.objective import Objective
from deepseek_compress.distillation.students import Size, cut
from deepseek_compress.distillation.teachers import LiveTeacher, Said, Teacher
from deepseek_compress.distillation.trainer import Measured, Schedule, Trainer
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress
from deepseek_compress.stages.distill import CUT_RATE, WHOLE_RATE, Distill

SELF_STEPS = 150
ENTRIES = 22
COLUMNS = (
    "part",
    "arm",
    "seed",
    "steps",
    "tokens",
    "KL before",
    "KL",
    "perplexity before",
    "perplexity",
    "CPU s",
    "load",
)


class Recorded:
    """What a cache keeps of a live teacher, rounded as it is there."""

    def __init__(self, live: LiveTeacher, keep: Callable[[Tensor], Target]) -> None:
        self.live, self.keep = live, keep

    def said(self, batch: Batch, hidden: bool = False, routers: bool = False) -> Said:
        inner = self.live.said(batch)
        return Said(lambda rows: self.keep(inner.target(rows).log_probs))


def sampled(seed: int) -> Callable[[Tensor], Target]:
    """22 entries, float16."""
    generator = torch.Generator().manual_seed(seed)

    def keep(log_probs: Tensor) -> Target:
        draws = torch.rand(len(log_probs), generator=generator, dtype=torch.float64)
        found = words.sampled(log_probs, ENTRIES, draws)
        return Target(found.log_probs.half().float(), found.ids, found.certain)

    return keep


def uniform_bucket(log_probs: Tensor) -> Target:
    """The target of before, from log-probabilities at T = 1: the rest is tempered as if it were spread evenly."""
    best = log_probs.topk(16, dim=-1)
    others = log_probs.shape[-1] - 16
    rest = (1 - best.values.exp().sum(-1, keepdim=True)).clamp(min=1e-9).log()
    rest = (rest - math.log(others)) / 4 + math.log(others)
    tempered = torch.log_softmax(torch.cat((best.values / 4, rest), -1), -1)
    return Target(tempered[:, :-1], best.indices)


class Arm(NamedTuple):
    """A way to train."""

    name: str
    teacher: Callable[[LiveTeacher, int], Teacher]
    loss: Any = "forward_kl"
    temperature: float = 1.0
    rate: float | None = None


DENSE = Arm("default: all of the distribution", lambda live, seed: live)
SAMPLED = Arm("a cache: 22 sampled tokens", lambda live, seed: Recorded(live, sampled(seed)))
BEFORE = Arm(
    "before: T 4, top 16, uniform bucket", lambda live, seed: Recorded(live, uniform_bucket),
    {"forward_kl": 0.7, "cross_entropy": 0.3}, 4.0, 5e-4,
)  # fmt: skip


def train(arm: Arm, teacher: Model, student: Model, text: list[Document], schedule: Schedule) -> None:
    """Train `student` in place."""
    vocabulary = teacher.cfg.vocab_size
    live = LiveTeacher(teacher, vocabulary, 1.0)
    what = Objective(losses_of(arm.loss), arm.temperature, vocabulary)
    trainer = Trainer(student, arm.teacher(live, schedule.seed), text, what, schedule)
    trainer.run(lambda done, total, note: print(f"\r{arm.name} {done}/{total} {note}", end="", flush=True))
    print()


def judge(teacher: Model, student: Model, held: list[Document]) -> Measured:
    """KL at temperature 1 and perplexity on text that nobody was trained on."""
    vocabulary = teacher.cfg.vocab_size
    what = Objective(losses_of("forward_kl"), 1.0, vocabulary)
    schedule = Schedule(1, 1024, held_back=len(held))
    return Trainer(student, LiveTeacher(teacher, vocabulary, 1.0), held, what, schedule).measure(student)


def main() -> None:
    """Run the parts that are asked for and present them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=["self", "cut"])
    parser.add_argument("--arms", nargs="+", default=["default", "a cache", "before"])
    parser.add_argument("--tokens", type=int, default=50_000, help="a cut student is trained on")
    parser.add_argument("--self-batch", type=int, default=2048, help="tokens a step of the part self")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--held", type=int, default=4096, help="tokens that judge")
    parser.add_argument("--samples", type=int, default=64, help="of calibration text, part qat")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    checkpoint = open_checkpoint(given.model)
    teacher = Model.load(checkpoint)
    ids = load_tokenizer(given.model).encode(given.text.read_text(encoding="utf-8"))
    held = [Document(ids[-given.held :][i : i + given.length], 0) for i in range(0, given.held, given.length)]
    rows = []
    for part in given.parts:
        if part == "qat":
            for seed in range(given.seeds):
                rows.append(packed(seed, teacher, held, given))
                present("distillation", COLUMNS, rows, {"model": given.model.name, **_settings(given)})
            continue
        arms = [DENSE, SAMPLED] if part == "self" else [DENSE, SAMPLED, BEFORE]
        for arm in (arm for arm in arms if arm.name.startswith(tuple(given.arms))):
            for seed in range(given.seeds):
                rows.append(run(part, arm, seed, teacher, checkpoint.config, ids[: -given.held], held, given))
                present("distillation", COLUMNS, rows, {"model": given.model.name, **_settings(given)})


def run(
    part: str, arm: Arm, seed: int, teacher: Model, config: dict[str, Any], ids: list[int], held: list[Document],
    given: argparse.Namespace,
) -> list[Any]:  # fmt: skip
    """One row."""
    batch = given.self_batch if part == "self" else given.batch
    length = min(given.length, batch)
    wanted = SELF_STEPS * batch if part == "self" else given.tokens
    start = seed * 7919 % max(1, len(ids) - wanted)  # seeds see other text
    text = [Document(ids[start + i : start + i + length], 0) for i in range(0, wanted, length)]
    student = cut(teacher, config, Size(keep=0.8) if part == "cut" else Size(), text[:8], True).model
    before, began = judge(teacher, student, held), time.process_time()
    rate = arm.rate or (CUT_RATE if part == "cut" else WHOLE_RATE)
    train(arm, teacher, student, text, Schedule(-(-wanted // batch), batch, learning_rate=rate, seed=seed))
    after, load = judge(teacher, student, held), round(os.getloadavg()[0], 1)
    seconds = round(time.process_time() - began)
    figures = (before.kl, after.kl, before.perplexity, after.perplexity)
    return [part, arm.name, seed, -(-wanted // batch), wanted, *figures, seconds, load]


def packed(seed: int, teacher: Model, held: list[Document], given: argparse.Namespace) -> list[Any]:
    """One row of the part `qat`: GPTQ at 3 bits on the start of the text, then trained there as it is stored."""
    work, began = Path(tempfile.mkdtemp(prefix="dsc-qat-")), time.process_time()
    text = {"sources": [str(given.text)], "samples": given.samples, "length": given.length}

    def context(name: str) -> Context:
        return Context(name, work / name, "", seed, text, workers=1, outputs={"model": given.model}, tell=print)

    stage = build(Compress, {"weights": {"gptq": {"num_bits": 3, "symmetric": False}}}, "compress")
    first = stage.run(open_checkpoint(given.model), context("gptq")).path
    before = judge(teacher, Model.load(first), held)
    knobs = {"tokens": given.tokens, "batch_tokens": given.batch, "length": given.length}
    second = build(Distill, knobs, "distill").run(open_checkpoint(first), context("trained"))
    after, seconds = judge(teacher, Model.load(second.path), held), round(time.process_time() - began)
    shutil.rmtree(work)
    figures = (before.kl, after.kl, before.perplexity, after.perplexity)
    name = "3 bits by GPTQ, then trained"
    return ["qat", name, seed, second.facts["steps"], given.tokens, *figures, seconds, round(os.getloadavg()[0], 1)]


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(given).items() if key not in ("model", "text")}


if __name__ == "__main__":
    main()
