"""The commands that only look: inspect, doctor, list, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepseek_compress import console
from deepseek_compress.cli import options as o
from deepseek_compress.cli import show
from deepseek_compress.errors import raise_problems


def inspect(
    model: o.Model,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare hashes with its manifest.")] = True,
    sparsity: Annotated[bool, typer.Option("--sparsity", help="Count zeros too; reads every matrix.")] = False,
    json: o.Json = False,
) -> None:
    """Show what a checkpoint holds: roles, types, bits, sparsity, lineage; verify its hashes."""
    from deepseek_compress.survey import survey

    found = survey(model, verify, sparsity)
    show.survey(model, found, json)
    if found["problems"]:
        raise typer.Exit(1)


def doctor(json: o.Json = False) -> None:
    """Show what this machine can run, and how to get the rest."""
    from deepseek_compress.doctor import examine

    checks = examine()
    following = "dsc run quickstart"
    if json:
        console.print_json({"checks": [check._asdict() for check in checks], "next": following})
        return
    console.table(
        "",
        ("", "good", "found"),
        ((c.name, console.mark(c.good), c.found if c.good else f"{c.found}\n{c.how}") for c in checks),
    )
    console.next_step(following)


def list_(json: o.Json = False) -> None:
    """Show algorithms, recipes, stages, suites and models, with one line and the paper each."""
    from deepseek_compress.catalogue import catalogue

    found = catalogue()
    following = "dsc plan builtin:nano -r quickstart"
    if json:
        lists = {title: [entry._asdict() for entry in entries] for title, entries in found.items()}
        console.print_json({**lists, "next": following})
        return
    for title, entries in found.items():
        rows = ((entry.name, entry.summary + (f" ({entry.source})" if entry.source else "")) for entry in entries)
        console.table(title, ("name", "what"), rows)
        console.line("")
    console.next_step(following)


def compare(
    reports: Annotated[
        list[Path], typer.Argument(metavar="REPORT...", help="report.json files; logs of lm-eval or Inspect.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="REPORT.html", help="One page; .csv: a table as well.")
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option("--fail-if", metavar="CONDITION", help="Exit 1 where true: 'exact_match < -1.0'."),
    ] = None,
    mlflow: Annotated[
        str | None, typer.Option("--mlflow", metavar="URI", help="Log each model to this MLflow tracking server.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Put several reports side by side: a table, and a page of all with -o."""
    from deepseek_compress import reports as library
    from deepseek_compress.reports import gate, tracking

    conditions = [gate.parse(text) for text in fail_if or ()]
    if mlflow is not None:
        tracking.client()
    record = library.compare(reports, out)
    show.report(record, out, json)
    if mlflow is not None:
        count = tracking.log(record, mlflow, out)
        console.note(f"{count} runs logged to {mlflow}, experiment {tracking.EXPERIMENT}")
    raise_problems(gate.failures(record, conditions))
