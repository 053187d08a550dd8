"""The output directory of a run: whose it is, who works in it, what is finished in it.

`.dsc_run/state.json` says which recipe, model, data and versions the directory is of; `.dsc_run/lock` is held while a
run works there. A stage is finished when `dsc_manifest.json` in its directory has a `pipeline` entry with its
fingerprint: the entry is written last.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from deepseek_compress import machine
from deepseek_compress.checkpoint.files import disk_errors, kept, remove, remove_tree, write_file, write_sealed
from deepseek_compress.checkpoint.owned import announced, recorded, withdraw
from deepseek_compress.checkpoint.verified import (
    CARD,
    MANIFEST,
    RUN,
    changed,
    described,
    hash_of,
    identities,
    identity,
    listed,
    manifest_of,
    wrong,
)  # fmt: skip
from deepseek_compress.errors import DscError, raise_problems

__all__ = ["HOUSE", "MANIFEST", "RUN"]
HOUSE = ".dsc_run"


def check_ours(out: Path) -> None:
    """Raise `DscError` unless `out` is free, empty, or was written by `dsc`."""
    if out.exists() and not out.is_dir():
        raise DscError(f"{out}: is a file", "give a directory that does not exist yet with -o")
    for parent in out.parents:
        if parent.exists():
            if not parent.is_dir() or not os.access(parent if not out.exists() else out, os.W_OK):
                raise DscError(f"{out}: cannot be written", "choose another directory with -o")
            break
    if (out / HOUSE / "state.json").is_file() or not out.is_dir():
        return
    others = {path.name for path in out.iterdir() if not path.name.startswith(".dsc_")}  # killed early: there are none
    if others - recorded(out) - {RUN}:
        raise DscError(f"{out}: exists and was not written by dsc", "choose another directory with -o")


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold `out` for this process; `DscError` when another run has it. The system frees it when the process ends."""
    house = out / HOUSE
    with disk_errors(out):
        house.mkdir(parents=True, exist_ok=True)
        opened = (house / "lock").open("a+")
    with opened as file:
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
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def agree(out: Path, state: Mapping[str, Any], tell: Callable[[str], None]) -> None:
    """Make `out` the directory of `state`, or raise `Problems` naming what differs from the state that made it.

    A directory that no stage has written to yet takes the new state. So does one whose own is damaged: what each stage
    left has a fingerprint of its own.
    """
    touched = any(path.is_file() and HOUSE not in path.parts for path in out.rglob("*"))
    file = out / HOUSE / "state.json"
    wanted = json.loads(json.dumps(state))
    before = kept(file)
    if touched and before is not None:
        raise_problems(
            DscError(f"{out}: made {what}", "choose another -o, or remove that directory")
            for what in differences(before, wanted)
        )
    if touched and before is None:
        tell(f"{file}: damaged, written anew")
    if before != wanted:
        write_sealed(file, wanted)


def differences(there: Any, here: Any, place: str = "") -> list[str]:
    """Say for each leaf in which two JSON values differ `with PLACE VALUE, now VALUE`, or who has none."""
    if isinstance(there, list) and isinstance(here, list):
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if isinstance(there, dict) and isinstance(here, dict):
        found = []
        for key in dict.fromkeys([*there, *here]):
            found += differences(there.get(key), here.get(key), f"{place}.{key}" if place else str(key))
        return found
    if there == here:
        return []
    if there is None:
        return [f"without {place}, now {_short(here)}"]
    return [f"with {place} {_short(there)}, now {'without' if here is None else _short(here)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def finished(directory: Path, fingerprint: str, quick: bool, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """Return the `pipeline` entry of a finished stage whose files are what was written; None when it has to run.

    quick: of large files, compare sizes alone. Raises Problems for files that are damaged or not there. A damaged
    manifest tells nothing: the stage runs again.
    """
    try:
        manifest = manifest_of(directory) or {}
        files = listed(manifest)
    except DscError as error:
        tell(f"{error.what}: the stage runs again")
        return None
    entry = manifest.get("pipeline")
    entry = entry if isinstance(entry, dict) else {}
    if entry.get("fingerprint") != fingerprint or not isinstance(entry.get("sources"), dict):
        return None
    if not all((directory / name).is_file() for name in files):
        return None
    broken = wrong(directory, {name: facts for name, facts in files.items() if name != CARD}, quick)
    raise_problems(DscError(problem.what, f"remove {directory}, then run the same command again") for problem in broken)
    return entry


def finish(directory: Path, entry: Mapping[str, Any]) -> None:
    """Mark the stage finished: its entry in the manifest, and every file it announced with size and hash."""
    manifest = manifest_of(directory) or {}
    here, files, ours = identities(directory), listed(manifest), announced(directory)
    files = {name: facts for name, facts in files.items() if name in here}
    new = [name for name in here if name not in files and (name in ours or name.startswith("dsc_"))]
    files = dict(sorted({**files, **described(directory, new)}.items()))
    write_sealed(directory / MANIFEST, {**manifest, "files": files, "pipeline": dict(entry)})


class Sources:
    """The files that a stage reads, as they are when it begins; `check` sees that they still are when it ends.

    Kept in the run's house while the stage is unfinished, so that one that was interrupted starts over when one of
    them has changed since: what it left would be mixed with what is made now.
    """

    def __init__(self, house: Path, name: str, paths: Mapping[str, Path]) -> None:
        self._record = _sources(house, name)
        self._files: dict[str, Path] = {}
        for label, path in paths.items():
            found = sorted(path.iterdir()) if path.is_dir() else [path]
            self._files |= {f"{label}/{file.name}": file for file in found if file.is_file() and file.name != RUN}
        self._seen = {label: identity(file) for label, file in self._files.items()}

    def begin(self, directory: Path, tell: Callable[[str], None]) -> None:
        """Forget what an interrupted run left in `directory` where it read other files."""
        here: dict[str, Any] = {"files": {label: list(found) for label, found in self._seen.items()}}
        before = kept(self._record)
        if before != here:
            if before is not None and discard(directory):
                tell("what it reads has changed since it was stopped: it starts over")
            write_sealed(self._record, here)

    def check(self, directory: Path) -> None:
        """Raise DscError where a file has changed meanwhile; what the stage wrote is removed."""
        for label, file in self._files.items():
            if identity(file) != self._seen[label]:
                ours = recorded(directory)
                discard(directory)
                for name in ours:
                    remove(directory / name)
                raise changed(file)

    @staticmethod
    def end(house: Path, name: str) -> None:
        """Forget them: the stage is finished."""
        remove(_sources(house, name))


def _sources(house: Path, name: str) -> Path:
    return house / f"{name}.sources.json"


class Pages:
    """Copies of files of `home` next to it, where nothing but earlier copies is overwritten."""

    def __init__(self, home: Path, copies: Mapping[str, Path], house: Path | None = None) -> None:
        """Raise DscError for a target that somebody else wrote. house: whose record it is, `home`'s if not given."""
        self._home, self._copies, self._record = home, copies, (house or home) / HOUSE / "pages.json"
        self._known = set((kept(self._record) or {}).get("hashes") or [])
        for name, target in copies.items():
            ours = self._known | ({hash_of(home / name)} if (home / name).is_file() else set())
            if os.path.lexists(target) and not (target.is_file() and hash_of(target) in ours):
                raise DscError(f"{target}: exists and was not written by this command", "choose another -o")

    def publish(self) -> None:
        """Copy those that are there, each hash written down before: a copy is ours whenever this is interrupted."""
        there = {name: target for name, target in self._copies.items() if (self._home / name).is_file()}
        hashes = self._known | {hash_of(self._home / name) for name in there}
        write_sealed(self._record, {"hashes": sorted(hashes)})
        for name, target in there.items():
            write_file(target, (self._home / name).read_bytes())


def discard(directory: Path) -> bool:
    """Remove what unfinished stages left in `directory`; true where there was something."""
    if directory.is_dir():
        withdraw(directory)
    found = [path for path in directory.glob(".dsc_*") if path.name != HOUSE] if directory.is_dir() else []
    for path in found:
        remove_tree(path) if path.is_dir() else remove(path)
    return bool(found)


def source_hashes(source: Path, known: Mapping[str, Any]) -> dict[str, str]:
    """BLAKE3 of the files of a model that decide what is made of it; `known` has some."""
    names = sorted(file.name for file in source.iterdir() if file.suffix in (".safetensors", ".json", ".jinja"))
    facts = {name: known.get(name) or {} for name in names if name not in (MANIFEST, RUN)}
    return {name: fact.get("blake3") or hash_of(source / name) for name, fact in facts.items()}


def same_source(source: Path, hashes: Mapping[str, str], out: Path) -> None:
    """Raise Problems for files of a model that have changed since `out` was made of it."""
    here = source_hashes(source, {})
    raise_problems(
        DscError(f"{source / name}: not what {out} was made of", f"choose another -o, or remove {out}")
        for name in hashes
        if here.get(name) != hashes[name]
    )


def read(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file; empty when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def costs(began: float, peak: int | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is true of this run only: never part of the promise of same bytes."""
    now = time.time()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": round(now - began, 3),
        "peak_bytes": peak,
        "host": machine.describe(),
        "facts": json.loads(json.dumps(dict(facts), default=str)),
    }
