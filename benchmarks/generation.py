"""Greedy answers in batches: our runtime against transformers' `generate`, same weights, same answers.

    python -m benchmarks.generation [MODEL] [--batch 32] [--new 64] [--rounds 3] [--threads 2]

MODEL is a checkpoint (built-in by default), which is written as plain BF16 for transformers and computed in float32 on
both sides. Answers are compared first; then the sides take turns, and the best of the rounds counts, in wall and in CPU
seconds: other work on the machine only slows down.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.common import present
from deepseek_compress.evaluation import reasoning
from deepseek_compress.models.resolve import resolve_model
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.recipe import Changes, read_recipe
from deepseek_compress.resources import recipe_path

COLUMNS = ["side", "tokens", "wall s", "CPU s", "tokens/CPU s", "x transformers (CPU)", "x transformers (wall)"]


def plain(model: Path, out: Path) -> Path:
    """The checkpoint as BF16."""
    from deepseek_compress import pipeline

    recipe = read_recipe(recipe_path("export"), Changes((), {"model": str(model), "export.target": "bf16"}, None))
    pipeline.run(recipe, out, flat=True)
    return out


def theirs(path: Path, prompts: list[list[int]], new: int, ends: tuple[int, ...]) -> Callable[[], list[list[int]]]:
    """transformers: left-padded, masked, with its cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])

    def run() -> list[list[int]]:
        with torch.no_grad():
            out = model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=list(ends),
                pad_token_id=0,
            )
        found = []
        for row in out[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            found.append(row[:end])
        return found

    return run


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, float]:
    cpu, began = time.process_time(), time.perf_counter()
    run()
    return time.perf_counter() - began, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", default="builtin:nano")
    for name, value in (("--batch", 32), ("--new", 64), ("--rounds", 3), ("--threads", 2)):
        parser.add_argument(name, type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = resolve_model(options.model)
    tokenizer = load_tokenizer(path)
    prompts = reasoning.prepare(reasoning.load_suite("builtin", options.batch), tokenizer).ids
    with TemporaryDirectory() as folder:
        same_weights = plain(path, Path(folder) / "bf16")
        other = theirs(same_weights, prompts, options.new, tokenizer.eos_ids)
        model = Model.load(same_weights)

        def ours() -> list[list[int]]:
            return model.generate(prompts, options.new, tokenizer.eos_ids, batch_size=options.batch)

        mine, expected = ours(), other()
        same = sum(a == b for a, b in zip(mine, expected, strict=True))
        if same != len(mine):
            raise SystemExit(f"{len(mine) - same} of {len(mine)} answers differ")
        rounds = [(timed(ours), timed(other)) for _ in range(options.rounds)]
    count, best = sum(map(len, mine)), [[min(r[side][i] for r in rounds) for i in (0, 1)] for side in (0, 1)]
    rows = [
        (name, count, wall, cpu, count / cpu, best[1][1] / cpu, best[1][0] / wall)
        for name, (wall, cpu) in zip(("dsc", "transformers"), best, strict=True)
    ]
    present("generation", COLUMNS, rows, vars(options) | {"same answers": f"{same} of {len(mine)}"})


if __name__ == "__main__":
    main()
