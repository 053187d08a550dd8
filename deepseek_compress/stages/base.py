"""A stage: a checkpoint on disk in, another output out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, BeforeValidator

from deepseek_compress import machine
from deepseek_compress.calibration.settings import Calibration
from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture
from deepseek_compress.planning.costs import Memory, Rates, Work, useful
from deepseek_compress.planning.device import CPU, Place, key
from deepseek_compress.registry import pick


@dataclass(frozen=True)
class Output:
    """Output of a stage: `kind` is `checkpoint`, `artifact` or `report`, `facts` go into the run record."""

    kind: str
    path: Path
    facts: Mapping[str, Any] = field(default_factory=dict)


def picked(table: Mapping[str, type[Any]], what: str) -> BeforeValidator:
    """For a field of a stage: an entry of `table` by its name, or by name and knobs; None stays None."""

    def pick_it(value: Any) -> Any:
        return value if value is None or isinstance(value, BaseModel) else pick(table, value, what)

    return BeforeValidator(pick_it)


def _silent(done: int, total: int, note: str) -> None:
    return None


@dataclass(frozen=True)
class Context:
    """Where a stage writes, what it may use, and how it tells its progress."""

    name: str  # of the stage's output
    out: Path  # directory that is the stage's own
    recipe_text: str
    seed: int
    calibration: Mapping[str, Any] = field(default_factory=dict)  # sources, samples, length
    device: str = "cpu"
    devices: tuple[str, ...] = ()  # all of them, where several GPUs share the tasks; the first is `device`
    memory: int | None = None  # bytes
    workers: int | None = None  # processes; None: as many as serve
    ray: str | None = None  # address of a cluster that computes the tasks instead
    verifier: str | None = None  # FILE.py:FUNCTION of the command line: code of the user's, which no recipe can name
    filter: str | None = None  # the same, of prompts and answers
    outputs: Mapping[str, Path] = field(default_factory=dict)  # name -> path of earlier outputs; "model" is the input
    progress: Callable[[int, int, str], None] = _silent  # (done, total, note)
    tell: Callable[[str], None] = print  # one line: what was decided, and from where

    def architecture(self, source: Checkpoint) -> Architecture:
        """Open a model on the device of the run."""
        return Architecture.of(source, self.device)

    @property
    def places(self) -> list[Place]:
        """The GPUs of the workers; none where workers have the CPU, or this process alone computes."""
        if self.ray is not None and self.device != CPU:
            return [Place("cuda:0", None, key(self.device))]  # as a task of the cluster sees the one it is given
        return [Place.of(device) for device in self.devices] if len(self.devices) > 1 else []

    def count(self, forecast: Forecast) -> int:
        """Return the number of workers: one where the device is not the CPU."""
        return forecast.workers(self.workers, self.memory) if self.device == "cpu" else 1

    def tell_all(self, lines: Iterable[str]) -> None:
        """Tell each of `lines`."""
        for line in lines:
            self.tell(line)

    @property
    def text(self) -> Calibration:
        """The recipe's calibration text. Raises DscError where it names saved statistics alone."""
        found = Calibration.model_validate(self.calibration)
        if not found.named:
            what = f"{self.name}: reads text, and calibration names saved statistics alone"
            raise DscError(what, "name calibration.sources too")
        return found


@dataclass(frozen=True)
class Forecast:
    """Predicted output and costs of a stage, from shapes alone. None where it cannot be known before the run."""

    header: Header  # what the next stage will read
    tensors: int = 0  # how many it changes
    bytes: int | None = None  # on disk
    memory: Memory | None = None
    work: Work | None = None  # in this process
    tasks: Work | None = None  # in workers
    read: int = 0  # bytes of the source
    scratch: int = 0  # bytes on disk while it runs, which go when it is done
    decisions: tuple[str, ...] = ()  # what would be decided, and why, a line each

    def workers(self, wanted: int | None, limit: int | None) -> int:
        """Return the number of workers on this machine with `limit` bytes of memory."""
        if self.memory is None:
            return 1
        return self.memory.workers(wanted, useful(machine.cores(), self.read, self.tasks), limit)

    def peak(self, workers: int) -> int | None:
        """Bytes of all processes together."""
        return self.memory.peak(workers) if self.memory else None

    def seconds(self, rates: Rates, workers: int, devices: int = 1) -> float | None:
        """From start to end; `devices` of one kind share the tasks, each with one worker.

        A source below half of the memory is taken to be in the page cache.
        """
        if self.work is None:
            return None
        total = machine.memory()
        cold = self.read if total is None or self.read > total / 2 else 0
        disk = cold / rates.read + (self.bytes or 0) / rates.written
        each = workers if devices == 1 else 1
        tasks = rates.task_seconds(self.tasks, each) / devices if self.tasks else 0.0
        return rates.start + rates.seconds(self.work) + max(tasks, disk)


class Stage(BaseModel, frozen=True, extra="forbid"):
    """A checkpoint on disk in, another output out. Fields are its knobs."""

    writes: ClassVar[str] = "checkpoint"  # or "artifact", "report"
    takes_statistics: ClassVar[bool] = False  # that were collected before, instead of text
    shares: ClassVar[bool] = False  # its tasks among several GPUs
    tag: ClassVar[str | None] = None  # the knob that decides which others there are

    @property
    def same_bytes(self) -> frozenset[str]:
        """Knobs that change nothing in what is written: another value needs no other directory."""
        return frozenset()

    def problems(self, header: Header) -> list[DscError]:
        """Everything wrong, from shapes alone, before any byte is read."""
        return []

    def reads(self) -> Sequence[str]:
        """Names of outputs that the stage reads besides its source."""
        return ()

    def reads_text(self, header: Header) -> bool:
        """Whether it takes calibration text, chosen from a pool where the recipe asks."""
        return False

    def statistics_problems(self, source: Checkpoint, wanted: Calibration) -> list[DscError]:
        """Why it cannot take the statistics that `wanted` names for `source`."""
        return []

    def forecast(self, header: Header, samples: int, length: int) -> Forecast:
        """Predict output and costs, with `samples` of `length` tokens of calibration text.

        No samples where it takes statistics that were collected before.
        """
        return Forecast(header)

    def run(self, source: Checkpoint, context: Context) -> Output:
        """Do it. Writes only below `context.out`."""
        raise NotImplementedError
