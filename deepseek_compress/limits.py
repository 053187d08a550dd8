"""Limits on the work that input may ask for, in one place. Beyond one there is a clear error, never an endless run.

Each is far above what any published model or honest file needs.
"""

from __future__ import annotations

import re
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from deepseek_compress.errors import DscError

JSON_BYTES = 512 << 20  # of a JSON file: the index of the largest model has 10 MB, a tokenizer 20 MB
RECIPE_BYTES = 1 << 20
HEADER_BYTES = 100_000_000  # of a shard's header; the safetensors library refuses longer ones too
HEADER_TENSORS = 1_000_000  # of a shard
RANK = 8  # dimensions of a tensor
SIZE = 1 << 48  # elements of a dimension, bytes of a tensor, and any integer in a config.json
LAYERS = 10_000
EXPERTS = 100_000
LINE_BYTES = 64 << 20  # of a line of calibration text
TEXT_BYTES = 1 << 30  # of a text to evaluate on
PIECE = 1 << 16  # characters of a document that are tokenized at a time; each takes some 170 bytes meanwhile
WINDOW_PIECE = 1 << 21  # of a text to evaluate on, so that all but books are tokenized as a whole
TEMPLATE_SECONDS, TEMPLATE_BYTES = 10, 1 << 30  # of a chat template: time, and memory beyond what is taken already
PROBLEMS = 50  # lines that a command prints about what is wrong
SAMPLES = 200_000  # of a log of another harness
REPORTS, MODELS = 200, 200  # of dsc compare
REPEATS, OPTIONAL = 4, 8  # in a regular expression: parts without an upper bound, parts with one


def pattern(text: str) -> re.Pattern[str]:
    """Compile a regular expression whose time is bounded; `DscError` for one that may try forever.

    Time explodes where a repeated part can itself match in several ways, so that part may hold no repetition, no
    alternative and no back-reference; and it grows with a power of the number of repetitions, which is limited.
    """
    try:
        compiled = re.compile(text)
        found = [0, 0]
        _count(re._parser.parse(text), found, inside=False)  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError) as error:
        raise DscError(f"{text[:80]!r}: {error}", "give a regular expression") from None
    if found[0] > REPEATS or found[1] > OPTIONAL:
        what = f"{text[:80]!r}: {found[0]} unbounded and {found[1]} optional repetitions"
        raise DscError(what, f"write it with {REPEATS} and {OPTIONAL} at most")
    return compiled


def _count(parsed: Any, found: list[int], inside: bool) -> None:
    """Add unbounded and optional repetitions to `found`; `inside` a repetition there may be none."""
    for code, value in parsed:
        name = str(code)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, part = value
            if inside:
                raise DscError("a repetition within a repetition may take forever", "write the expression without it")
            if least != most:
                found[0 if most >= 1000 else 1] += 1
            _count(part, found, most > 1)
        elif name == "BRANCH":
            if inside:
                raise DscError("an alternative within a repetition may take forever", "write the expression without it")
            for part in value[1]:
                _count(part, found, inside)
        elif name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP"):
            _count(value[-1] if isinstance(value, tuple) else value, found, inside)
        elif name in ("GROUPREF", "GROUPREF_EXISTS"):
            raise DscError("a back-reference may take forever", "write the expression without it")


@contextmanager
def bounded(seconds: float, room: int) -> Iterator[None]:
    """Inside, this process may take `seconds`, and `room` bytes more than it has; then TimeoutError or MemoryError.

    In the main thread alone: signals reach no other.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not finished after {seconds:g} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")  # elsewhere than on Linux there is no limit of memory
    most = int(statm.read_text().split()[0]) * resource.getpagesize() + room if statm.exists() else soft
    most = most if soft == resource.RLIM_INFINITY else min(soft, most)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
