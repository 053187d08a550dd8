"""The options that commands share, each written once."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def _remember_json(context: typer.Context, value: bool) -> bool:
    context.meta["json"] = value
    return value


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, or builtin:nano.")]
Out = Annotated[
    Path, typer.Option("-o", "--out", metavar="OUT", help="Where to write; never overwrites foreign files.")
]
RecipeOption = Annotated[
    str, typer.Option("-r", "--recipe", metavar="RECIPE", help="A recipe file, or a name of `dsc list`.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a knob of the recipe; repeatable.")
]
Calibration = Annotated[
    list[str] | None,
    typer.Option("--calibration", metavar="FILE[=SHARE]", help="Calibration text of yours; repeatable."),
]
TrainingText = Annotated[
    list[str] | None,
    typer.Option("--calibration", "--data", metavar="FILE[=SHARE]", help="Training text of yours; repeatable."),
]
Statistics = Annotated[
    str | None,
    typer.Option("--statistics", metavar="DIR", help="What `dsc calibrate` collected, instead of calibration text."),
]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Calibration samples.")]
Length = Annotated[int | None, typer.Option("--length", min=2, metavar="TOKENS", help="Tokens in a sample.")]
GroupSize = Annotated[
    int | None, typer.Option("--group-size", min=1, help="Weights that share a scale. [default: what fits]")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N, or cuda:N,cuda:M.")]
Memory = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="Use no more, all processes together; for instance 8GiB.")
]
GpuMemory = Annotated[
    str | None, typer.Option("--gpu-memory", metavar="SIZE", help="Use no more of the GPU's; for instance 24GiB.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes that compute. [default: one a core, for large models]")
]
Ray = Annotated[
    str | None, typer.Option("--ray", metavar="ADDRESS", help="Compute on a Ray cluster that sees the same files.")
]
Verifier = Annotated[
    str | None,
    typer.Option("--verifier", metavar="FILE.py:NAME", help="Code of yours that judges traces."),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Do not read large files again to verify that they are what was written.")
]
Json = Annotated[bool, typer.Option("--json", callback=_remember_json, help="One JSON document on standard output.")]


def typed(context: typer.Context, *but: str) -> str:
    """Return the given options, each after a space, as they would be typed again; without the parameters `but`."""
    words = ""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if source and source.name == "COMMANDLINE" and option.param_type_name == "option" and option.name not in but:
            value = context.params[option.name or ""]
            for one in value if isinstance(value, (list, tuple)) else [value]:
                words += f" {option.opts[0]} {shlex.quote(str(one))}"
    return words
