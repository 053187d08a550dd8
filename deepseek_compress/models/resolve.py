"""From the word MODEL on the command line to a directory."""

from __future__ import annotations

from pathlib import Path

from deepseek_compress import resources
from deepseek_compress.errors import DscError

BUILTIN = "builtin:"


def builtin_models() -> dict[str, Path]:
    """`builtin:NAME` -> directory, of the models that come with the package."""
    return {BUILTIN + path.parent.name: path.parent for path in sorted(resources.data("builtin").glob("*/config.json"))}


def resolve_model(name: str | Path) -> Path:
    """Return the directory that `name` means: `builtin:nano`, or a path. Raises DscError where there is none."""
    text = str(name)
    if text.startswith(BUILTIN):
        known = builtin_models()
        if text not in known:
            raise DscError(f"no built-in model {text!r}", f"known: {', '.join(known) or 'none in this installation'}")
        return known[text]
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    what = "is a file" if path.is_file() else "no such directory"
    raise DscError(f"{text}: {what}", "give the directory of a checkpoint, or builtin:nano")


def name_of(path: Path) -> str:
    """Return the name a user would type for the model at `path`: `builtin:nano`, or the path as it is."""
    there = path.resolve()
    return next((name for name, folder in builtin_models().items() if folder.resolve() == there), str(path))
