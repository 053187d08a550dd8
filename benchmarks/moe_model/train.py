"""Train the benchmark's mixture-of-experts model: DeepSeek-V3's architecture, 4 million parameters, public text.

    OMP_NUM_THREADS=1 python -m benchmarks.moe_model.train --out runs/moe [--tokens 6e6] [--until STEP]

An ordinary training run, so that its weights are what training leaves and nothing is arranged for a quantizer: Muon
(AdamW for embedding, head, router and norms), warm-up, plateau and linear decay to zero, experts balanced by the
router's bias (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). Everything follows from `--seed` and `--tokens`, which
decide when the decay begins. Saves its state every `SAVE_EVERY` seconds and goes on from it when it is started again;
at the end, or with `--publish` from the state saved last, writes the checkpoint in BF16 with the log beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.moe_model import text
from nano import model as nano
from nano.optimizer import optimizers
from nano.publish import unfused

CHECKPOINT = Path(__file__).parent / "checkpoint"
CONTEXT, ROWS = 256, 12  # tokens a row, rows a step
RATE, WARM_UP, DECAY = 4e-3, 40, 0.3  # learning rate; steps it rises; share of the run over which it falls
WEIGHT_DECAY, GAMMA = 0.1, 4e-3  # step of the balancing bias
TEST_EVERY, TEST_ROWS, SAVE_EVERY = 50, 8, 240.0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=6e6)
    parser.add_argument("--until", type=int, default=0, help="end after this step (0: all) and publish what is there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--publish", action="store_true", help="write the checkpoint of the saved state and end")
    return parser.parse_args()


def share_of_rate(step: int, steps: int) -> float:
    """Warm-up, plateau, linear decay to zero."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))


def rows_of(tokens: np.ndarray, step: int, seed: int) -> Tensor:
    """int64 (ROWS, CONTEXT): windows that start anywhere, drawn from `seed` and the step."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - CONTEXT, ROWS)
    return torch.from_numpy(np.stack([tokens[start : start + CONTEXT] for start in starts]))


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross entropy of the next token."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def test(model: nn.Module, held: dict[str, np.ndarray]) -> dict[str, float]:
    """Loss on the first rows of each held-out text, nats a token, and the largest share of tokens an expert gets."""
    found = {}
    for kind, tokens in held.items():
        count = min(TEST_ROWS, len(tokens) // CONTEXT)
        rows = torch.from_numpy(tokens[: count * CONTEXT]).view(count, CONTEXT)
        found[f"held_{kind}"] = round(float(loss_of(model, rows)), 4)
    loads = [moe.experts.chosen.mean(0) for moe in nano.mixtures(model)]
    found["largest_load"] = round(max(float(load.max() / load.mean()) for load in loads), 2)
    return found


def train(options: argparse.Namespace) -> None:
    """The run: learn, test, save, publish."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    parts = {kind: text.split(found) for kind, found in text.documents().items()}
    config = json.loads((CHECKPOINT / "config.json").read_text())
    learnt = [document for learn, _ in parts.values() for document in learn]
    if not (out / "tokenizer.json").exists():
        text.train_tokenizer(learnt, config["vocab_size"], out)
    tokens = text.stream(learnt, out / "tokenizer.json", options.seed)
    held = {kind: text.stream(rest, out / "tokenizer.json", options.seed) for kind, (_, rest) in parts.items()}
    model = nano.build(torch.device("cpu"), options.seed, CHECKPOINT / "config.json")
    steppers = optimizers(model, "muon", RATE, WEIGHT_DECAY, 0.0)
    steps = int(options.tokens / (CONTEXT * ROWS))
    state: dict[str, Any] = {"step": 0, "seconds": 0.0}
    if (out / "state.pt").exists():
        saved = torch.load(out / "state.pt")
        state = saved["state"]
        model.load_state_dict(saved["model"])
        for part, kept in zip(steppers, saved["optimizers"], strict=True):
            part.load_state_dict(kept)
    if options.publish:
        publish(model, out)
        return
    if state["step"] == 0:
        sizes = {"parameters": sum(p.numel() for p in model.parameters()), "unique_tokens": len(tokens)}
        log(out, {"event": "start", **sizes, "steps": steps, "tokens_a_step": CONTEXT * ROWS, "seed": options.seed})
    learn(options, model, steppers, state, steps, tokens, held)
    publish(model, out)


def learn(
    options: argparse.Namespace, model: nn.Module, steppers: list[torch.optim.Optimizer], state: dict[str, Any],
    steps: int, tokens: np.ndarray, held: dict[str, np.ndarray],
) -> None:  # fmt: skip
    """The steps that are left of the run."""
    began, saved = time.time() - state["seconds"], time.time()
    for step in range(state["step"], min(steps, options.until or steps)):
        share = share_of_rate(step, steps)
        for group in (group for part in steppers for group in part.param_groups):
            group["lr"] = RATE * share
        loss = loss_of(model, rows_of(tokens, step, options.seed))
        nano.balance(model, torch.ones(CONTEXT * ROWS), GAMMA * share)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in steppers:
            part.step()
            part.zero_grad(set_to_none=True)
        state.update(step=step + 1, seconds=time.time() - began)
        if (step + 1) % TEST_EVERY == 0 or step + 1 in (10, steps):
            behind = {"step": step + 1, "tokens": (step + 1) * CONTEXT * ROWS, "seconds": round(state["seconds"], 1)}
            values = {"loss": round(float(loss.detach()), 4), "gradient_norm": round(float(norm), 3)}
            log(options.out, {**behind, **values, **test(model, held)})
        if time.time() - saved > SAVE_EVERY or step + 1 == (options.until or steps):
            content = {"state": state, "model": model.state_dict()}
            content["optimizers"] = [part.state_dict() for part in steppers]
            torch.save(content, options.out / "state.pt.tmp")
            os.replace(options.out / "state.pt.tmp", options.out / "state.pt")
            saved = time.time()


def publish(model: nn.Module, out: Path) -> None:
    """Write `out/checkpoint`: BF16, the router's bias in float32, tokenizer, config and the log."""
    folder = out / "checkpoint"
    folder.mkdir(exist_ok=True)
    weights = {name: tensor.detach() for name, tensor in unfused(model.state_dict()).items()}
    stored = {
        name: (tensor.float() if name.endswith("e_score_correction_bias") else tensor.bfloat16()).contiguous()
        for name, tensor in weights.items()
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(out / name, folder / name)
    shutil.copy(CHECKPOINT / "config.json", folder / "config.json")
    shutil.copy(out / "log.jsonl", folder / "training.jsonl")
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    save_file(dict(sorted(stored.items())), folder / "model.safetensors", metadata={"format": "pt"})


def log(out: Path, record: dict[str, Any]) -> None:
    """Append a line to the log and print it."""
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(arguments())
