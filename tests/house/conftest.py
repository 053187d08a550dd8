"""Calibration text of the user's, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deepseek_compress.cli import app
from deepseek_compress.planning import rates
from deepseek_compress.planning.costs import Rates

Dsc = Callable[..., Result]
QUICK = Rates(1e9, 1e9, 1e9, 1e6, 1e6, 1e9, 1e9, 1.0)  # of a machine that takes no time to measure


@pytest.fixture
def dsc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dsc:
    """`dsc("list", "--json")` in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rates, "_measured", lambda device: QUICK)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])
