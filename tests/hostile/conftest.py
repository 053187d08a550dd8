"""What the commands of the hostile tests read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import windows
from harness import warm


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    """A folder with a checkpoint, a packed one, questions, text, a report and a recipe."""
    warm()
    folder = tmp_path_factory.mktemp("given")
    shutil.copytree(tiny_qwen2, folder / "model")
    windows.prepare(folder)
    return folder
