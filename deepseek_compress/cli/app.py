"""The application: the order of the commands, exit codes, signals."""

from __future__ import annotations

import os
import re
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from deepseek_compress import __version__, console, limits
from deepseek_compress.cli import look, speak, work
from deepseek_compress.errors import DscError, Problems

STOPPED = "stopped; run the same command again to resume"


class Terminated(KeyboardInterrupt):
    """SIGTERM, so that whatever cleans up after Ctrl-C does it here too."""


class Commands(TyperGroup):
    """Turn an exception of a command into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; only a bug of ours shows a traceback."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except DscError as error:
            _report(ctx, error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            console.stopped(STOPPED)
            raise typer.Exit(143 if isinstance(error, Terminated) else 130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit is silent too
            raise typer.Exit(141) from None
        except OSError as error:
            if error.filename is None and error.errno is None:
                if " requested and " not in str(error):  # what numpy says of a disk that is full
                    raise
                error.strerror = "No space left on device"
            place = f"{error.filename}: " if error.filename is not None else ""
            _report(
                ctx,
                DscError(f"{place}{error.strerror or error}", "fix this, then run the same command again to resume"),
            )
            raise typer.Exit(1) from None


class Command(TyperCommand):
    """A command whose usage line names its arguments without braces."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`MODEL...`, where typer writes `{MODEL...}...`."""
        return [re.sub(r"\{(.*)\}(\.\.\.)?", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]


def _report(context: typer.Context, error: DscError) -> None:
    if context.meta.get("json"):
        found = error.problems[: limits.PROBLEMS] if isinstance(error, Problems) else [error]
        console.print_json({"problems": [{"what": problem.what, "fix": problem.fix} for problem in found]})
    console.errors(error)


app = typer.Typer(
    name="dsc",
    cls=Commands,
    help="Make DeepSeek-family models smaller and faster, with proof that they still reason.",
    epilog="Start with: dsc run quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        console.line(f"deepseek-compress {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


_RUN, _STAGE, _ANSWER, _LOOK = "A whole recipe", "One stage", "Answer", "Look"
for name, function, panel in (
    ("plan", work.plan, _RUN),
    ("run", work.run, _RUN),
    ("distill", work.distill, _STAGE),
    ("prune", work.prune, _STAGE),
    ("calibrate", work.calibrate, _STAGE),
    ("quantize", work.quantize, _STAGE),
    ("allocate", work.allocate, _STAGE),
    ("export", work.export, _STAGE),
    ("evaluate", work.evaluate, _STAGE),
    ("chat", speak.chat, _ANSWER),
    ("generate", speak.generate, _ANSWER),
    ("compare", look.compare, _LOOK),
    ("inspect", look.inspect, _LOOK),
    ("doctor", look.doctor, _LOOK),
    ("list", look.list_, _LOOK),
):
    app.command(name, cls=Command, rich_help_panel=panel)(function)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def main() -> None:
    """Entry point of the command `dsc`."""
    signal.signal(signal.SIGTERM, _terminate)
    # Read when torch loads. Threads that spin while they wait take a busy machine's cores from each other: a run on two
    # threads beside four other processes took 3.5 times as long as one whose threads sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
