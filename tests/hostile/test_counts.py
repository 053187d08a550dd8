"""A config.json that asks for more layers or experts than any model has: one line at once, nothing is made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from harness import dsc, faults, warm

from tests import v41

PLAN = ("plan", "model", "-r", "w4a16-fast", "--group-size", "32")
TEXT = ("quantize", "model", "-o", "out", "-r", "w4a16", "--group-size", "32", "--samples", "2", "--length", "16")
BILLION = 10**9
CASES: dict[str, tuple[Mapping[str, int], str]] = {
    "layers": ({"num_hidden_layers": BILLION}, "num_hidden_layers is above 10000"),
    "experts": ({"n_routed_experts": BILLION}, "n_routed_experts is above 100000"),
    "experts of a token": ({"num_experts_per_tok": BILLION}, "num_experts_per_tok is above 100000"),
    "shared experts": ({"n_shared_experts": BILLION}, "n_shared_experts is above 100000"),
    "experts within the limit": ({"n_routed_experts": 100_000}, "do not belong together"),
    "layers within the limit": ({"num_hidden_layers": 10_000}, "do not belong together"),
    "their product": ({"num_hidden_layers": 10_000, "n_routed_experts": 100_000}, "do not belong together"),
}


def refused(folder: Path, config: Mapping[str, object], expected: str) -> None:
    warm()
    (folder / "model" / "config.json").write_text(json.dumps(config))
    for words in (("inspect", "model"), PLAN, TEXT):
        found = dsc(folder, *words)
        assert faults(found, expected) == [], words
        assert found.code == 1, found.out
        assert found.seconds < 5 and found.memory < 256 << 20, (found.seconds, found.memory)
        assert not (folder / "out" / "config.json").exists()


@pytest.mark.parametrize("case", CASES)
def test_counts_of_deepseek_v3(case: str, tiny_v3: Path, tmp_path: Path) -> None:
    changes, expected = CASES[case]
    shutil.copytree(tiny_v3, tmp_path / "model")
    refused(tmp_path, {**json.loads((tiny_v3 / "config.json").read_text()), **changes}, expected)


@pytest.mark.parametrize("case", CASES)
def test_counts_of_deepseek_v41(case: str, tmp_path: Path) -> None:
    changes, expected = CASES[case]
    config = v41.config()
    v41.write_published(tmp_path / "model", config)
    config["text_config"] |= changes
    refused(tmp_path, config, "above" if "above" in expected else "")
