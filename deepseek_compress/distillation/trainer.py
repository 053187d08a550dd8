"""Train a student on what a teacher says: AdamW (or Adafactor) over its weights, zeros of a 2:4 mask held at zero.

A short warm-up, then a straight line to zero. Batches have documents of similar length, so that little of them is
padding, and are visited in an order drawn anew for each pass. Training can be stopped and resumed: the state after
a step is everything the next one needs, and the batches follow from the seed.

The last documents may be held back: they tell how far the student is from the teacher. The weights that did best on
them are the result, and with `patience` a training ends when they no longer gain.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_compress.distillation.curriculum import in_phases
from deepseek_compress.distillation.documents import (
    Batch,
    Document,
    batch_of,
    batches,
    batches_by_length,
    steps_for,
)  # fmt: skip
from deepseek_compress.distillation.group import Group
from deepseek_compress.distillation.lora import LowRank
from deepseek_compress.distillation.objective import Objective
from deepseek_compress.distillation.on_policy import chosen, own_text
from deepseek_compress.distillation.rounding import Straight
from deepseek_compress.distillation.teachers import JointTeacher, Teacher
from deepseek_compress.errors import DscError
from deepseek_compress.evaluation.statistics import safe_exp
from deepseek_compress.models import Role
from deepseek_compress.models.activations import InputScheme
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics import pattern
from deepseek_compress.planning.device import synchronize
from deepseek_compress.streaming.loop import Progress, silent

WARM_UP = 10  # steps until the learning rate is reached
BETAS = (0.9, 0.95)
# Root mean square of a gradient's elements (SmolLM2): 4e-4 in training, 4e-8 where all that is left is the rounding of
# recorded probabilities, which Adam would follow with whole steps; with this it does not.
EPS = 1e-6
LARGEST_NORM = 1.0  # of the gradient of all weights together
VALIDATIONS = 10  # in a training, or fewer:
VALIDATED = 5  # times as many tokens are trained on between two as one reads, so that they take a tenth of the time


class Schedule(NamedTuple):
    """Training schedule of a student."""

    steps: int
    batch_tokens: int = 2048  # of a step, padding included
    accumulate: int = 1  # parts of a step, whose gradients add up
    learning_rate: float = 1e-4
    optimizer: str = "adamw"  # or adafactor
    freeze: tuple[str, ...] = ()  # shell patterns of tensors that stay
    prompt_weight: float = 1.0
    held_back: int = 0  # documents at the end of the text that are not trained on
    patience: int | None = None  # validations without gain that end a training
    seed: int = 0
    phases: int = 1  # of a curriculum
    on_policy: float = 0.0  # share of the steps that are on the student's own text


class Measured(NamedTuple):
    """The student on the documents that are held back, after `step` steps."""

    step: int
    loss: float
    kl: float  # nats a position, at the temperature of the training
    perplexity: float
    accuracy: float  # share of positions where the next token is the likeliest


@dataclass
class State:
    """Everything a later step follows from."""

    step: int
    weights: dict[str, Tensor]
    projections: dict[str, Tensor]  # and what else is learned: scales of packed ones
    optimizer: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    validations: list[Measured] = field(default_factory=list)
    best: dict[str, Tensor] | None = None


def masks_of(weights: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """float32 0/1 masks of the weights among `names` that are 2:4 sparse: their zeros stay."""
    return {name: (weights[name] != 0).float() for name in names if pattern.holds(weights[name])}


class Trainer:
    """One training of `student` on `documents`; the result goes into `student.weights`."""

    def __init__(
        self,
        student: Model,
        teacher: Teacher,
        documents: Sequence[Document],
        objective: Objective,
        schedule: Schedule,
        masks: Mapping[str, Tensor] | None = None,
        projections: Mapping[str, Tensor] | None = None,
        presented: Straight | LowRank | None = None,  # how packed weights are rounded on the way, or others changed
        scheme: InputScheme | None = None,  # how inputs of linears are
        difficulty: Sequence[float] | None = None,  # of each document, for a curriculum
    ) -> None:
        self.student, self.teacher, self.documents = student, teacher, documents
        self.objective, self.schedule = objective, schedule
        self.masks, self._projections = masks or {}, projections or {}
        self.presented, self.scheme = presented, scheme
        self.difficulty = difficulty
        self.group = Group()  # the processes that train together
        self._lengths = [len(document.ids) for document in documents]
        self._trained_on = len(documents) - schedule.held_back

    @property
    def _device(self) -> torch.device:
        return self.student.head.device

    @property
    def _low_rank(self) -> bool:
        return isinstance(self.presented, LowRank)

    def over(self, steps: int) -> None:
        """Train for `steps` steps."""
        self.schedule = self.schedule._replace(steps=steps)

    def steps_for(self, tokens: int) -> int:
        """Return the least number of steps that train on so many tokens."""
        schedule = self.schedule
        return steps_for(self._lengths[: self._trained_on], schedule.batch_tokens, schedule.seed, tokens)

    def seconds_a_step(self, steps: int) -> float:
        """Return the mean of `steps` steps of a training that leaves no trace."""
        before = {name: tensor.clone() for name, tensor in self.student.weights.items()}
        schedule = self.schedule
        self.schedule = schedule._replace(steps=steps, held_back=0)
        synchronize(self._device)
        began = time.monotonic()
        self.run(silent)
        synchronize(self._device)
        seconds = (time.monotonic() - began) / steps
        self.schedule = schedule
        for name, tensor in before.items():
            self.student.weights[name].copy_(tensor)
        return seconds

    def run(self, progress: Progress, state: State | None = None, save: Callable[[State], None] | None = None) -> State:
        """Train from `state`, or from the beginning. `save` is offered the state after every step."""
        state, steps = state or self.begin(), self.schedule.steps
        leaves = [t for t in (*state.weights.values(), *state.projections.values()) if t.requires_grad]
        optimizer = self._optimizer(leaves, state)
        order = self._order(steps)
        began, tokens = time.monotonic(), 0
        for numbers in itertools.islice(order, state.step, steps):
            if self._settled(state):
                break
            self._step(state, numbers, optimizer, leaves)
            tokens += sum(self._lengths[number] for number in numbers)
            rate = tokens / (time.monotonic() - began)
            progress(state.step, steps, f"loss {state.losses[-1]:.4f}, {rate:.0f} tok/s")
            if save is not None:
                save(state)
        else:
            self._settled(state)
        trained = {**self.student.weights, **state.projections}
        with torch.no_grad():
            for name, tensor in {**state.weights, **(state.best or {})}.items():
                trained[name].copy_(tensor)
        return state

    def _order(self, steps: int) -> Iterator[list[int]]:
        """Return the documents of each step."""
        lengths, schedule = self._lengths[: self._trained_on], self.schedule
        if self.difficulty is None or schedule.phases == 1:
            return batches(lengths, schedule.batch_tokens, schedule.seed)
        hard = self.difficulty[: self._trained_on]
        return in_phases(hard, lengths, schedule.phases, steps, schedule.batch_tokens, schedule.seed)

    def learner(self, state: State) -> Model:
        """Return the student as the next step computes with it."""
        weights: Mapping[str, Tensor] = state.weights
        if self.presented is not None:
            weights = self.presented.present(state.weights, state.projections)
        return Model(self.student.family, self.student.cfg, weights, self.scheme)

    def begin(self) -> State:
        """Return the state before the first step."""
        weights = {
            name: tensor.detach().requires_grad_(self._trains(name)) for name, tensor in self.student.weights.items()
        }
        if not any(tensor.requires_grad for tensor in weights.values()) and not self._low_rank:
            raise DscError("distill.freeze: every tensor is frozen", "leave some to train")
        return State(0, weights, {n: p.clone().requires_grad_() for n, p in self._projections.items()}, {})

    def measure(self, model: Model, step: int = 0, projections: Mapping[str, Tensor] | None = None) -> Measured:
        """`model` on the documents that are held back."""
        first, parts = self._trained_on, []
        for group in batches_by_length(self._lengths[first:], self.schedule.batch_tokens):
            batch = batch_of(self.documents, [first + index for index in group], self.schedule.prompt_weight)
            batch = batch.to(self._device)
            said = self.objective.said(self.teacher, batch)
            parts.append(self.objective.measure(model, batch, said, projections or self._projections))
        loss, weight, kl, surprise, right, positions = (sum(values) for values in zip(*parts, strict=True))
        mean = surprise / positions
        perplexity = safe_exp(mean)
        return Measured(step, loss / weight, kl / positions, perplexity, right / positions)

    def _trains(self, name: str) -> bool:
        """Not what is frozen, and not the bias that balances experts, which no gradient reaches."""
        if self._low_rank or any(fnmatch.fnmatchcase(name, shell) for shell in self.schedule.freeze):
            return False
        return not (self.student.family.role(name) is Role.ROUTER and not name.endswith(".weight"))

    def _optimizer(self, leaves: Sequence[Tensor], state: State) -> torch.optim.Optimizer:
        rate = self.schedule.learning_rate
        optimizer: torch.optim.Optimizer
        if self.schedule.optimizer == "adafactor":
            optimizer = torch.optim.Adafactor(leaves, lr=rate, weight_decay=0.0)
        else:
            optimizer = torch.optim.AdamW(leaves, lr=rate, betas=BETAS, eps=EPS, weight_decay=0.0)
        if state.optimizer:
            optimizer.load_state_dict(state.optimizer)
        return optimizer

    def _step(
        self,
        state: State,
        numbers: Sequence[int],
        optimizer: torch.optim.Optimizer,
        leaves: Sequence[Tensor],
    ) -> None:
        schedule = self.schedule
        parts = self._parts(state, numbers)
        weight = sum(float(part.weights.sum()) for part in parts)
        if isinstance(self.teacher, JointTeacher):
            self.teacher.take(state.projections)
        loss = 0.0
        for part in (part.to(self._device) for part in self.group.mine(parts)):
            said = self.objective.said(self.teacher, part)
            loss += self.objective.backward(self.learner(state), part, said, state.projections, weight)
        loss = self.group.add_up(leaves, loss)
        if not math.isfinite(loss):
            what = f"distill: the loss is {loss} at step {state.step + 1} of {schedule.steps}"
            raise DscError(what, f"lower distill.learning_rate ({schedule.learning_rate:g})")
        torch.nn.utils.clip_grad_norm_(leaves, LARGEST_NORM)
        for group in optimizer.param_groups:
            share = min(1.0, (state.step + 1) / WARM_UP) * (1 - state.step / schedule.steps)
            group["lr"] = schedule.learning_rate * share
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, mask in self.masks.items():
                if state.weights[name].requires_grad:  # another has not moved
                    state.weights[name].mul_(mask)
        state.step += 1
        state.losses.append(loss)
        state.optimizer = optimizer.state_dict()

    def _parts(self, state: State, numbers: Sequence[int]) -> list[Batch]:
        """Return the batches of a step: of the documents `numbers`, or of what the student writes after their
        prompts."""
        schedule = self.schedule
        size = -(-len(numbers) // (schedule.accumulate * self.group.size))
        groups = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        if not chosen(schedule.on_policy, schedule.seed, state.step):
            return [batch_of(self.documents, group, schedule.prompt_weight) for group in groups]
        student, made = self.learner(state), list[Batch]()
        for group in groups:
            given = [self.documents[number] for number in group]
            own = own_text(student, given, (schedule.seed * 1_000_003 + state.step) * 101 + len(made))
            made.append(batch_of(own, range(len(own)), schedule.prompt_weight))
        return made

    def _measured(self, state: State) -> Measured:
        """Return what the first process finds, so that all end at the same step."""
        mine: Sequence[float] = [0.0] * len(Measured._fields)
        if self.group.rank == 0:
            mine = self.measure(self.learner(state), state.step, state.projections)
        step, *others = self.group.first_says(mine, self._device)
        return Measured(int(step), *others)

    def _settled(self, state: State) -> bool:
        """Validate where it is time to; whether the training has come to its end by it."""
        if not self.schedule.held_back:
            return False
        seen = {measured.step for measured in state.validations}
        steps, tokens = self.schedule.steps, sum(self._lengths[self._trained_on :])
        every = max(1, steps // VALIDATIONS, VALIDATED * tokens // self.schedule.batch_tokens)
        due = state.step % every == 0 or state.step == steps
        if due and state.step not in seen:
            with torch.no_grad():
                found = self._measured(state)
            if all(found.loss < before.loss for before in state.validations):
                both = {**state.weights, **state.projections}
                state.best = {name: tensor.detach().clone() for name, tensor in both.items() if tensor.requires_grad}
            state.validations.append(found)
        best = min(range(len(state.validations)), key=lambda i: state.validations[i].loss)
        since = len(state.validations) - 1 - best
        return self.schedule.patience is not None and since >= self.schedule.patience
