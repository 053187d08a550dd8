"""Where the files that come with the package lie: recipes, calibration data, the built-in model.

An installed wheel carries them in `deepseek_compress/_data`; a checkout has them next to the package.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from deepseek_compress.errors import DscError

PACKAGE = Path(__file__).parent


def data(name: str) -> Path:
    """Directory `recipes`, `calibration_data` or `builtin`."""
    packaged = PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package, sorted."""
    return {path.stem: path for path in sorted(data("recipes").glob("*.yaml"))}


def recipe_path(name: str) -> Path:
    """Return the file that `-r NAME` means: the name of a recipe that comes with the package, or a file."""
    known = recipes()
    if name in known:
        return known[name]
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        what = "is a directory" if path.is_dir() else "no such file"
        raise DscError(f"{name}: {what}", f"give a recipe file, or one of: {', '.join(known)}")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise DscError(f"unknown recipe {name!r}", f"{hint}give a file, or one of: {', '.join(known)}")
