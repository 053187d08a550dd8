"""Requirements of a stage from shapes alone, and their cost on a machine: bytes of memory, seconds, workers.

A stage says what it holds and how much work it is; rates, measured on this machine (`rates`), turn work into time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

MAIN = 300_000_000  # bytes of this process before a stage begins: Python, torch, the command line
SERVER = 80_000_000  # bytes of the processes that start workers
WORKER = 60_000_000  # bytes of a worker before its first task
SMALL = 256 << 20  # bytes of a model that takes longer to share out than to do here
STATES = 0.25  # of a GPU's memory that hidden states may take
BEGINNING = 2_000_000_000  # weights that are packed while workers begin


class Memory(NamedTuple):
    """Bytes at the peak, libraries not counted."""

    alone: int  # of what this process does by itself
    resident: int = 0  # what it holds while workers compute
    task: int = 0  # what a task takes; 0 where there are none

    def peak(self, workers: int = 1) -> int:
        """Of all processes together, libraries included. One worker is this process."""
        if workers == 1:
            return MAIN + max(self.alone, self.resident + self.task)
        return MAIN + SERVER + workers * WORKER + max(self.alone, self.resident + workers * self.task)

    def on_device(self) -> int:
        """Of a GPU that computes what this process and its tasks would, one part of it left for hidden states."""
        return int(max(self.alone, self.resident + self.task) / (1 - STATES))

    def workers(self, wanted: int | None, useful: int, limit: int | None) -> int:
        """Choose the number of workers: `wanted`, else as many as are `useful`; never more than `limit` bytes allow."""
        if not self.task:
            return 1
        count = wanted or useful
        while count > 1 and limit is not None and self.peak(count) > limit:
            count -= 1
        return count


class Work(NamedTuple):
    """Amounts of computation, in units whose rates differ by machine."""

    products: float = 0.0  # multiplications and additions of matrix products
    touched: float = 0.0  # bytes that pass through the memory between products
    solved: float = 0.0  # weights whose rounding is solved, products not counted
    packed: float = 0.0  # weights that go from their stored form to four bits in one pass, files included


def useful(cores: int, size: int, tasks: Work | None = None) -> int:
    """Return how many workers finish a model of `size` bytes soonest, or `tasks` that only pack: one a core, or one."""
    if tasks is not None and tasks == Work(packed=tasks.packed):
        return cores if tasks.packed * (1 - 1 / cores) >= BEGINNING else 1
    return cores if size >= SMALL else 1


def total(parts: Iterable[Work]) -> Work:
    """All of `parts`."""
    return Work(*(sum(values) for values in zip(*parts, strict=True)))


class Rates(NamedTuple):
    """Rates of this machine, per second. `one_core`: with one thread; else with all of them."""

    products: float
    products_one_core: float
    touched: float
    solved_one_core: float
    packed_one_core: float
    read: float  # bytes from the disk
    written: float  # bytes to the disk, synced
    start: float  # seconds until a stage begins

    def seconds(self, work: Work) -> float:
        """In this process."""
        return work.products / self.products + work.touched / self.touched + work.solved / self.solved_one_core

    def task_seconds(self, work: Work, workers: int) -> float:
        """By `workers`, each with one thread."""
        products = max(work.products / self.products_one_core / workers, work.products / self.products)
        rest = work.touched / self.touched + work.solved / self.solved_one_core + work.packed / self.packed_one_core
        return products + rest / workers
