"""Every stage on a second device that computes as the CPU does and refuses to mix with it: the same bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.compress import accumulate as collecting
from deepseek_compress.compress import convert
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture
from deepseek_compress.registry import build
from deepseek_compress.stages import load
from deepseek_compress.stages.base import Context
from deepseek_compress.streaming import batches, experts_here
from tests.strict_device import strict_device

FAMILIES = ["tiny_v3", "tiny_v2", "tiny_v32", "tiny_v4", "tiny_qwen2", "tiny_llama"]
GPTQ = {"weights": {"gptq": {"group_size": 32}}}
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "gptq": {**GPTQ, "migration": "smoothquant", "min_tokens": 8},
    "gptaq": {"weights": {"gptaq": {"group_size": 32}}, "activations": "dynamic", "min_tokens": 8},
    "sparse": {**GPTQ, "sparsity": "sparsegpt", "min_tokens": 8},
}
MORE: dict[str, dict[str, Any]] = {
    "static": {"weights": {"rtn": {"num_bits": 8, "symmetric": True}}, "activations": "static"},
    "rotation": {**GPTQ, "rotation": "hadamard"},
    "awq": {"weights": {"awq": {"group_size": 32}}, "migration": "awq"},
    "hqq": {"weights": {"hqq": {"group_size": 32}}},
    "learned": {"weights": {"learned": {"group_size": 32}}},
    "quantease": {"weights": {"quantease": {"group_size": 32}}},
    "attention": {**GPTQ, "activations": {"dynamic": {"attention": True}}},
}


@pytest.fixture
def counts() -> Iterator[Counter[str]]:
    with strict_device() as found:
        yield found


def context(out: Path, text: Path, device: str, samples: int = 6, **outputs: Path) -> Context:
    calibration = {"sources": [str(text)], "samples": samples, "length": 48}
    out.mkdir(parents=True, exist_ok=True)
    tell = {"tell": lambda line: None}
    return Context("out", out, "", 0, calibration, device=device, outputs=outputs, **tell)  # type: ignore[arg-type]


def contents(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def both(kind: str, knobs: dict[str, Any], source: Path, text: Path, out: Path, but: str = "", **outputs: Path) -> None:
    """Run a stage on each device; every byte of what they write is the same, `but` that of one file."""
    stage = build(load(kind), knobs, kind)
    stage.run(open_checkpoint(source), context(out / "cpu", text, "cpu", **outputs))
    with strict_device() as counts:
        stage.run(open_checkpoint(source), context(out / "strict", text, "strict", **outputs))
    assert counts["copies"], "nothing was computed there"
    strict, cpu = contents(out / "strict"), contents(out / "cpu")
    assert strict.keys() == cpu.keys()
    assert {name: body for name, body in strict.items() if name != but} == {n: b for n, b in cpu.items() if n != but}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", COMPRESSIONS)
def test_compress(how: str, name: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    both("compress", COMPRESSIONS[how], request.getfixturevalue(name), text, tmp_path)


@pytest.mark.parametrize("how", MORE)
def test_other_parts(how: str, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    both("compress", MORE[how], tiny_llama, text, tmp_path)


def test_text_chosen_by_the_model(tiny_v2: Path, text: Path, tmp_path: Path) -> None:
    stage = build(load("compress"), GPTQ, "compress")
    for device in ("cpu", "strict"):
        asked = context(tmp_path / device, text, device)
        asked.calibration["select"] = {"from": 12}  # type: ignore[index]
        with strict_device():
            stage.run(open_checkpoint(tiny_v2), asked)
    assert contents(tmp_path / "strict") == contents(tmp_path / "cpu")


@pytest.mark.parametrize("name", ["tiny_v3", "tiny_llama"])
def test_calibrate(name: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    both("calibrate", {}, request.getfixturevalue(name), text, tmp_path)


@pytest.mark.parametrize("method", ["kl", "fisher"])
def test_allocate(method: str, tiny_qwen2: Path, text: Path, tmp_path: Path) -> None:
    options = [{"num_bits": 3}, {"num_bits": 4}]
    knobs = {"target": "3.9 bits per weight", "method": method, "windows": 2, "options": options}
    found = []
    for device in ("cpu", "strict"):
        with strict_device():
            stage = build(load("allocate"), {**knobs, "weights": "gptq"}, "allocate")
            stage.run(open_checkpoint(tiny_qwen2), context(tmp_path / device, text, device))
        found.append(json.loads((tmp_path / device / "sensitivity.json").read_text()))
        assert (tmp_path / device / "recipe.yaml").read_text().splitlines()[1:]
    for mine, theirs in zip(*(its["units"] for its in found), strict=True):
        assert mine["chosen"] == theirs["chosen"]
        for one, other in zip(mine["options"], theirs["options"], strict=True):
            assert one["kl"] == pytest.approx(other["kl"], rel=1e-4, abs=1e-9)  # gradients add up in another order


@pytest.mark.parametrize("knobs", [{"passes": 1}, {"passes": 0, "by_block": {}}], ids=["whole", "by block"])
def test_recover(knobs: dict[str, Any], tiny_v2: Path, text: Path, tmp_path: Path) -> None:
    packed = build(load("compress"), {"weights": {"rtn": {"group_size": 32}}}, "compress").run(
        open_checkpoint(tiny_v2), context(tmp_path / "packed", text, "cpu")
    )
    both("recover", knobs, packed.path, text, tmp_path, model=tiny_v2)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", ["tiny_v3", "tiny_qwen2"])
def test_evaluate(name: str, streamed: bool, text: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path, found = request.getfixturevalue(name), []
    knobs = {"text": text, "windows": 3, "length": 32, "models": ["a", "b"], "reference": "a", "problems": 3}
    stage = build(load("evaluate"), {**knobs, "streamed": streamed, "efficiency": False}, "evaluate")
    for device in ("cpu", "strict"):
        with strict_device():
            out = stage.run(open_checkpoint(path), context(tmp_path / device, text, device, a=path, b=path)).path
        found.append(json.loads(out.read_text())["models"])
    assert found[0] == found[1]


def test_a_resumed_run_stays_on_its_device(tiny_v2: Path, text: Path, tmp_path: Path) -> None:
    stage = build(load("compress"), COMPRESSIONS["gptq"], "compress")
    stage.run(open_checkpoint(tiny_v2), context(tmp_path / "whole", text, "cpu"))

    def stop(done: int, total: int, note: str) -> None:
        if note == "block 2":
            raise KeyboardInterrupt

    with strict_device():
        cut = context(tmp_path / "cut", text, "strict")
        with pytest.raises(KeyboardInterrupt):
            stage.run(open_checkpoint(tiny_v2), Context(**{**vars(cut), "progress": stop}))
        with pytest.raises(DscError, match="other device"):
            stage.run(open_checkpoint(tiny_v2), context(tmp_path / "cut", text, "cpu"))
        stage.run(open_checkpoint(tiny_v2), cut)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


MOST_WAITS = {"gptq": 6, "gptaq": 16}  # of a linear: is what was read finite, is there a factor, what did it cost
MOST_COPIES = 12  # of a linear: its stored parts there, the new ones back


@pytest.mark.parametrize(("name", "how"), [("tiny_v3", "gptq"), ("tiny_llama", "gptaq")])
def test_waits_and_copies_do_not_grow_with_the_text(
    name: str,
    how: str,
    text: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a block, for a text of two batches and for one of six."""
    source = open_checkpoint(request.getfixturevalue(name))
    monkeypatch.setattr(batches, "BATCH_TOKENS", 96)
    for module in (collecting, experts_here):
        monkeypatch.setattr(module, "ROWS", 64)
    stage = build(load("compress"), {**COMPRESSIONS[how], "min_tokens": 0}, "compress")
    found: dict[int, list[dict[str, int]]] = {}
    run_block = convert.run_block
    with strict_device() as counts:

        def counted(*arguments: Any) -> Any:
            before = dict(counts)
            facts = run_block(*arguments)
            found[samples].append({name: counts[name] - before.get(name, 0) for name in ("waits", "copies")})
            return facts

        monkeypatch.setattr(convert, "run_block", counted)
        for samples in (4, 12):
            found[samples] = []
            stage.run(source, context(tmp_path / str(samples), text, "strict", samples))
    for more, fewer in zip(found[12], found[4], strict=True):  # tables of angles and the like are copied once
        assert more["waits"] <= fewer["waits"]
        assert more["copies"] <= fewer["copies"]
    for block, its in zip(Architecture.of(source).blocks, found[12], strict=True):
        assert its["waits"] <= MOST_WAITS[how] * len(block.linears)
        assert its["copies"] <= MOST_COPIES * len(block.linears)
