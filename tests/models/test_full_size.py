"""The headers of full size that benchmarks/full_size.py plans: as many parameters and bytes as are published."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import full_size
from deepseek_compress.models.families.table import family_of
from deepseek_compress.survey import survey


def sizes(name: str) -> tuple[int, int]:
    """Parameters and bytes."""
    config = full_size.MODELS[name]
    family = family_of(config)
    tensors = family.tensors(family.parse(config))
    parts = [part for tensor in tensors.items() for part in full_size.stored(config, *tensor)]
    size = sum(part.dtype.itemsize * math.prod(part.shape) for part in parts)
    return sum(math.prod(shape) for shape in tensors.values()), size


def test_r1_has_its_published_size() -> None:
    parameters, size = sizes("R1")
    assert parameters == 684_489_845_504
    assert size == pytest.approx(688.586e9, rel=1e-4)  # total_size of its index


def test_v4_pro_has_its_published_size() -> None:
    parameters, _ = sizes("V4-Pro-like")
    assert parameters == pytest.approx(1598.84e9, rel=1e-5)


@pytest.mark.verify
@pytest.mark.parametrize("name", full_size.MODELS)
def test_read_inspected_and_planned(name: str, tmp_path: Path) -> None:
    full_size.write_headers(tmp_path, full_size.MODELS[name])
    assert survey(str(tmp_path), verify=False)["problems"] == []
    rows = list(full_size.lines(name, full_size.MODELS[name], tmp_path, full_size.H100))
    assert len(rows) == 2 * len(full_size.runs_of(full_size.MODELS[name]))
    assert all(0 < row[3] < 1e4 for row in rows)
