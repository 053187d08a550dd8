"""Which files of an output directory are ours: nothing else is removed, and nothing else is overwritten."""

from __future__ import annotations

import os
from pathlib import Path

from deepseek_compress.checkpoint.files import kept, read_json
from deepseek_compress.checkpoint.verified import MANIFEST
from deepseek_compress.errors import DscError

PARTIAL = ".dsc_partial"
NAMES = "names.json"  # in PARTIAL: what `finish` is about to write, so that the next writer knows these files as ours
CONFIG = "config.json"


def refuse_foreign(out: Path) -> None:
    """A directory may be taken when it is new, empty, or of our own making."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DscError(f"{out}: a file", "give another output directory")
    foreign = sorted(file.name for file in out.iterdir() if not file.name.startswith(("dsc_", ".dsc_")))
    if foreign and not (out / MANIFEST).exists() and not (out / PARTIAL).exists():
        names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise DscError(f"{out}: holds {names}, which dsc did not write", "give another output directory")


def recorded(out: Path) -> set[str]:
    """Names of the files there that are ours: what the manifest lists, or a `finish` that did not end wrote down.

    Raises DscError where the manifest is damaged so far that it lists nothing.
    """
    names = (kept(out / PARTIAL / NAMES) or {}).get("names") or []
    try:
        manifest = read_json(out / MANIFEST) if (out / MANIFEST).is_file() else {}  # its checksum does not matter here
    except DscError as error:
        raise DscError(error.what, f"remove {out}, then run the same command again") from None
    listed = manifest.get("files")
    found = {*names, *(listed if isinstance(listed, dict) else ()), *([MANIFEST, CONFIG] if manifest else [])}
    return {name for name in found if Path(name).name == name}


def unname_shards(out: Path, partial: Path) -> None:
    """Undo the renames of a `finish` that did not end, so that its shards can be taken up."""
    for file in out.glob("model-*-of-*.safetensors"):
        shard = partial / f"shard-{file.name.split('-')[1]}.safetensors"
        if shard.with_suffix(".json").is_file() and not shard.exists():
            os.replace(file, shard)
