"""The processes of a training, seen from one of them: whose part is whose, and gradients added up.

torch.distributed does it: NCCL between GPUs, gloo between CPUs (Li et al. 2020, arXiv 2006.15704). A weight that no
part reached has no gradient, and no optimizer moves it, as in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed

from deepseek_compress.errors import DscError

Part = TypeVar("Part")
BUCKET = 1 << 24  # elements of gradients that are added at a time


class Group:
    """The processes of a training, seen from one of them; of one process, nothing travels."""

    def __init__(self, rank: int = 0, size: int = 1, alone: bool = False) -> None:
        self.rank, self.size = rank, size
        self._speaks = size > 1 and not alone  # alone: a trial of one process's share

    def mine(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Return the parts of a step that are this process's."""
        return parts[self.rank :: self.size]

    def add_up(self, leaves: Sequence[Tensor], loss: float) -> float:
        """Add the gradients of all processes in place; returns the loss of the step."""
        if not self._speaks:
            return loss
        device = leaves[0].device
        has = torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.uint8, device=device)
        total = torch.tensor([loss], dtype=torch.float64, device=device)
        with process_errors():
            distributed.all_reduce(has, distributed.ReduceOp.MAX)
            distributed.all_reduce(total)
            reached = [leaf for leaf, any_of in zip(leaves, has.tolist(), strict=True) if any_of]
            for bucket in _buckets(reached):
                self._add(bucket)
        return float(total)

    def first_says(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Return what the first process gives as `values`; the others give as many."""
        if not self._speaks:
            return list(values)
        said = torch.tensor(values, dtype=torch.float64, device=device)
        with process_errors():
            distributed.broadcast(said, 0)
        return [float(value) for value in said.tolist()]

    def _add(self, leaves: Sequence[Tensor]) -> None:
        for leaf in leaves:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        distributed.all_reduce(flat)
        start = 0
        for grad in grads:
            grad.copy_(flat[start : start + grad.numel()].view_as(grad))
            start += grad.numel()


def _buckets(leaves: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield leaves of one type, about `BUCKET` elements at a time."""
    found: list[Tensor] = []
    size = 0
    for leaf in leaves:
        if found and (found[-1].dtype != leaf.dtype or size >= BUCKET):
            yield found
            found, size = [], 0
        found.append(leaf)
        size += leaf.numel()
    if found:
        yield found


@contextmanager
def process_errors() -> Iterator[None]:
    """Inside, a fault of torch.distributed is a `DscError`: another process is not there any more."""
    try:
        yield
    except RuntimeError as error:  # the type of every fault of torch.distributed
        what = f"distill: a training process was lost ({str(error).splitlines()[0][:200]})"
        raise DscError(what, "run the same command again to resume; fewer distill.processes need less memory") from None
