"""A disk that fills up in the middle of a run: one clear error, nothing that loads, and it goes on when there is room.

The disk is a tmpfs in a mount namespace of its own, which needs no rights where users may make namespaces.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import CLAIMED, OPTIONS, contents, finish, start

SCRIPT = """
set -e
mount -t tmpfs -o size=64M tmpfs "$DISK"
( while [ ! -e "$DISK/out/$CLAIMED" ]; do sleep 0.01; done; dd if=/dev/zero of="$DISK/fill" bs=4k 2>/dev/null ) &
"$@" && exit 3
wait
echo "loads: $(ls "$DISK"/out/config.json 2>/dev/null)" >&2
rm "$DISK/fill"
"$@"
cp -r "$DISK/out" "$COPY"
"""


def can_mount() -> bool:
    """Whether this user may make a mount namespace."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("more", [pytest.param((), marks=pytest.mark.verify), ("--workers", "2")])
def test_it_goes_on_when_there_is_room(tiny_v3: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    if not can_mount():
        pytest.skip("no mount namespaces here")
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    command = [sys.executable, "-m", "deepseek_compress", "quantize", str(tiny_v3), "-o", str(disk / "out"), *OPTIONS]
    names = {"DISK": str(disk), "COPY": str(copy), "CLAIMED": CLAIMED}
    done = subprocess.run(
        ["unshare", "-rm", "env", *(f"{k}={v}" for k, v in names.items()), "sh", "-c", SCRIPT, "sh", *command, *more],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = done.stderr.split("loads:")[0]
    assert "No space left on device" in first
    assert "Traceback" not in first
    assert "loads: \n" in done.stderr
    finish(start(tiny_v3, tmp_path / "whole", *more))
    assert contents(copy) == contents(tmp_path / "whole")
