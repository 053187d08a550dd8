"""Whether files are what was written, and stay what they were while they are read.

A manifest lists every file of an output with its size and BLAKE3. A file is hashed once in a process, and again when
its identity (inode, size, times) has changed since. The same identity, taken when the headers are read, is compared
whenever a shard is opened and once more when an output is finished: a source that changes under a run ends the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deepseek_compress.checkpoint.files import hash_file, read_sealed
from deepseek_compress.errors import DscError, raise_problems

MANIFEST, RUN, CARD = "dsc_manifest.json", "dsc_run.json", "README.md"
WEIGHTS = ".safetensors"
AGAIN = f"make this output again; to use it as it is now, remove its {MANIFEST}"

_TYPES = {
    **dict.fromkeys(("activations", "kv_cache", "source", "pipeline", "calibration", "statistics"), dict),
    "files": dict,
    "lineage": list,
}
Identity = tuple[int, int, int, int]  # inode, bytes, nanoseconds of the last change of content and of anything
_hashes: dict[tuple[str, Identity], str] = {}


def identity(place: Path | int) -> Identity:
    """Of a file by path or descriptor; all zeros where there is none."""
    try:
        found = os.stat(place)
    except OSError:
        return 0, 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def changed(file: Path) -> DscError:
    """Return what to say of a file that is another than when the run began."""
    return DscError(f"{file}: changed while it was read", "run the same command again to start over")


def hash_of(file: Path) -> str:
    """BLAKE3 of a file, taken once in a process while its identity stays."""
    key = (str(file), identity(file))
    if key not in _hashes:
        _hashes[key] = hash_file(file)
    return _hashes[key]


def manifest_of(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of an output, or None where there is none. Raises DscError where it is damaged."""
    path = directory / MANIFEST
    if not path.is_file():
        return None
    found = read_sealed(path, strict=False)
    steps = found.get("lineage") or []
    wrong_types = [key for key, kind in _TYPES.items() if not isinstance(found.get(key), kind | None)]
    if not wrong_types and not all(isinstance(s, dict) and isinstance(s.get("knobs", {}), dict) for s in steps):
        wrong_types = ["lineage"]
    raise_problems(DscError(f"{path}: {key} is not of its type", AGAIN) for key in wrong_types)
    return found


def listed(manifest: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """{name: {"bytes", "blake3"}} of a manifest. Raises DscError for a list of another form."""
    files = (manifest or {}).get("files") or {}
    for name, facts in files.items() if isinstance(files, dict) else [("files", None)]:
        given = facts if isinstance(facts, dict) else {}
        if type(given.get("bytes")) is not int or not isinstance(given.get("blake3"), str) or not _inner(name):
            raise DscError(f"{MANIFEST}: {name!r} is not a file with its size and BLAKE3", "make this output again")
    return dict(files)


def wrong(directory: Path, files: Mapping[str, Mapping[str, Any]], quick: bool = False) -> Iterator[DscError]:
    """Every file of a manifest that is not what was written; `quick`: of what has the right size, only small ones."""
    for name, facts in files.items():
        file = directory / name
        if not file.is_file():
            yield DscError(f"{file}: in the manifest, but not there", "make this output again")
        elif file.stat().st_size != facts["bytes"]:
            yield DscError(f"{file}: {file.stat().st_size} bytes, {facts['bytes']} were written", AGAIN)
        elif not (quick and facts["bytes"] > 1 << 20) and hash_of(file) != facts["blake3"]:
            yield DscError(f"{file}: not the bytes that were written", AGAIN)


def check(directory: Path, quick: bool = False, weights: bool = True) -> None:
    """Raise Problems unless all that an output's manifest lists, but the card, is what was written."""
    files = listed(manifest_of(directory))
    chosen = {n: f for n, f in files.items() if n != CARD and (weights or not n.endswith(WEIGHTS))}
    raise_problems(wrong(directory, chosen, quick))


def described(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{name: {"bytes", "blake3"}} of files in a directory."""
    return {name: {"bytes": (directory / name).stat().st_size, "blake3": hash_of(directory / name)} for name in names}


def identities(directory: Path) -> dict[str, Identity]:
    """Of every file of an output, without the manifest, the run's record and what begins with .dsc_."""
    return {
        name: identity(directory / name)
        for name in sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
        if name not in (MANIFEST, RUN) and not any(part.startswith(".dsc_") for part in Path(name).parts)
    }


def _inner(name: str) -> bool:
    """Whether a name stays below its directory."""
    return bool(name) and "\0" not in name and not name.startswith("/") and ".." not in Path(name).parts
