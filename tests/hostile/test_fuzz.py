"""Hypothesis looks for input that a door lets through, or that breaks it: headers, configurations, recipes, JSON Lines.

Whatever comes in, a door gives a value that keeps its promises, or a `DscError`; no other exception, in any case.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek_compress import limits
from deepseek_compress.calibration.sources import read_samples
from deepseek_compress.checkpoint import Header
from deepseek_compress.checkpoint.files import kept, read_sealed, write_sealed
from deepseek_compress.checkpoint.header import DTYPES, read_shard_header
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture
from deepseek_compress.recipe.schema import Changes, parse_recipe
from deepseek_compress.resources import recipe_path, recipes
from tests.conftest import QWEN2_CONFIG, V3_CONFIG

EXAMPLES = 60
ODD = st.sampled_from(["", "\x00", "\x1b[2J", "\ud800", "\u202e", "../../x", "weight", "a" * 3000, "\n"])
NUMBERS = st.one_of(
    st.integers(-(1 << 70), 1 << 70), st.sampled_from([0, 1, -1, 1 << 31, 1 << 63, 10**300]), st.floats()
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), ODD)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8) | ODD, inner, max_size=4)),
    max_leaves=12,
)
SIZES = st.one_of(st.integers(0, 6), NUMBERS)
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "F7"]) | VALUES, "shape": st.lists(SIZES, max_size=4) | VALUES},
    optional={"data_offsets": st.lists(st.integers(0, 64) | NUMBERS, min_size=2, max_size=2) | VALUES, "x": VALUES},
)
HEADERS = st.dictionaries(st.text(max_size=6) | ODD, ENTRIES | VALUES, max_size=5)


def sound(file: Path) -> None:
    """A header is taken only where every tensor lies in the file, without holes, under a name that can be shown."""
    tensors, problems = read_shard_header(file)
    assert all(isinstance(problem, DscError) for problem in problems)
    if problems:
        return
    places = sorted(tensors.values(), key=lambda place: (place.offset, place.bytes))
    end = places[0].offset if places else file.stat().st_size
    for place in places:
        count = 1
        for size in place.shape:
            count *= size
        assert place.offset == end
        assert place.bytes == count * place.dtype.itemsize
        assert len(place.shape) <= limits.RANK
        end += place.bytes
    assert end == file.stat().st_size
    assert all(name.isprintable() for name in tensors)


def test_headers(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"

    @settings(max_examples=EXAMPLES)
    @given(HEADERS, st.binary(max_size=64), st.integers(-9, 9))
    @example({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8), 0)
    @example({"a": {"dtype": "F32", "shape": [0, 1 << 63], "data_offsets": [0, 0]}}, b"", 0)
    def check(header: dict[str, Any], data: bytes, off: int) -> None:
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", max(0, len(text) + off)) + text + data)
        sound(file)

    check()


def test_changed_bytes_of_a_shard(tmp_path: Path, tiny_qwen2: Path) -> None:
    whole = (tiny_qwen2 / "model.safetensors").read_bytes()
    head = 8 + struct.unpack("<Q", whole[:8])[0]
    file = tmp_path / "model.safetensors"

    @settings(max_examples=EXAMPLES)
    @given(st.dictionaries(st.integers(0, head - 1), st.integers(0, 255), max_size=6), st.integers(-64, 64))
    def check(changes: dict[int, int], size: int) -> None:
        content = bytearray(whole[: len(whole) + size] if size < 0 else whole + bytes(size))
        for place, value in changes.items():
            content[place] = value
        file.write_bytes(content)
        sound(file)

    check()


@pytest.mark.parametrize("base", [QWEN2_CONFIG, V3_CONFIG], ids=["qwen2", "v3"])
def test_configurations(base: dict[str, Any]) -> None:
    @settings(max_examples=EXAMPLES)
    @given(st.dictionaries(st.sampled_from([*base, "quantization_config", "rope_scaling"]), VALUES, max_size=4))
    def check(changes: dict[str, Any]) -> None:
        try:
            architecture = Architecture.of(Header(Path(), {**base, **changes}, {}))
            problems = list(architecture.problems())
        except DscError:
            return
        assert all(isinstance(problem, DscError) for problem in problems)

    check()


WORDS = [
    "stages", "compress", "weights", "rtn", "gptq", "num_bits", "group_size", "overrides", "modules", "keep", "from",
    "as", "seed", "model", "calibration", "sources", "path", "share", "samples", "export", "target", "onnx", "name",
    "sparsity", "pattern", "2:4", "distill", "evaluate", "inputs", "re:(a+)+", "builtin",
]  # fmt: skip
DOCUMENTS = st.recursive(
    LEAVES | st.sampled_from(WORDS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=5)
    ),
    max_leaves=20,
)


def recipe(text: str, changes: Changes) -> None:
    """Parse it, and show what comes of it."""
    try:
        found = parse_recipe(text, "r.yaml", changes)
    except DscError:
        return
    assert found.steps
    assert all(step.name and "/" not in step.name and ".." not in step.name for step in found.steps)


def test_recipes() -> None:
    @settings(max_examples=EXAMPLES)
    @given(DOCUMENTS, st.lists(st.text(max_size=12) | st.sampled_from(["seed=1", "a.b=[", "stages.0=x"]), max_size=2))
    def check(document: Any, given_settings: list[str]) -> None:
        recipe(json.dumps(document), Changes(given_settings))  # JSON is YAML

    check()


def test_changed_recipes() -> None:
    texts = [recipe_path(name).read_text(encoding="utf-8") for name in recipes()]

    @settings(max_examples=EXAMPLES)
    @given(st.sampled_from(texts), st.data())
    def check(text: str, data: st.DataObject) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, len(text)))
            length = data.draw(st.integers(0, 9))
            text = text[:place] + data.draw(st.text(max_size=5) | st.sampled_from(WORDS) | ODD) + text[place + length :]
        recipe(text, Changes())

    check()


def test_lines_of_text(tmp_path: Path) -> None:
    forms = st.dictionaries(
        st.sampled_from(["text", "messages", "prompt", "completion", "role", "content", "question", "answer"]), VALUES,
        max_size=3,
    )  # fmt: skip
    line = st.one_of(st.binary(max_size=40), (VALUES | forms).map(lambda value: json.dumps(value).encode()))
    file = tmp_path / "a.jsonl"

    @settings(max_examples=EXAMPLES)
    @given(st.lists(line, max_size=5), st.sampled_from(["a.jsonl", "a.txt", "a.jsonl.gz", "a.parquet"]))
    def check(lines: list[bytes], name: str) -> None:
        file.with_name(name).write_bytes(b"\n".join(lines))
        try:
            for sample in read_samples(file.with_name(name)):
                json.dumps([vars(sample) if hasattr(sample, "__dict__") else list(sample)], default=str)
        except DscError:
            return

    check()


def test_sealed_files(tmp_path: Path) -> None:
    """What is written is read; any other bytes are not."""
    file = tmp_path / "state.json"

    @settings(max_examples=EXAMPLES)
    @given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=6), st.integers(), max_size=4), st.data())
    def check(value: dict[str, Any], data: st.DataObject) -> None:
        value.pop("checksum", None)
        write_sealed(file, value)
        assert read_sealed(file) == value
        content = bytearray(file.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        file.write_bytes(content)
        assert kept(file) is None

    check()
