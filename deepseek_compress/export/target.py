"""Base of all targets: knobs validated before any work, and files that appear together or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.checkpoint.files import remove, remove_tree, sync
from deepseek_compress.checkpoint.owned import PARTIAL, announce, refuse_to_overwrite
from deepseek_compress.checkpoint.writer import copied_files
from deepseek_compress.errors import DscError

RAN, WRITTEN, BUILT = "ran in onnxruntime", "written, not run", "built, not run"


@dataclass(frozen=True)
class Job:
    """Inputs of a target. `manifest`: what the output's dsc_manifest.json says about its origin."""

    manifest: Mapping[str, Any]
    tell: Callable[[str], None] = print
    texts: Callable[[int], Sequence[Sequence[int]]] = lambda count: ()  # calibration tokens to verify with
    memory: int | None = None  # bytes that a check may take; None: what the machine has
    workers: int | None = None  # processes; None: as many as serve
    progress: Callable[[int, int, str], None] = lambda done, total, note: None
    device: str = "cpu"  # of the runtime that a file is compared with


@dataclass(frozen=True)
class Exported:
    """Output of a target: `kind` as in `stages.base.Output`."""

    kind: str
    path: Path
    facts: dict[str, Any]


class Target(BaseModel, frozen=True, extra="forbid"):
    """A form to write a checkpoint in. Fields are its knobs."""

    name: ClassVar[str]
    same_bytes: ClassVar[frozenset[str]] = frozenset()  # knobs that change nothing in the files

    def problems(self, header: Header) -> list[DscError]:
        """Everything wrong, from shapes alone, before any byte is read."""
        return []

    def write(self, source: Checkpoint, out: Path, job: Job) -> Exported:
        """Write `source` below the directory `out`. Raises `DscError` and leaves nothing that loads."""
        raise NotImplementedError


def collected(*checks: Callable[[], None]) -> list[DscError]:
    """Return the `DscError` of each check that raises one."""
    found = []
    for check in checks:
        try:
            check()
        except DscError as error:
            found.append(error)
    return found


@contextmanager
def staged(out: Path, last: str, others: Iterable[str] = ()) -> Iterator[Path]:
    """Give a hidden folder of `out`; its files move up at the end, `last` after the others. Left early, none is there.

    A `last` of an earlier run goes first: what does not pass its check must not leave an older file to be loaded.
    Raises Problems, before anything is computed, where it or one of `others` is there and not ours.
    """
    folder = out / PARTIAL
    refuse_to_overwrite(out, [last, *others])
    remove_tree(folder)
    remove(out / last)
    folder.mkdir(parents=True)
    try:
        yield folder
        files = sorted(folder.iterdir(), key=lambda file: (file.name == last, file.name))
        for file in files:
            sync(file)
        announce(out, [file.name for file in files])
        for file in files:
            os.replace(file, out / file.name)
        sync(out)
    finally:
        remove_tree(folder)


def words(source: Checkpoint) -> list[str]:
    """Names of config.json, tokenizer, chat template and generation settings: what it takes to answer in words."""
    return [*(file.name for file in copied_files(source.path)), "config.json"]


def copy_words(source: Checkpoint, folder: Path) -> None:
    """Copy those files."""
    for name in words(source):
        shutil.copyfile(source.path / name, folder / name)


def sparsity(source: Checkpoint) -> str | None:
    """Return what the lineage says about 2:4 zeros. TensorRT-RTX 1.7.1 builds the same engine with and without them."""
    steps = (source.manifest or {}).get("lineage") or []
    masks = [step.get("knobs", {}).get("sparsity") for step in steps if step.get("knobs", {}).get("sparsity")]
    return "2:4 zeros in the weights; engines of TensorRT-RTX do not use them" if masks else None
