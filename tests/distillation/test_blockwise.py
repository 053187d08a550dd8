"""Recovery block by block against the same written plainly in memory, its promises, and the stage around it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_compress.checkpoint import Checkpoint, open_checkpoint
from deepseek_compress.distillation.blockwise import Found, Models, Schedule, recover_blocks
from deepseek_compress.errors import DscError
from deepseek_compress.models import Role
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.weights import ResidentWeights
from deepseek_compress.numerics import pattern
from deepseek_compress.numerics.types import Quantized
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress
from deepseek_compress.stages.recover import Recover
from deepseek_compress.streaming.loop import silent
from deepseek_compress.tasks import mixture

TOKENS = torch.randint(2, 500, (6, 32), generator=torch.Generator().manual_seed(9))
PASSES, RATE, WEIGHT_RATE, SEED = 2, 5e-3, 0.05, 1
SCHEDULE = Schedule(PASSES, RATE, WEIGHT_RATE, None)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_compress.streaming.batches.BATCH_TOKENS", 64)


def context(out: Path, original: Path, text: Path | None = None) -> Context:
    calibration = {"sources": [str(text)], "samples": 4, "length": 48}
    return Context(out.name, out, "stages: []\n", 0, calibration, outputs={"model": original})


def pack(path: Path, out: Path, **more: object) -> Checkpoint:
    """A model with every linear of its blocks at 3 bits."""
    stage = build(Compress, {"weights": {"rtn": {"num_bits": 3, "group_size": 32}}, **more}, "compress")
    return open_checkpoint(stage.run(open_checkpoint(path), context(out, path)).path)


def prune(path: Path, out: Path) -> Checkpoint:
    """A model with two of every four weights of its linears zero, in 16 bits."""
    stage = build(Compress, {"sparsity": "magnitude"}, "compress")
    return open_checkpoint(stage.run(open_checkpoint(path), context(out, path)).path)


def recover(models: Models) -> dict[str, Quantized | Tensor]:
    recover_blocks(models, TOKENS, SCHEDULE, seed=SEED, progress=silent)
    found = Found(models)
    return {name: found[name] for name in found}


def stored(start: Tensor, change: Tensor) -> Tensor:
    """What is stored of `start`, with the gradient of what it was before its rounding."""
    exact = start * (1 + change)
    return exact + (exact.bfloat16().float() - exact).detach()


def plainly(packed: Checkpoint, original: Checkpoint) -> dict[str, Tensor]:
    """What `recover_blocks` finds, in memory and with nothing but autograd: scales and norms by name."""
    student, teacher = Model.load(packed), Model.load(original)
    family, cfg, found = student.family, student.cfg, {}
    theirs = teacher.hidden_states(TOKENS)
    ours = theirs[0]
    places = torch.arange(TOKENS.shape[1]).expand(len(TOKENS), -1)
    for layer in range(cfg.num_hidden_layers):
        names = [f"{family.prefix(layer)}.{name}" for name in family.block_tensors(cfg, layer)]
        codes = {name: q for name in names if (q := packed.read_quantized(name)) is not None}
        starts = {name: student.weights[name] for name in names if family.role(name) is Role.NORM}
        starts |= {name: q.scale for name, q in codes.items()}
        free = {
            name: student.weights[name] for name in names if "_proj" in name and "weight" in name and name not in codes
        }
        free = {name: weight for name, weight in free.items() if pattern.holds(weight)}
        changes = {name: torch.zeros_like(start).requires_grad_() for name, start in (starts | free).items()}
        sizes = {name: float(weight[weight != 0].square().mean().sqrt()) for name, weight in free.items()}
        rates = [WEIGHT_RATE * sizes[name] if name in sizes else RATE for name in changes]
        groups = [{"params": [change], "lr": most} for change, most in zip(changes.values(), rates, strict=True)]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        order = torch.Generator().manual_seed(SEED * 10_007 + layer)
        steps = [i for _ in range(PASSES) for i in torch.randperm(3, generator=order).tolist()]
        for step, batch in enumerate([*steps, None]):
            rows = slice(None) if batch is None else slice(2 * batch, 2 * batch + 2)
            now = {name: stored(start, changes[name]) for name, start in starts.items()}
            now |= {name: weight + changes[name] * (weight != 0) for name, weight in free.items()}
            if batch is None:
                now |= {name: now[name].bfloat16().float() for name in free}
            weights = {**student.weights, **now}
            for name, q in codes.items():
                zero_point, scale = (its.repeat_interleave(q.group_size, 1) for its in (q.zero_point, now[name]))
                weights[name] = (q.codes.float() - zero_point.float()) * scale
            local = ResidentWeights(weights, family.prefix(layer) + ".")
            out = family.run_block(cfg, layer, local, ours[rows], places[rows], tokens=TOKENS[rows])
            if batch is None:
                ours = out.detach()
                found |= {name: values.detach() for name, values in now.items()}
                break
            adam.zero_grad()
            target = theirs[layer + 1][rows]
            error = (out - target).square().sum(-1) / target.square().mean(-1)
            error.sum().mul(0.5).backward()  # type: ignore[no-untyped-call]
            for group, most in zip(adam.param_groups, rates, strict=True):
                group["lr"] = most * (1 - step / len(steps))  # six steps: one of warming up
            adam.step()
    return found


@pytest.mark.parametrize("name", ["tiny_qwen2", "tiny_v3"])
def test_it_finds_what_plain_autograd_finds(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    original = open_checkpoint(request.getfixturevalue(name))
    packed = pack(original.path, tmp_path / "packed")
    found, wanted = recover(Models(packed, original, tmp_path / "work")), plainly(packed, original)
    assert found.keys() == wanted.keys()
    moved = 0.0
    for key, part in found.items():
        values = part.scale if isinstance(part, Quantized) else part.float()
        assert torch.allclose(values, wanted[key], rtol=0.01), key  # a step of BF16 and a half
        before = packed.read_quantized(key)
        if isinstance(part, Quantized):
            assert before is not None
            assert torch.equal(part.codes, before.codes)
            assert torch.equal(part.zero_point, before.zero_point)
            moved = max(moved, float((values / before.scale - 1).abs().max()))
    assert moved > 0.01


@pytest.mark.parametrize("name", ["tiny_qwen2", "tiny_v3"])
def test_sparse_weights_move_and_their_zeros_stay(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    original = open_checkpoint(request.getfixturevalue(name))
    sparse = prune(original.path, tmp_path / "sparse")
    found, wanted = recover(Models(sparse, original, tmp_path / "work")), plainly(sparse, original)
    assert found.keys() == wanted.keys()
    moved = 0.0
    for key, part in found.items():
        assert isinstance(part, Tensor)
        before = sparse.read(key)
        if "_proj" in key:
            assert torch.equal(part == 0, before == 0), key
            moved = max(moved, float((part.float() - before).abs().max() / before.square().mean().sqrt()))
        after = part.float()  # Adam makes much of the last bit of a small gradient
        assert (after - wanted[key]).norm() <= 0.1 * (after - before).norm() + 0.004 * before.norm(), key
    assert moved > 0.05


def test_blocks_come_closer_and_a_stop_changes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    original, packed = open_checkpoint(tiny_llama), pack(tiny_llama, tmp_path / "packed")

    def run(work: Path, stop: int | None = None) -> tuple[list[dict[str, float]], dict[str, bytes]]:
        def progress(done: int, total: int, note: str) -> None:
            if done == stop:
                raise KeyboardInterrupt

        models = Models(packed, original, work)
        facts = recover_blocks(models, TOKENS, Schedule(6, 0.02, RATE, None), seed=SEED, progress=progress)
        return facts, {file.name: file.read_bytes() for file in sorted(work.glob("block-*"))}

    facts, whole = run(tmp_path / "whole")
    assert len(facts) == 2
    assert all(block["after"] < 0.9 * block["before"] for block in facts)
    for stop in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", stop)
    assert run(tmp_path / "stopped") == (facts, whole)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    problems = mixture(seed=3, count=60, split="calibration")
    file.write_text("".join(json.dumps({"text": f"{p.prompt} {p.solution}"}) + "\n" for p in problems))
    return file


@pytest.mark.parametrize("passes", [0, 2])
def test_stage(passes: int, text: Path, tiny_llama: Path, tmp_path: Path) -> None:
    packed = pack(tiny_llama, tmp_path / "packed")
    knobs = {"by_block": {"passes": 3, "learning_rate": 0.01}, "passes": passes, "learning_rate": 0.01}
    stage = build(Recover, knobs, "recover")
    assert stage.problems(packed.header) == []
    facts = stage.run(packed, context(tmp_path / "out", tiny_llama, text)).facts
    assert [sorted(block) for block in facts["blocks"]] == [["after", "before"]] * 2
    assert ("last_kl" in facts) == bool(passes)
    new = open_checkpoint(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".dsc_*"))
    tokens = TOKENS[:, :24]
    with torch.no_grad():
        wanted, before, after = (torch.log_softmax(Model.load(it)(tokens), -1) for it in (tiny_llama, packed, new))
    assert float((wanted - after).square().mean()) < float((wanted - before).square().mean())

    def stop(done: int, total: int, note: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.run(packed, replace(context(tmp_path / "again", tiny_llama, text), progress=stop))
    other = stage.model_copy(update={"batch_size": 2})
    with pytest.raises(DscError, match="other knobs"):
        other.run(packed, context(tmp_path / "again", tiny_llama, text))
    again = stage.run(packed, context(tmp_path / "again", tiny_llama, text)).path
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in new.path.glob("*.safetensors"))


def test_stage_on_a_sparse_checkpoint(text: Path, tiny_llama: Path, tmp_path: Path) -> None:
    sparse = prune(tiny_llama, tmp_path / "sparse")
    knobs = {"by_block": {"passes": 3, "batch_tokens": 48}, "passes": 0}
    stage = build(Recover, knobs, "recover")
    assert stage.problems(sparse.header) == []
    assert "no packed weights" in str(build(Recover, {"by_block": {}}, "recover").problems(sparse.header)[0])
    facts = stage.run(sparse, context(tmp_path / "out", tiny_llama, text)).facts
    assert all(block["after"] < block["before"] for block in facts["blocks"])
    new = open_checkpoint(tmp_path / "out")
    linears = [name for name in new.header.tensors if name.endswith("_proj.weight")]
    assert all(torch.equal(new.read(name) == 0, sparse.read(name) == 0) for name in linears)
    assert not all(torch.equal(new.read(name), sparse.read(name)) for name in linears)
    with pytest.raises(DscError, match="neither packed nor 2:4"):
        stage.run(open_checkpoint(tiny_llama), context(tmp_path / "dense", tiny_llama, text))


def test_what_cannot_be_done_is_told(text: Path, tiny_llama: Path, tmp_path: Path) -> None:
    packed = pack(tiny_llama, tmp_path / "packed", rotation="hadamard")
    assert "nothing to do" in str(build(Recover, {"passes": 0}, "recover").problems(packed.header)[0])
    with pytest.raises(DscError, match="embeds text otherwise"):
        build(Recover, {"by_block": {}}, "recover").run(packed, context(tmp_path / "out", tiny_llama, text))


def test_one_block_is_planned_where_the_model_does_not_fit(tiny_v3: Path, tmp_path: Path) -> None:
    header = pack(tiny_v3, tmp_path / "packed").header
    alone, both = (
        build(Recover, {"by_block": {}, "passes": passes}, "recover").forecast(header, 4, 512) for passes in (0, 1)
    )
    assert alone.memory is not None
    assert both.work is not None
    assert alone.work is not None
    assert both.work.products > alone.work.products > 0
