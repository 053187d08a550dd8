"""Rows that are written come back, from memory and from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_compress.errors import DscError
from deepseek_compress.streaming import hidden_store


@pytest.mark.parametrize("resident", [0, 1 << 20])
def test_rows_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: int) -> None:
    monkeypatch.setattr(hidden_store, "RESIDENT", resident)
    rows = torch.randn(10, 3, 2, generator=torch.Generator().manual_seed(0))
    with hidden_store.HiddenStore(tmp_path / "a.tmp", 10, (3, 2)) as store:
        assert not store.read(0, 10).any()
        store.write(0, rows[:6])
        store.write(6, rows[6:])
        assert torch.equal(store.read(2, 5), rows[2:7])
        assert torch.equal(store.gather([9, 0, 4]), rows[[9, 0, 4]])
        store.add([1, 8], torch.ones(2, 3, 2))
        rows[[1, 8]] += 1
        store.rename(tmp_path / "a.f32")
    with hidden_store.HiddenStore(tmp_path / "a.f32", 10, (3, 2), existing=True) as store:
        assert torch.equal(store.read(0, 10), rows)
    with pytest.raises(DscError, match="expected"):
        hidden_store.HiddenStore(tmp_path / "a.f32", 11, (3, 2), existing=True)


def test_without_a_file(tmp_path: Path) -> None:
    store = hidden_store.HiddenStore(None, 4, (2,))
    store.write(1, torch.ones(2, 2))
    assert store.read(0, 4).sum() == 4
    assert list(tmp_path.iterdir()) == []
