"""Malformed files of our own forms, from a seeded list: manifests, layers, saved statistics, recorded teachers.

They have schema 1, whose files had no checksum: what is read is what an attacker wrote.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from checkpoints import EVALUATE, FAST, LOOK, SEED, VALUES, Case

GENERATE = "generate {} --prompt hello --max-tokens 2"
EXPORT = "export {} -o out --target bf16"
COMMANDS = (LOOK, EVALUATE, FAST, GENERATE, EXPORT)
STATISTICS = "quantize {} -o out -r w4a16 --group-size 32 --statistics given"
WORDS = "distill {} -o out --cache given --steps 1"
KEYS = (
    "activations", "kv_cache", "source", "pipeline", "calibration", "statistics", "files", "lineage", "knobs",
    "versions", "recipe", "seed", "stage", "schema",
)  # fmt: skip
ACTIVATIONS = {"num_bits": 8, "granularity": "token", "symmetric": False}
KV_CACHE = {"num_bits": 8, "symmetric": False}
STEP = {"stage": "compress", "source": "a", "knobs": {"sparsity": None}}


def cases() -> list[Case]:
    """The same list every time."""
    rng = random.Random(SEED)
    return [*_manifests(rng), *_layers(), *_statistics(rng), *_words(rng)]


def _writing(name: str, value: Any, folder: str = "") -> Callable[[Path], None]:
    """Write JSON, or a text as it is, to a file of the model, or of a `folder` beside it."""

    def apply(path: Path) -> None:
        target = path.parent / folder if folder else path
        target.mkdir(exist_ok=True)
        (target / name).write_text(value if isinstance(value, str) else json.dumps(value))

    return apply


def _manifests(rng: random.Random) -> Iterator[Case]:
    def manifest(value: dict[str, Any]) -> Callable[[Path], None]:
        return _writing("dsc_manifest.json", {"schema": 1, **value})

    for key in KEYS:
        for value in rng.sample(VALUES, 3):
            yield Case(f"manifest-{key}-{str(value)[:12]!r}", manifest({key: value}), rng.choice(COMMANDS))
    for outer, base, keys in (
        ("activations", ACTIVATIONS, ("num_bits", "granularity", "symmetric", "inputs", "attention", "unknown")),
        ("kv_cache", KV_CACHE, ("num_bits", "symmetric", "delta", "group_size", "unknown")),
    ):
        for key in keys:
            for value in rng.sample(VALUES, 3):
                changed = manifest({outer: {**base, key: value}})
                yield Case(f"manifest-{outer}-{key}-{str(value)[:12]!r}", changed, rng.choice((EVALUATE, GENERATE)))
    for key in (*STEP, "sparsity", "name"):
        for value in rng.sample(VALUES, 2):
            step = {**STEP, "knobs": {key: value}} if key == "sparsity" else {**STEP, key: value}
            yield Case(f"lineage-{key}-{str(value)[:12]!r}", manifest({"lineage": [step]}), rng.choice(COMMANDS))
    facts = ({}, {"bytes": -1, "blake3": ""}, {"bytes": 1 << 70, "blake3": "x"}, {"bytes": 1.0, "blake3": None}, [])
    for i, fact in enumerate(facts):
        for name in ("config.json", "../../x", "/etc/passwd", "a\x1b[2Jb", "LICENSE/x"):
            yield Case(f"files-{name!r}-{i}", manifest({"files": {name: fact}}), COMMANDS[i], "manifest|config|bytes")
    for i, text in enumerate(("", "[", "[]", "\x00", '{"schema": 2}', '{"schema": 1, "a": "\\ud800"}', "{" * 100_000)):
        yield Case(f"manifest-text-{i}", _writing("dsc_manifest.json", text), COMMANDS[i % 5], "dsc_manifest.json")


def _layers() -> Iterator[Case]:
    experts = (3, {}, {"tokens": [-1]}, {"tokens": ["x"], "starved": 3}, {"tokens": [1], "block": "\x1b"})
    rows = ("x", [], [3], [{}], *([{"experts": value}] for value in experts))
    for i, row in enumerate(rows):
        yield Case(f"layers-{i}", _writing("dsc_layers.json", {"schema": 1, "blocks": row}), EVALUATE)


def _statistics(rng: random.Random) -> Iterator[Case]:
    whole = {"stage": "calibrate", "statistics": {"fields": ["hessian"], "files": {}, "tokenizer": "x"}}
    for key in ("fields", "files", "tokenizer"):
        for value in rng.sample(VALUES, 4):
            changed = {"schema": 1, **whole, "statistics": {**whole["statistics"], key: value}}
            yield Case(
                f"statistics-{key}-{str(value)[:12]!r}", _writing("dsc_manifest.json", changed, "given"), STATISTICS
            )
    for i, value in enumerate(({}, [], "x", None, {"files": {}})):
        changed = {"schema": 1, "stage": "calibrate", "statistics": value}
        yield Case(f"statistics-{i}", _writing("dsc_manifest.json", changed, "given"), STATISTICS)
    for name in ("../model/model.safetensors", "/etc/passwd", "nothing.safetensors", "\x1b[2J"):
        files = {"fields": [], "files": {name: "0" * 64}, "tokenizer": "x"}
        changed = {"schema": 1, "stage": "calibrate", "statistics": files}
        yield Case(f"statistics-file-{name!r}", _writing("dsc_manifest.json", changed, "given"), STATISTICS)


def _words(rng: random.Random) -> Iterator[Case]:
    whole = {
        "schema": 1, "form": "exact", "vocabulary": 512, "temperature": 1.0, "tokenizer": "x", "documents": 1,
        "tokens": 10, "bytes_a_token": 4.0, "shards": [],
    }  # fmt: skip
    for key in whole:
        for value in rng.sample(VALUES, 2):
            yield Case(
                f"words-{key}-{str(value)[:12]!r}", _writing("teacher.json", {**whole, key: value}, "given"), WORDS
            )
    for i, shard in enumerate(
        (3, {}, {"file": "../x", "bytes": 1, "blake3": ""}, {"file": "teacher-00001.safetensors"})
    ):
        yield Case(f"words-shard-{i}", _writing("teacher.json", {**whole, "shards": [shard]}, "given"), WORDS)
    yield Case("recording", _writing("recording.json", "[]", "given"), WORDS)
