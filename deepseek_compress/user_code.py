"""A function of the user's own: Python in a file, called in a process of its own.

The file is code and runs with the user's rights, so only the command line can name it: a recipe, which may come from
anywhere, cannot. What it prints goes to standard error. A call that raises, or takes longer than its time, ends the run
with one line; what was done before is kept.

This file is the process too.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from select import select
from typing import IO, Any

from deepseek_compress.errors import DscError
from deepseek_compress.processes import start_python

START = 60.0  # seconds for its imports


class UserFunction:
    """The function `name` of the file `path`; a process is started at the first call."""

    option: str  # that names it
    gives: str  # in one word
    forms: str  # that its value may have

    def __init__(self, given: str, seconds: float) -> None:
        """`given`: FILE.py:FUNCTION. Raises DscError for another form and a missing file."""
        file, colon, name = given.rpartition(":")
        if not colon or not name.isidentifier():
            raise DscError(f"{self.option} {given!r}: names no function", "write it as FILE.py:FUNCTION")
        self.path, self.name, self.seconds = Path(file).resolve(), name, seconds
        if not self.path.is_file():
            raise DscError(f"{self.option} {given!r}: no such file", "give the path of a Python file")
        self._process: Any = None  # what `start_python` gives
        self._left = b""  # of what it wrote, after the last line that was read

    def value(self, origin: str, *arguments: str | None) -> Any:
        """Return what it returns, as JSON has it. Raises DscError where it raises or does not end."""
        process = self._started()
        line = json.dumps(arguments).encode() + b"\n"
        try:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        except OSError:
            raise self._failed(f"ended at {origin}") from None
        said = self._line(self.seconds, origin)
        if "error" in said:
            raise self._failed(f"raised {said['error']} at {origin}")
        return said.get("value")

    def close(self) -> None:
        """End its process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process, self._left = None, b""

    def _started(self) -> Any:
        if self._process is None:
            self._process = start_python("-B", __file__, str(self.path), self.name, start_new_session=True)
            said = self._line(START, "its start")
            if "error" in said:
                raise self._failed(f"cannot be loaded: {said['error']}")
        return self._process

    def _line(self, seconds: float, origin: str) -> dict[str, Any]:
        """Return what the process says next."""
        assert self._process is not None
        assert self._process.stdout is not None
        pipe, end = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._left:
            wait = end - time.monotonic()
            if wait <= 0 or not select([pipe], [], [], wait)[0]:
                raise self._failed(f"gave no {self.gives} within {seconds:g} s at {origin}")
            read = os.read(pipe, 1 << 16)
            if not read:
                raise self._failed(f"ended at {origin}")
            self._left += read
        line, _, self._left = self._left.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def _failed(self, what: str) -> DscError:
        self.close()
        return DscError(f"{self.path.name}:{self.name} {what}", "fix it, then run the same command again to resume")

    def refused(self, value: Any, origin: str) -> DscError:
        """Return the error of a value of another form; its process is ended."""
        return self._failed(f"returned {str(value)[:60]} at {origin}, not {self.forms}")


def _serve(file: str, name: str, answers: IO[bytes]) -> None:
    """Answer a line of JSON with a line of JSON until the input ends."""

    def say(**said: Any) -> None:
        answers.write(json.dumps(said, default=str).encode() + b"\n")
        answers.flush()

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    sys.path.insert(0, str(Path(file).parent))
    try:
        spec = spec_from_file_location("user_code", file)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except BaseException as error:
        say(error=_message(error))
        return
    say(ready=True)
    for line in sys.stdin.buffer:
        try:
            say(value=function(*json.loads(line)))
        except BaseException as error:  # whatever the user's code raises, SystemExit among it
            say(error=_message(error))


def _end_with(parent: int) -> None:
    """End this process, whatever it computes, when the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as pipe:
        os.dup2(2, 1)  # what the function prints is not taken for an answer
        _serve(sys.argv[1], sys.argv[2], pipe)
