"""Recovery: after rounding, train only the scales and the norms by KL against the original model.

Codes and zero points stay as they are, so the format stores nothing new: a scale per group moves by a few tenths of a
percent, and with 1/64 or 1/128 of the weights' number there is little to overfit. This is the last step of EfficientQAT
(Chen et al. 2024, arXiv 2407.11062, end-to-end training of quantisation parameters) with the original's distribution
as the target (QAT by distillation); `blockwise` is what may go before it. Fresh text is worth more than a second pass
over the same.

Each multiplier starts at 1: `scale = bf16(scale_0 (1 + a))`, `norm = bf16(norm_0 (1 + v))`, the rounding passed
straight through, so the values that are trained are the ones that are stored. Adam, a short warm-up, then a straight
line to zero. Samples run one at a time and their gradients add up: memory holds one sample's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.grid import STORED
from deepseek_compress.numerics.types import Quantized

WARM_UP = 8  # steps until the learning rate is reached, a quarter of all at most
BETAS = (0.9, 0.99)  # a recovery has tens of steps: the usual 0.999 would not forget the first ones


def centred(packed: Quantized) -> Tensor:
    """Codes minus zero point, float32 (rows, groups, group_size)."""
    rows, groups = packed.scale.shape
    return packed.codes.view(rows, groups, -1).float() - packed.zero_point.float().unsqueeze(-1)


def moved(start: Tensor, change: Tensor) -> Tensor:
    """Return the scale `start (1 + change)` (rows, groups) as it is stored; a step never turns a scale around."""
    return (start * (1 + change.detach()).clamp(min=0.5)).to(STORED).float()


def by_scale(gradient: Tensor, packed: Quantized, start: Tensor) -> Tensor:
    """dL/d(change) (rows, groups) from dL/dW (rows, columns)."""
    return (gradient.view(*start.shape, -1) * centred(packed)).sum(-1) * start


def rate(step: int, steps: int) -> float:
    """Return the share of the learning rate at `step` of `steps`: a short warm-up, then a straight line to zero."""
    return min(1.0, (step + 1) / max(1, min(WARM_UP, steps // 4))) * (1 - step / steps)


class Scaled:
    """A packed weight whose scales move: `weight` (rows, columns) float32 is a leaf that the model reads."""

    def __init__(self, start: Quantized) -> None:
        self.start = start
        self.change = torch.zeros_like(start.scale).requires_grad_()  # (rows, groups): scale = start (1 + change)
        self.weight = start.dequantize().requires_grad_()
        self.weight.register_post_accumulate_grad_hook(self._reduce)  # type: ignore[no-untyped-call]

    def _reduce(self, weight: Tensor) -> None:
        """dL/d(change) from dL/dW as soon as it is there, so that no two full gradients are held."""
        assert weight.grad is not None
        gradient = by_scale(weight.grad, self.start, self.start.scale)
        self.change.grad = gradient if self.change.grad is None else self.change.grad + gradient
        weight.grad = None

    @property
    def scale(self) -> Tensor:
        """(rows, groups), the value that is stored."""
        return moved(self.start.scale, self.change)

    def refresh(self) -> None:
        """Make `weight` follow `change`."""
        self.weight.detach().copy_((centred(self.start) * self.scale.unsqueeze(-1)).view_as(self.weight))

    def result(self) -> Quantized:
        """Return the same codes and zero points with the trained scales."""
        return self.start._replace(scale=self.scale)


class Norm:
    """A norm's weight that moves by multipliers; what the model reads is what is stored."""

    def __init__(self, start: Tensor) -> None:
        self.start = start
        self.change = torch.zeros_like(start).requires_grad_()
        self.weight = start.clone().requires_grad_()
        self.weight.register_post_accumulate_grad_hook(self._reduce)  # type: ignore[no-untyped-call]

    def _reduce(self, weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad * self.start
        self.change.grad = gradient if self.change.grad is None else self.change.grad + gradient
        weight.grad = None

    def refresh(self) -> None:
        """Make `weight` follow `change`."""
        self.weight.detach().copy_((self.start * (1 + self.change.detach())).to(STORED).float())

    def result(self) -> Tensor:
        """Return the trained norm in its stored type."""
        return self.weight.detach().to(STORED)


class Sparse:
    """A 2:4 weight whose values move and whose zeros stay: `weight` (rows, columns) float32 is a leaf."""

    def __init__(self, start: Tensor) -> None:
        kept = start != 0
        self.weight = start.clone().requires_grad_()
        self.weight.register_hook(lambda gradient: gradient * kept)  # type: ignore[no-untyped-call]
        self.size = float(start.square().sum().div(kept.sum().clamp(min=1)).sqrt())  # root mean square of what is kept

    @torch.no_grad()
    def settle(self) -> None:
        """Round to what is stored."""
        self.weight.copy_(self.weight.to(STORED))


def recover(
    teacher: Model,
    student: Model,
    packed: Mapping[str, Quantized],
    norms: Mapping[str, Tensor],
    tokens: Tensor,
    *,
    passes: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    progress: Callable[[int, int, str], None],
) -> tuple[dict[str, Quantized | Tensor], list[float]]:
    """Trained scales and norms by tensor name, and the mean KL in nats per token of each step.

    `packed` and `norms` name tensors of `student`, which runs with what is trained in their place, inputs unrounded:
    rounding has no gradient. Its other tensors stay.
    `tokens` int64 (samples, length). The same arguments give the same bits.
    """
    parts: dict[str, Scaled | Norm] = {name: Scaled(start) for name, start in packed.items()}
    parts.update({name: Norm(start.float()) for name, start in norms.items()})
    weights = {**student.weights, **{name: part.weight for name, part in parts.items()}}
    student = Model(student.family, student.cfg, weights)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(passes)])
    steps = torch.split(order, batch_size)
    adam = torch.optim.Adam([part.change for part in parts.values()], lr=learning_rate, betas=BETAS)
    losses = []
    for step, chosen in enumerate(steps):
        loss = sum(_backward(teacher, student, tokens[i : i + 1], len(chosen)) for i in chosen.tolist())
        for group in adam.param_groups:
            group["lr"] = learning_rate * rate(step, len(steps))
        adam.step()
        adam.zero_grad()
        for part in parts.values():
            part.refresh()
        losses.append(loss)
        progress(step + 1, len(steps), f"KL {loss:.4f}")
    return {name: part.result() for name, part in parts.items()}, losses


def _backward(teacher: Model, student: Model, tokens: Tensor, share: int) -> float:
    """Add the gradient of KL(teacher || student) / share over `tokens` (1, length); returns the loss (of the share).

    The gradient by the logits is `softmax(student) - softmax(teacher)`, so the loss needs no graph of its own.
    """
    tokens = tokens.to(student.head.device)
    with torch.no_grad():
        wanted = torch.log_softmax(teacher(tokens), -1)
    logits = student(tokens)
    with torch.no_grad():
        given = torch.log_softmax(logits, -1)
        count = share * tokens.numel()
        loss = float((wanted.exp() * (wanted - given)).sum(dtype=torch.float64)) / count
        gradient = (given.exp() - wanted.exp()) / count
    logits.backward(gradient)  # type: ignore[no-untyped-call]
    return loss
