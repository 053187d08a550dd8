"""Every malformed checkpoint of the list: one clear line or a correct result, in bounded time and memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import checkpoints
import manifests
import pytest
from harness import dsc, faults, loads, warm

EVERY = 15  # cases of which the default tests take one
ALL = [*checkpoints.cases(), *manifests.cases()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    warm()
    folder = tmp_path_factory.mktemp("hostile")
    chat = [{"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]}] * 40
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(line) for line in chat))
    return folder


def test_there_are_enough() -> None:
    assert len(ALL) >= 220
    assert len({case.name for case in ALL}) == len(ALL)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=str(i), marks=[] if i % EVERY == 0 else pytest.mark.verify) for i, c in enumerate(ALL)],
)
def test_a_malformed_checkpoint(case: checkpoints.Case, home: Path, tmp_path: Path, tiny_qwen2: Path) -> None:
    folder = tmp_path / "case"
    model = folder / "model"
    shutil.copytree(tiny_qwen2, model)
    shutil.copy(home / "chat.jsonl", tmp_path)
    case.change(model)
    found = dsc(folder, *case.command.format("model").split())
    assert faults(found, case.expected) == [], case.name
    if found.code:
        assert not loads(folder / "out") if (folder / "out").exists() else True, case.name
