"""Train a student on a teacher's traces: AdamW over its weights, zeros of a 2:4 mask held at zero.

A short warm-up, then a straight line to zero. Batches have documents of similar length, so that little of them is
padding, and are visited in an order drawn anew for each pass. Training can be stopped and gone on with: the state after
a step is everything the next one needs, and the batches follow from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_compress.distillation.losses import distillation_loss
from deepseek_compress.distillation.traces import Trace, batches_by_length, target_of
from deepseek_compress.models import Role
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics import pattern

WARM_UP = 10  # steps until the learning rate is reached
BETAS = (0.9, 0.95)
LARGEST_NORM = 1.0  # of the gradient of all weights together


class Schedule(NamedTuple):
    """How a student is trained."""

    steps: int
    batch_tokens: int
    learning_rate: float
    temperature: float
    cross_entropy: float
    seed: int


class State(NamedTuple):
    """Everything a later step follows from."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    losses: list[float]


def masks_of(weights: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """float32 0/1 masks of the weights among `names` that are 2:4 sparse: their zeros stay."""
    return {name: (weights[name] != 0).float() for name in names if pattern.holds(weights[name])}


def train(
    student: Model,
    traces: Sequence[Trace],
    schedule: Schedule,
    masks: Mapping[str, Tensor],
    progress: Callable[[int, int, str], None],
    state: State | None = None,
    save: Callable[[State], None] | None = None,
) -> list[float]:
    """Change `student.weights` in place; the loss of each step. `save` is offered the state after every step."""
    weights = {
        name: tensor.detach().clone().requires_grad_(_trained(student, name))
        for name, tensor in (state.weights if state else student.weights).items()
    }
    learner = Model(student.family, student.cfg, weights)
    leaves = [tensor for tensor in weights.values() if tensor.requires_grad]
    adam = torch.optim.AdamW(leaves, lr=schedule.learning_rate, betas=BETAS, weight_decay=0.0)
    if state:
        adam.load_state_dict(state.optimizer)
    losses = list(state.losses) if state else []
    batches = _batches(traces, schedule)
    for step in range(state.step if state else 0, schedule.steps):
        chosen = [traces[index] for index in batches[step]]
        losses.append(_step(learner, chosen, schedule, adam, leaves, step))
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name].mul_(mask)
        progress(step + 1, schedule.steps, f"loss {losses[-1]:.4f}")
        if save is not None:
            save(State(step + 1, weights, adam.state_dict(), losses))
    for name, tensor in weights.items():
        student.weights[name].copy_(tensor.detach())
    return losses


def _trained(student: Model, name: str) -> bool:
    """Everything but the bias that balances experts, which no gradient reaches."""
    return not (student.family.role(name) is Role.ROUTER and not name.endswith(".weight"))


def _batches(traces: Sequence[Trace], schedule: Schedule) -> list[list[int]]:
    """The documents of each step."""
    rng = random.Random(schedule.seed)
    lengths = [len(trace.ids) for trace in traces]
    found: list[list[int]] = []
    while len(found) < schedule.steps:
        order = list(range(len(traces)))
        rng.shuffle(order)  # ties in length fall differently in each pass
        groups = batches_by_length([lengths[index] for index in order], schedule.batch_tokens)
        rng.shuffle(groups)
        found += [[order[index] for index in group] for group in groups]
    return found[: schedule.steps]


def _step(
    learner: Model,
    traces: Sequence[Trace],
    schedule: Schedule,
    adam: torch.optim.AdamW,
    leaves: Sequence[Tensor],
    step: int,
) -> float:
    tokens, places, target = target_of(traces)
    logits = learner(tokens[:, :-1]).flatten(0, 1)[places]
    loss = distillation_loss(logits, target, schedule.temperature, schedule.cross_entropy)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(leaves, LARGEST_NORM)
    for group in adam.param_groups:
        rate = min(1.0, (step + 1) / WARM_UP) * (1 - step / schedule.steps)
        group["lr"] = schedule.learning_rate * rate
    adam.step()
    adam.zero_grad(set_to_none=True)
    return float(loss.detach())
