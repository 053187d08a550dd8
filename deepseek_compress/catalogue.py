"""Everything a recipe can name, with one line and the source of each: `dsc list`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_compress import resources, stages
from deepseek_compress.distillation.losses import LOSSES
from deepseek_compress.export import TARGETS
from deepseek_compress.models import FAMILIES
from deepseek_compress.models.resolve import builtin_models
from deepseek_compress.numerics import ACTIVATIONS, MIGRATION, ROTATION, SPARSITY, WEIGHTS
from deepseek_compress.numerics.kv_cache import KvRounding
from deepseek_compress.numerics.ranges import ESTIMATORS


class Entry(NamedTuple):
    """A name, what it is in one line, and the paper it follows."""

    name: str
    summary: str
    source: str = ""


def catalogue() -> dict[str, list[Entry]]:
    """Title -> entries."""
    return {
        "recipes": [Entry(name, _first_comment(path)) for name, path in resources.recipes().items()],
        "stages": [Entry(name, entry.summary) for name, entry in stages.STAGES.items()],
        "losses": _components(LOSSES),
        "weights": _components(WEIGHTS),
        "sparsity": _components(SPARSITY),
        "activations": _components(ACTIVATIONS),
        "estimators": _components(ESTIMATORS),
        "rotation": _components(ROTATION),
        "migration": _components(MIGRATION),
        "kv_cache": [Entry("bits", _first_line(KvRounding), KvRounding.paper)],
        "targets": [Entry(name, entry.summary) for name, entry in TARGETS.items()],
        "model families": [Entry(name, _first_line(family)) for name, family in FAMILIES.items()],
        "built-in models": [Entry(name, _described(path)) for name, path in builtin_models().items()],
        "suites": [
            Entry("builtin", "mathematics, programs, commonsense and adversarial problems, verified step by step"),
            Entry("FILE.jsonl, FILE.parquet", "questions of yours: numbers, boxed answers, choices, arithmetic steps"),
        ],
    }


def _components(table: Mapping[str, type[Any]]) -> list[Entry]:
    return [Entry(name, _first_line(kind), getattr(kind, "paper", "")) for name, kind in table.items()]


def _first_line(kind: type[Any]) -> str:
    return (inspect.getdoc(kind) or "").split("\n")[0].rstrip(".")


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").split("\n")[0].lstrip("# ").rstrip(".")


def _described(path: Path) -> str:
    size = sum(shard.stat().st_size for shard in path.glob("*.safetensors"))
    return f"comes with the package, {size / 1e6:.1f} MB"
