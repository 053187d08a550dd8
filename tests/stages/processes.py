"""The real command line in processes of its own: start it, wait until it works, see what it left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError

OPTIONS = ["-r", "w4a16", "--group-size", "32", "--samples", "16", "--length", "64"]
CLAIMED = ".dsc_blocks/identity.json"


def start(model: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "deepseek_compress", "quantize", str(model), "-o", str(out), *OPTIONS, *more]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def until_claimed(process: subprocess.Popen[bytes], out: Path) -> None:
    while not (out / CLAIMED).exists() and process.poll() is None:
        time.sleep(0.01)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def contents(out: Path) -> dict[str, bytes]:
    """Everything the promise of same bytes covers."""
    files = [file for file in sorted(out.rglob("*")) if file.is_file() and file.name != "dsc_run.json"]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def loads(out: Path) -> bool:
    try:
        open_checkpoint(out)
    except DscError:
        return False
    return True


def group_of(pid: int) -> list[str]:
    """Command lines of the living processes of a process group."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group = (place / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if int(group) == pid and state != "Z":
                found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
