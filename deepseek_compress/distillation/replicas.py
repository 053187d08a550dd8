"""Several processes train one student: each has it whole, takes its share of a step's parts, and gradients are added.

Every process begins from the same files, so that weights, moments and batches are equal without being sent; after a
step only gradients travel. The first process alone validates, saves and writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import distributed

from deepseek_compress import processes
from deepseek_compress.checkpoint.files import remove
from deepseek_compress.distillation.group import Group, process_errors
from deepseek_compress.distillation.resume import Keeper
from deepseek_compress.distillation.trainer import Trainer
from deepseek_compress.errors import DscError

if TYPE_CHECKING:
    from deepseek_compress.stages.base import Context

PATIENCE = timedelta(minutes=10)  # with a process that says nothing


class Replicated(Protocol):
    """A stage whose training runs in other processes too; travels by pickle."""

    def replica(self, source: Path, context: Context) -> Trainer:
        """Return the training before its first step, in another process."""
        ...


@contextmanager
def joined(rank: int, size: int, meeting: Path, device: str) -> Iterator[Group]:
    """Meet the other processes of a training by the file `meeting`, which is new, and leave them at the end."""
    backend = "nccl" if device.startswith("cuda") else "gloo"
    if backend == "gloo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are on one machine: no address outside it
    else:
        torch.cuda.set_device(device)
    meet = f"file://{meeting}"
    with process_errors():
        distributed.init_process_group(backend, init_method=meet, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Group(rank, size)
    finally:
        distributed.destroy_process_group()


@contextmanager
def started(stage: Replicated, source: Path, context: Context, work: Path, steps: int, size: int) -> Iterator[Group]:
    """Start the other `size` - 1 processes of a training of `steps` steps, wait until they are ready, and meet them."""
    if size == 1:
        yield Group()
        return
    threads = torch.get_num_threads()
    each, meeting = max(1, threads // size), work / f"meet-{os.getpid()}"
    others = []
    try:
        for rank in range(1, size):
            device = context.devices[rank] if rank < len(context.devices) else context.device
            own = replace(context, device=device, devices=(), progress=_silent, tell=_silent)
            others.append((rank, processes.Workers(1, ["deepseek_compress.stages.distill"], _begin, (each,), [own])))
        for call in [other.submit(_prepare, stage, source) for _, other in others]:
            call.result()
        remove(meeting)
        calls = [other.submit(_train, work, meeting, steps, rank, size) for rank, other in others]
        torch.set_num_threads(each)
        with joined(0, size, meeting, context.device) as group:
            yield group
        for call in calls:
            call.result()
    except processes.lost():
        what = "distill: a training process was killed (out of memory?)"
        raise DscError(what, "run the same command again to resume; fewer distill.processes need less memory") from None
    finally:
        torch.set_num_threads(threads)
        for _, other in others:
            other.kill()
        remove(meeting)


_here: list[Any] = []  # in another process: its context, then its training too


def _begin(threads: int, context: Context) -> None:
    torch.set_num_threads(threads)
    _here[:] = [context]


def _prepare(stage: Replicated, source: Path) -> None:
    _here.append(stage.replica(source, _here[0]))


def _train(work: Path, meeting: Path, steps: int, rank: int, size: int) -> None:
    """Train without a word and without a file."""
    context, trainer = _here
    trainer.over(steps)
    state = Keeper(work).load(context.device)
    with joined(rank, size, meeting, context.device) as trainer.group:
        trainer.run(_silent, state)


def _silent(*said: object) -> None:
    return
