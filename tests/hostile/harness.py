"""The command line in a fork of this process, which has imported everything: a case takes a fraction of a second.

A case ends with exit code 0, or 1 and clear lines; never with a traceback, an escape sequence, more than `SECONDS`, or
`MEMORY` bytes beyond what the process began with.
"""

from __future__ import annotations

import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import NamedTuple

from failing import Fault

import deepseek_compress

HERE = str(Path(__file__).parent)
SECONDS, MEMORY = 20, 2 << 30
TRAINS = ("distill", "run")  # in forks of another process: autograd refuses a fork of one that has trained
LINES, WIDTH = 60, 2000  # what a command may print about what is wrong
HEAVY = ("matplotlib.backends.backend_svg", "torch._dynamo", "onnx", "onnxruntime", "tensorrt_rtx", "gguf")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Outcome(NamedTuple):
    """What a command did."""

    code: int  # 128 + N where it was killed by signal N
    out: str
    err: str
    seconds: float  # of the processor: other work on the machine does not count
    memory: int  # bytes of the highest resident size beyond this process's own

    @property
    def errors(self) -> list[str]:
        """The lines about what is wrong."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def warm() -> None:
    """Import what commands use, once."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import transformers  # noqa: F401

    from cuda_ops import build
    from deepseek_compress import cli, pipeline, reports, stages, survey  # noqa: F401
    from deepseek_compress.planning import rates  # noqa: F401
    from deepseek_compress.stages import STAGES, load

    for kind in STAGES:
        load(kind)
    build.cpu_library()  # compiling it is no case's business


def forked(work: Callable[[], int], folder: Path, seconds: float = SECONDS) -> Outcome:
    """Run `work` in a fork; its output is kept in `folder`, and it is killed where it hangs."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            code = work()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > 8 * seconds:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(status)
    texts = [(folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")]
    memory = max(0, usage.ru_maxrss - before) * 1024
    spent = usage.ru_utime + usage.ru_stime
    return Outcome(128 - code if code < 0 else code, *texts, spent, memory)


def dsc(
    folder: Path,
    *arguments: str,
    seconds: float = SECONDS,
    fault: Fault | None = None,
    before: Callable[[], None] | None = None,
    apart: bool = False,
) -> Outcome:
    """`dsc ARGUMENTS` in `folder`, where `stdout` and `stderr` are kept; `fault` strikes it, `before` runs first.

    `apart`: in a fork of a process that starts slower and has imported even more; `before` is then of a module.
    """
    if apart or arguments[0] in TRAINS:
        return _untrained().dsc(folder, arguments, fault, before, seconds)
    return forked(lambda: _main(folder, arguments, fault, before), folder, seconds)


def _main(folder: Path, arguments: Sequence[str], fault: Fault | None, before: Callable[[], None] | None) -> int:
    from deepseek_compress.cli import main

    os.chdir(folder)
    if before is not None:
        before()
    sys.argv = ["dsc", *arguments]
    if fault is not None:
        fault.install()
    main()
    return 0


class Untrained:
    """A process that has imported everything and done nothing else; it forks for each command."""

    def __init__(self) -> None:
        code = f"import sys; sys.path.append({HERE!r}); import harness; harness.serve()"
        command = [sys.executable, "-P", "-c", code]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def dsc(self, folder: Path, *how: object) -> Outcome:
        """`how`: as `_main` takes it, and the seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(pickle.dumps((folder, *how)))
        self._process.stdin.flush()
        found: Outcome = pickle.load(self._process.stdout)
        return found


def serve() -> None:
    """Be that process, until its input ends."""
    warm()
    for module in walk_packages(deepseek_compress.__path__, "deepseek_compress."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    for name in HEAVY:
        with suppress(ImportError):
            import_module(name)
    while True:
        try:
            folder, *how, seconds = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        found = forked(partial(_main, folder, *how), folder, seconds)
        sys.stdout.buffer.write(pickle.dumps(found))
        sys.stdout.buffer.flush()


@cache
def _untrained() -> Untrained:
    return Untrained()


def faults(found: Outcome, expected: str = "") -> list[str]:
    """What is wrong with how a command took hostile input; `expected` is a pattern of one of its lines."""
    wrong = []
    if found.code not in (0, 1):
        wrong.append(f"exit code {found.code}")
    if "Traceback" in found.err + found.out:
        wrong.append("a traceback")
    if CONTROL.search(found.err + found.out):
        wrong.append("control characters in the output")
    if found.seconds > SECONDS or found.memory > MEMORY:
        wrong.append(f"{found.seconds:.1f} s, {found.memory >> 20} MiB")
    if found.code == 1 and not found.errors:
        wrong.append("no line says why")
    if len(found.errors) > LINES or any(len(line) > WIDTH for line in found.errors):
        wrong.append(f"{len(found.errors)} lines, the longest of {max(map(len, found.errors))} characters")
    if expected and found.code == 1 and not any(re.search(expected, line) for line in found.errors):
        wrong.append(f"no line with {expected!r}")
    return [] if not wrong else [*wrong, found.err[-1500:]]


def loads(directory: Path) -> bool:
    """Whether something that loads lies there."""
    return any(directory.rglob("config.json")) or any(directory.rglob("model.onnx")) or any(directory.rglob("*.gguf"))


def commands(*texts: str) -> Sequence[Sequence[str]]:
    """Command lines as words."""
    return [text.split() for text in texts]
