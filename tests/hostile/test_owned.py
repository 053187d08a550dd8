"""Files of the user's in the directory of an aborted run, named as the output's own will be: they stay, and are named.

What an earlier run of ours left there may go; of what is not recorded nothing is overwritten or removed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from failing import KILLED, Fault
from windows import contents, run, uninterrupted

CLAIMED = 12  # calls after which each command has written its state, and nothing of its output
FAST = ("data-free", "onnx")
NAMES = (*FAST, "text", "prune", "calibrate", "allocate", "evaluate", "bf16", "gguf")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.verify) for name in NAMES]
)
def test_files_of_the_user_stay(name: str, given: Path, tmp_path: Path) -> None:
    expected, _ = uninterrupted(name, given, tmp_path)
    here = tmp_path / "here"
    assert run(name, given, here, Fault(CLAIMED)).code == KILLED
    visible = [file for file in expected if not any(part.startswith((".dsc_", "dsc_")) for part in Path(file).parts)]
    assert visible
    assert not any((here / file).exists() for file in visible)
    for file in visible:
        (here / file).write_text(f"mine: {file}")
    refused = run(name, given, here)
    assert {file: (here / file).read_text() for file in visible} == {file: f"mine: {file}" for file in visible}
    assert refused.code == 1, refused.err
    assert any(Path(file).name in line for file in visible for line in refused.errors), refused.err
    for file in visible:
        (here / file).unlink()
    again = run(name, given, here)
    assert again.code == 0, again.err
    assert contents(here) == expected
