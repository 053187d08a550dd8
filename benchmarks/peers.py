"""A virtual environment for each rival, made once and kept: `peer(name)` is the path of its python.

    python -m benchmarks.peers [NAME ...]      make those environments, all when none is named

Every version is pinned in `rivals/NAME.txt`. They are kept in `$DSC_CACHE/peers`, else the user's cache directory, and
made again when the pins change. Torch is installed first and by itself, so that `TORCH_INDEX` can name an index of CPU
builds for it alone; a rival that asked for torch without a pin would fetch gigabytes of CUDA. Rivals are not
dependencies of this project, nothing here imports them, and none of them sees our packages or another rival's.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

RIVALS = Path(__file__).resolve().parent / "rivals"
NAMES = ("llmcompressor", "autoround", "gptqmodel", "hqq", "modelopt")
BUILD_TOOLS = ("setuptools", "wheel", "ninja")  # packages that come as source build against the torch beside them


class PeerError(Exception):
    """A rival's environment could not be made; the message ends with what pip said."""


def cache() -> Path:
    """Where environments and results of rivals are kept."""
    base = os.environ.get("DSC_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsc"


def pins(name: str) -> dict[str, str]:
    """Package -> version of a rival's environment."""
    lines = (RIVALS / f"{name}.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {package.strip(): version.strip() for package, version in pairs}


def fingerprint(name: str) -> str:
    """Of everything that decides what is in a rival's environment."""
    text = (RIVALS / f"{name}.txt").read_text() + f"{sys.version_info[:2]}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def peer(name: str) -> Path:
    """The python of a rival's environment, which is made when it isn't there; raises PeerError."""
    if name not in NAMES:
        raise PeerError(f"{name}: no such rival; one of {', '.join(NAMES)}")
    home = cache() / "peers" / f"{name}-{fingerprint(name)}"
    python = home / "bin" / "python"
    done = home / "complete"
    home.parent.mkdir(parents=True, exist_ok=True)
    with open(home.parent / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two benchmarks may ask at once
        if not done.exists():
            shutil.rmtree(home, ignore_errors=True)
            _make(name, home, python)
            done.touch()
    return python


def _make(name: str, home: Path, python: Path) -> None:
    print(f"{name}: making its environment in {home}", file=sys.stderr, flush=True)
    index = os.environ.get("TORCH_INDEX")
    versions = pins(name)
    tools = [f"{tool}=={versions[tool]}" if tool in versions else tool for tool in BUILD_TOOLS]
    _run(name, [sys.executable, "-m", "venv", str(home)])
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    _run(name, [*pip, *(["--index-url", index] if index else []), f"torch=={versions['torch']}"])
    _run(name, [*pip, *tools])
    _run(name, [*pip, "--no-deps", "--no-build-isolation", "-r", str(RIVALS / f"{name}.txt")])


def _run(name: str, command: list[str]) -> None:
    environment = {**os.environ, "DISABLE_CUDA": "1"}  # hqq: its CUDA kernels are not built
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if result.returncode:
        raise PeerError(f"{name}: {' '.join(command[1:4])} failed\n{result.stdout[-2000:]}")


def main() -> int:
    """Make the environments that are named; 1 when one could not be made."""
    failed = 0
    for name in sys.argv[1:] or NAMES:
        try:
            print(f"{name}: {peer(name)}")
        except PeerError as error:
            failed = 1
            print(error, file=sys.stderr)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
