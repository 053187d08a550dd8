"""An unfinished output is taken up by the same run alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.stages.resumable import Resumable

TOKENS = torch.arange(12).view(3, 4)


def test_what_differs_is_named(tiny_llama: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    source, other = open_checkpoint(tiny_llama), open_checkpoint(tiny_qwen2)
    mine = Resumable.of(source, {"a": 1}, TOKENS, source, seed=3)
    mine.claim(tmp_path, tmp_path / "work")
    Resumable.of(source, {"a": 1}, TOKENS, source, seed=3).claim(tmp_path, tmp_path / "work")
    others = {
        "knobs": Resumable.of(source, {"a": 2}, TOKENS, source, seed=3),
        "model": Resumable.of(other, {"a": 1}, TOKENS, source, seed=3),
        "teacher": Resumable.of(source, {"a": 1}, TOKENS, other, seed=3),
        "text": Resumable.of(source, {"a": 1}, TOKENS + 1, source, seed=3),
        "seed": Resumable.of(source, {"a": 1}, TOKENS, source, seed=4),
        "device": Resumable.of(source, {"a": 1}, TOKENS, source, seed=3, device="cuda:0"),
        "versions": replace(mine, versions={"torch": "0"}),
        "processor": replace(mine, processor="another"),
        "threads": replace(mine, threads=(mine.threads or 0) + 1),
    }
    for name, its in others.items():
        with pytest.raises(DscError, match=f"other {name}; "):
            its.claim(tmp_path, tmp_path / "work")


def test_an_unfinished_output_of_unknown_making_is_made_again(tiny_llama: Path, tmp_path: Path) -> None:
    for name in (".dsc_partial/shard", "work/facts-00000.json", "work/chosen.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    Resumable.of(open_checkpoint(tiny_llama), {}, None).claim(tmp_path, tmp_path / "work")
    assert not (tmp_path / ".dsc_partial").exists()
    assert {file.name for file in (tmp_path / "work").iterdir()} == {"identity.json", "chosen.json"}
