"""Which files of an output directory are ours: nothing else is removed, and nothing else is overwritten."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable
from pathlib import Path

from deepseek_compress.checkpoint.files import kept, read_json, remove, write_sealed
from deepseek_compress.checkpoint.verified import MANIFEST
from deepseek_compress.errors import DscError, raise_problems

PARTIAL = ".dsc_partial"
NAMES = (".dsc_names.json", ".dsc_names.copy.json")  # files of ours that no manifest lists yet: see `announce`
CONFIG = "config.json"


def refuse_foreign(out: Path) -> None:
    """Check that a directory may be taken: when it is new, empty, or of our own making."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DscError(f"{out}: a file", "give another output directory")
    foreign = sorted(file.name for file in out.iterdir() if not file.name.startswith(("dsc_", ".dsc_")))
    if foreign and not (out / MANIFEST).exists() and not (out / PARTIAL).exists():
        names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise DscError(f"{out}: holds {names}, which dsc did not write", "give another output directory")


def refuse_to_overwrite(out: Path, names: Iterable[str]) -> None:
    """Raise Problems for each of the files about to be written to `out` that is there and not ours."""
    ours = recorded(out)
    there = [name for name in dict.fromkeys(names) if name not in ours and os.path.lexists(out / name)]
    raise_problems(
        DscError(f"{out / name}: not written by dsc, and would be overwritten", "move it to another directory")
        for name in there
    )


def announce(out: Path, names: Iterable[str]) -> None:
    """Write down which files are about to appear in `out`, so that after a kill they are known as ours.

    Call right before they appear. Raises Problems for those that are there and not ours.
    """
    names = [*names]
    refuse_to_overwrite(out, names)
    out.mkdir(parents=True, exist_ok=True)
    value = {"names": sorted({*names, *announced(out)})}
    for record in NAMES:
        write_sealed(out / record, value)


def announced(out: Path) -> set[str]:
    """Names of files that `announce` wrote down; one of the two records may be damaged."""
    names = [name for record in NAMES for name in (kept(out / record) or {}).get("names") or []]
    return {name for name in names if Path(name).name == name}


def forget(out: Path) -> None:
    """Remove what `announce` wrote down: the manifest lists the files now."""
    for record in NAMES:
        remove(out / record)


def withdraw(out: Path) -> None:
    """Remove announced files that no manifest lists, and the record of them."""
    listed = _listed(out)
    for name in announced(out) - listed:
        remove(out / name)
    forget(out)


def recorded(out: Path) -> set[str]:
    """Names of the files there that are ours: what the manifest lists, and what was announced.

    Raises DscError where the manifest is damaged so far that it lists nothing.
    """
    return {*announced(out), *_listed(out)}


def _listed(out: Path) -> set[str]:
    try:
        manifest = read_json(out / MANIFEST) if (out / MANIFEST).is_file() else {}  # its checksum does not matter here
    except DscError as error:
        raise DscError(error.what, f"remove {out}, then run the same command again") from None
    files = manifest.get("files")
    found = {*(files if isinstance(files, dict) else [CONFIG]), MANIFEST} if manifest else set()
    return {name for name in found if Path(name).name == name}


def unname_shards(out: Path, partial: Path) -> None:
    """Undo the renames of a `finish` that did not end, so that its shards can be taken up."""
    for file in [out / name for name in announced(out) if fnmatch.fnmatch(name, "model-*-of-*.safetensors")]:
        if not file.is_file():
            continue
        shard = partial / f"shard-{file.name.split('-')[1]}.safetensors"
        if shard.with_suffix(".json").is_file() and not shard.exists():
            os.replace(file, shard)
