"""Manifests with values of another type, from a seeded list.

They have schema 1, whose files had no checksum: what is read is what an attacker wrote.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import EVALUATE, FAST, LOOK, SEED, VALUES, Case

GENERATE = "generate {} --prompt hello --max-tokens 2"
EXPORT = "export {} -o out --target bf16"
COMMANDS = (LOOK, EVALUATE, FAST, GENERATE, EXPORT)
KEYS = (
    "activations", "kv_cache", "source", "pipeline", "calibration", "statistics", "files", "lineage", "knobs",
    "versions", "recipe", "seed", "stage", "schema",
)  # fmt: skip


def cases() -> list[Case]:
    """The same list every time."""
    rng = random.Random(SEED)
    return [
        Case(f"manifest-{key}-{str(value)[:12]!r}", _manifest({key: value}), rng.choice(COMMANDS))
        for key in KEYS
        for value in rng.sample(VALUES, 3)
    ]


def _manifest(value: dict[str, Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        (path / "dsc_manifest.json").write_text(json.dumps({"schema": 1, **value}))

    return apply
