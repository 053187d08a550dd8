"""Exports of the tiny models, made once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.export.target import Job
from deepseek_compress.stages.export import Export

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %} {% endif %}"
)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(source, target, knobs) -> its directory, written without verification."""
    made: dict[str, Path] = {}

    def get(source: Path, target: str, **knobs: Any) -> Path:
        key = f"{source} {target} {knobs}"
        if key not in made:
            out = tmp_path_factory.mktemp(f"{source.name}_{target}")
            chosen = Export.model_validate({"target": target, "verify": False, **knobs}).target
            chosen.write(open_checkpoint(source), out, Job({}, lambda text: None))
            made[key] = out
        return made[key]

    return get


@pytest.fixture
def talker(tiny_llama: Path, tmp_path: Path) -> Path:
    """A Llama with a chat template."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "talker"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
