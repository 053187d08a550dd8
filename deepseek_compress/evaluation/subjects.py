"""From the words of a command line to what a report is about: checkpoints and deployed files, each with a name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from deepseek_compress.errors import DscError
from deepseek_compress.evaluation.deployed import HTTP, is_deployed


class Subjects(NamedTuple):
    """`main` names `model`, the checkpoint that a recipe starts from; `inputs` and `deployed`: name -> where."""

    main: str
    model: str
    inputs: dict[str, str]
    names: list[str]  # of the checkpoints, the reference first
    reference: str | None
    deployed: dict[str, str]


def subjects(models: Sequence[str], reference: str | None) -> Subjects:
    """Names are the last parts of the paths. Raises DscError where no checkpoint says what the others are to match."""
    checkpoints = [model for model in models if not is_deployed(model)]
    files = [model for model in models if is_deployed(model)]
    if reference is not None and is_deployed(reference):
        raise DscError(f"--reference {reference}: not a checkpoint", "give the checkpoint that it was made of")
    if reference is None and not checkpoints:
        raise DscError(f"{files[0]}: a deployed file alone", "give the checkpoint it was made of: --reference MODEL")
    taken: dict[str, str] = {}
    for model in checkpoints:  # `model` is what recipes call the first
        taken[_free(_label(model), {**taken, "model": ""} if taken else taken)] = model
    named = next((name for name, model in taken.items() if model == reference), None)
    if reference is not None and named is None:
        named = _free(_label(reference), {**taken, "model": ""}, "reference")
    inputs = {name: model for name, model in taken.items() if checkpoints and model is not checkpoints[0]}
    first = next(iter(taken), named)
    if named is not None and reference is not None and first != named and named not in taken:
        inputs[named] = reference
    deployed: dict[str, str] = {}
    for model in files:
        deployed[_free(_label(model), {**taken, **deployed, named or "": ""})] = model
    names = [*([named] if named else []), *(name for name in taken if name != named)]
    assert first is not None
    return Subjects(first, checkpoints[0] if checkpoints else str(reference), inputs, names, named, deployed)


def _free(label: str, taken: dict[str, str], suffix: str = "") -> str:
    if label not in taken:
        return label
    wanted, number = f"{label}-{suffix}" if suffix else f"{label}-2", 2
    while wanted in taken:
        number += 1
        wanted = f"{label}-{suffix}{number}" if suffix else f"{label}-{number}"
    return wanted


def _label(model: str) -> str:
    if model.startswith(HTTP):
        return re.sub(r"[^A-Za-z0-9._-]+", "-", model.partition("//")[2]).strip("._-") or "server"
    path = Path(model.removeprefix("builtin:")).expanduser().resolve()
    last = path.parent.name if path.name in ("model.onnx", "model.engine") else path.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-") or "model"
