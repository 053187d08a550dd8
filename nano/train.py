"""Train the built-in model on the built-in tasks.

    python -m nano.train --out runs/nano --tokens 20e6

Runs on a GPU or a CPU, writes `log.jsonl` (loss, exact match by family over time), keeps the best weights in `best.pt`,
saves its whole state every five minutes and goes on from it when it is started again with the same `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from deepseek_compress import tasks
from nano import data
from nano import model as nano
from nano.optimizer import optimizers

SAVE_EVERY = 300.0  # seconds


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=20e6, help="tokens to train on, padding not counted")
    parser.add_argument("--unique", type=float, default=0, help="tokens to generate (0: as many as are trained on)")
    parser.add_argument("--batch", type=int, default=16384, help="tokens a step, padding counted")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--pull", type=float, default=0.008, help="L1 decay of the matrices")
    parser.add_argument("--decay", type=float, default=0.5, help="share of the steps over which the rate falls to 0")
    parser.add_argument("--gamma", type=float, default=2e-3, help="step of the router's balancing bias")
    parser.add_argument("--missing", type=float, default=0.5, help="share of the steps in which experts are taken out")
    parser.add_argument("--start", type=Path, help="weights to start from")
    parser.add_argument("--spread", type=float, default=0.0, help="sigma of the channels' scales, applied at the start")
    parser.add_argument("--tests", type=int, default=1000, help="test problems")
    parser.add_argument("--difficulty", default="", help="largest,limit,shortest,longest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=200, help="steps between tests")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end by then; the decay follows the time")
    return parser.parse_args(words)


def rate(step: int, done: float, decay: float, warmup: int = 50) -> float:
    """Warm-up, plateau, linear decay to zero: a share of the learning rate. `done` is the share of the run behind."""
    return min(1.0, (step + 1) / warmup, (1 - done) / decay)


def batch_of(rows: data.Rows, size: int, step: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw the batch of one step: rows without replacement, an epoch after the other, from `seed` alone."""
    ids, weights = rows
    per_epoch = max(1, len(ids) // size)
    order = np.random.default_rng([seed, step // per_epoch]).permutation(len(ids))
    picked = order[step % per_epoch * size :][:size]
    longest = int((ids[picked] != 0).sum(1).max())  # columns of padding alone are not worth their time
    return (
        torch.from_numpy(ids[picked, :longest].astype(np.int64)).to(device),
        torch.from_numpy(weights[picked, :longest].astype(np.float32)).to(device),
    )


def loss_of(model: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """Cross entropy of the next word, weighted by word."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


def unseen(
    difficulty: tasks.Difficulty, device: torch.device, count: int
) -> tuple[list[tasks.Problem], Tensor, Tensor]:
    """Problems that training has not seen and by which it chooses weights; what judges the model leaves them out."""
    problems = tasks.selection(count, difficulty)
    ids, weights = data.singles(problems)
    return (
        problems,
        torch.from_numpy(ids.astype(np.int64)).to(device),
        torch.from_numpy(weights.astype(np.float32)).to(device),
    )


def by_family(problems: list[tasks.Problem], right: list[bool]) -> dict[str, float]:
    """Share of right answers over all problems (`all`) and in each family."""
    groups: dict[str, list[bool]] = {"all": list(right)}
    for problem, good in zip(problems, right, strict=True):
        groups.setdefault(problem.family, []).append(good)
    return {name: round(sum(group) / len(group), 4) for name, group in groups.items()}


def train(options: argparse.Namespace) -> nn.Module:
    """Train; return the model with its best weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # TF32 products on a GPU, FP32 elsewhere
    difficulty = tasks.Difficulty(*map(int, options.difficulty.split(","))) if options.difficulty else tasks.DEFAULT
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    mean = 72  # tokens a problem
    singles, packed = data.pool(
        int((options.unique or options.tokens) / mean), options.seed, difficulty, options.workers
    )
    problems, ids, weights = unseen(difficulty, device, options.tests)
    model = nano.build(device, options.seed)
    if options.start:
        model.load_state_dict(torch.load(options.start, map_location=device))
    if options.spread:
        nano.spread(model, options.spread, options.seed)
    parts = optimizers(model, options.optimizer, options.lr, options.weight_decay, options.pull)
    sizes = (round(options.batch / mean), max(1, options.batch // data.PACKED))
    steps = int(options.tokens / options.batch)
    state: dict[str, Any] = {"step": 0, "tokens": 0.0, "best": -1.0, "seconds": 0.0}
    _resume(options.out, state, model, parts)
    _log(
        options.out,
        {"event": "start", "step": state["step"], "steps": steps, "setup_s": round(time.time() - started, 1)},
    )
    started, saved = time.time() - state["seconds"], time.time()
    for step in range(state["step"], steps):
        done = max(step / steps, (time.time() - started) / options.seconds)
        if done >= 1:
            break
        share = rate(step, done, options.decay)
        for part in parts:
            for group in part.param_groups:
                group["lr"] = options.lr * share
        rows, wanted = batch_of((singles, packed)[step % 2], sizes[step % 2], step // 2, options.seed, device)
        chance = np.random.default_rng([options.seed, step]).random()
        dropped = torch.Generator().manual_seed(step) if chance < options.missing else None
        real = (rows != 0).flatten().float()
        with nano.missing_experts(model, dropped):
            loss = loss_of(model, rows, wanted)
            nano.balance(model, real, options.gamma * share)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in parts:
            part.step()
            part.zero_grad(set_to_none=True)
        state.update(step=step + 1, tokens=state["tokens"] + int(real.sum()), seconds=time.time() - started)
        if (step + 1) % options.every == 0:
            _test(options, state, model, float(loss.detach()), problems, ids, weights)
        if time.time() - saved > SAVE_EVERY:
            _save(options.out, state, model, parts)
            saved = time.time()
    _test(options, state, model, float("nan"), problems, ids, weights)
    model.load_state_dict(torch.load(options.out / "best.pt", map_location=device))
    return model


def _test(
    options: argparse.Namespace, state: dict[str, Any], model: nn.Module, loss: float, problems: list[tasks.Problem],
    ids: Tensor, weights: Tensor,
) -> None:  # fmt: skip
    """Measure, log, and keep the weights if they are the best so far."""
    exact = by_family(problems, nano.chain_exact(model, ids, weights).tolist())
    _log(
        options.out,
        {"step": state["step"], "tokens": int(state["tokens"]), "seconds": round(state["seconds"], 1),
         "loss": round(loss, 4), "chain_exact": exact},
    )  # fmt: skip
    if exact["all"] >= state["best"]:
        state["best"] = exact["all"]
        torch.save(model.state_dict(), options.out / "best.pt.tmp")
        os.replace(options.out / "best.pt.tmp", options.out / "best.pt")


def _log(out: Path, record: dict[str, Any]) -> None:
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(out.name, json.dumps(record), flush=True)


def _save(out: Path, state: dict[str, Any], model: nn.Module, parts: list[torch.optim.Optimizer]) -> None:
    content = {"state": state, "model": model.state_dict(), "optimizers": [part.state_dict() for part in parts]}
    torch.save(content, out / "state.pt.tmp")
    os.replace(out / "state.pt.tmp", out / "state.pt")


def _resume(out: Path, state: dict[str, Any], model: nn.Module, parts: list[torch.optim.Optimizer]) -> None:
    if (out / "state.pt").exists():
        content = torch.load(out / "state.pt", map_location=next(model.parameters()).device)
        state.update(content["state"])
        model.load_state_dict(content["model"])
        for part, saved in zip(parts, content["optimizers"], strict=True):
            part.load_state_dict(saved)


if __name__ == "__main__":
    train(arguments())
