"""The output directory of a run: whose it is, who works in it, what is finished in it.

`.dsc_run/state.json` says which recipe, model, data and versions the directory is of; `.dsc_run/lock` is held while a
run works there. A stage is finished when `dsc_manifest.json` in its directory has a `pipeline` entry with its
fingerprint: the entry is written last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from deepseek_compress.checkpoint.files import disk_errors, write_json
from deepseek_compress.errors import DscError, raise_problems

HOUSE = ".dsc_run"
MANIFEST = "dsc_manifest.json"
RUN = "dsc_run.json"


def check_ours(out: Path) -> None:
    """Raise `DscError` unless `out` is free, empty, or was written by `dsc`."""
    if out.exists() and not out.is_dir():
        raise DscError(f"{out}: is a file", "give a directory that does not exist yet with -o")
    for parent in out.parents:
        if parent.exists():
            if not parent.is_dir() or not os.access(parent if not out.exists() else out, os.W_OK):
                raise DscError(f"{out}: cannot be written", "choose another directory with -o")
            break
    if out.is_dir() and any(out.iterdir()) and not (out / HOUSE / "state.json").is_file():
        raise DscError(f"{out}: exists and was not written by dsc", "choose another directory with -o")


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold `out` for this process; `DscError` when another run has it. The system frees it when the process ends."""
    house = out / HOUSE
    with disk_errors(out):
        house.mkdir(parents=True, exist_ok=True)
    with (house / "lock").open("a+") as file:
        if not _take(file):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise DscError(f"{out}: another run works there (process {holder})", "wait for it, or choose another -o")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _take(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: a run there is not guarded
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def agree(out: Path, state: Mapping[str, Any]) -> None:
    """Make `out` the directory of `state`, or raise `Problems` naming what differs from the state that made it.

    A directory that no stage has written to yet takes the new state.
    """
    touched = any(path.is_file() and HOUSE not in path.parts for path in out.rglob("*"))
    kept = out / HOUSE / "state.json"
    wanted = json.loads(json.dumps(state))
    if kept.is_file() and touched:
        raise_problems(
            DscError(f"{out}: made with {what}", "choose another -o, or remove that directory")
            for what in differences(json.loads(kept.read_text()), wanted)
        )
    write_json(kept, wanted)


def differences(there: Any, here: Any, place: str = "") -> list[str]:
    """`place VALUE there, VALUE here` for each leaf in which two JSON values differ."""
    if isinstance(there, list) and isinstance(here, list):
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if isinstance(there, dict) and isinstance(here, dict):
        found = []
        for key in dict.fromkeys([*there, *here]):
            found += differences(there.get(key), here.get(key), f"{place}.{key}" if place else str(key))
        return found
    return [] if there == here else [f"{place} {_short(there)}, now {_short(here)}"]


def _short(value: Any) -> str:
    text = json.dumps(value) if value is not None else "unset"
    return text if len(text) <= 40 else text[:37] + "..."


def finished(directory: Path, fingerprint: str) -> dict[str, Any] | None:
    """The `pipeline` entry of a finished stage whose files are all there; None when it has to run."""
    entry = read(directory / MANIFEST).get("pipeline")
    if not isinstance(entry, dict) or entry.get("fingerprint") != fingerprint:
        return None
    complete = all(
        (directory / name).is_file() and (directory / name).stat().st_size == size
        for name, size in entry["files"].items()
    )
    return entry if complete else None


def finish(directory: Path, entry: Mapping[str, Any]) -> None:
    """Mark the stage finished: its entry in the manifest, with the size of every file."""
    files = {
        str(path.relative_to(directory)): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file() and HOUSE not in path.relative_to(directory).parts and path.name not in {MANIFEST, RUN}
    }
    write_json(directory / MANIFEST, {**read(directory / MANIFEST), "pipeline": {**entry, "files": files}})


def read(path: Path) -> dict[str, Any]:
    """The JSON object in the file; empty when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
