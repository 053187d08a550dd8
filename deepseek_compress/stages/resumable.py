"""Fingerprint of all inputs of an unfinished output; a resume is refused if it differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_compress import machine, provenance
from deepseek_compress.calibration.tokens import digest_of
from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.checkpoint.files import kept, remove, remove_tree, write_sealed
from deepseek_compress.checkpoint.owned import PARTIAL
from deepseek_compress.errors import DscError
from deepseek_compress.planning.device import key

CHOSEN = "chosen.json"  # in the work directory: see `stages.text`


@dataclass(frozen=True)
class Resumable:
    """Identity of an output. None where a thing has no say in its bytes."""

    knobs: Mapping[str, Any]
    model: str  # fingerprint
    versions: Mapping[str, str | None]
    processor: str
    teacher: str | None = None  # fingerprint of the second model
    text: Any = None  # digest of tokens, or of statistics
    seed: int | None = None
    threads: int | None = None
    device: str = "cpu"

    @classmethod
    def of(
        cls,
        source: Checkpoint,
        knobs: Mapping[str, Any],
        text: Tensor | str | None,
        teacher: Checkpoint | None = None,
        seed: int | None = None,
        device: str = "cpu",
    ) -> Resumable:
        """Identify a run. text: its tokens, whose sums depend on the number of threads, or a digest of other data."""
        tokens = isinstance(text, Tensor)
        return cls(
            knobs=knobs,
            model=provenance.fingerprint(source),
            versions=provenance.versions(),
            processor=str(machine.describe()["cpu"]),
            teacher=None if teacher is None else provenance.fingerprint(teacher),
            text=[*text.shape, digest_of(text)] if isinstance(text, Tensor) else text,
            seed=seed,
            threads=torch.get_num_threads() if tokens else None,
            device=key(device),
        )

    def claim(self, out: Path, work: Path) -> None:
        """Take up `work`. Call before the writer is made. Raises DscError, naming what differs, for another run's.

        Work without an identity, or with a damaged one, is thrown away.
        """
        file = work / "identity.json"
        here = json.loads(json.dumps(asdict(self)))
        there = kept(file)
        if there is not None:
            differing = sorted(key for key in {*here, *there} if here.get(key) != there.get(key))
            if differing:
                what = f"{out}: holds an unfinished run with other {', '.join(differing)}"
                raise DscError(what, "give the same again to resume it, or another output directory")
        else:  # nothing tells what it follows from: it is made again
            remove_tree(out / PARTIAL)
            for left in work.iterdir() if work.is_dir() else ():
                if left.name != CHOSEN:  # which text was chosen carries a key of its own
                    remove_tree(left) if left.is_dir() else remove(left)
        work.mkdir(parents=True, exist_ok=True)
        write_sealed(file, here)
