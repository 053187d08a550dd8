"""The block loop: what it solves with is what the finished model sees; killed and resumed it writes the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_compress.blocks import Job, claim, clean, run_blocks
from deepseek_compress.blocks import spool as spool_module
from deepseek_compress.blocks.change import LinearChange
from deepseek_compress.blocks.job import Solved
from deepseek_compress.blocks.selection import CHANGEABLE, select
from deepseek_compress.blocks.spool import Spool
from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.models import Linear, Role, family_of
from deepseek_compress.models.activations import InputScheme
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.weights import ObservingWeights
from deepseek_compress.numerics import WEIGHTS, Statistics
from deepseek_compress.numerics.activations import Dynamic
from deepseek_compress.workers import one_thread, open_pool

FAMILIES = ["tiny_v3", "tiny_v2", "tiny_qwen2", "tiny_llama"]
ROLES = frozenset(CHANGEABLE)
TOKENS = torch.randint(2, 512, (40, 64), generator=torch.Generator().manual_seed(5))  # 2560: more than one batch

FEW = TOKENS[:6]


class Recording:
    """A change that rounds to BF16 after adding a little, and remembers the statistics it was given."""

    needs = frozenset({"hessian", "input_absmax", "input_absmean"})

    def __init__(self, min_tokens: int = 0) -> None:
        self.min_tokens = min_tokens
        self.seen: dict[str, Statistics] = {}

    def wants(self, layer: int, linear: Linear) -> bool:
        return linear.role in ROLES and not linear.name.endswith("kv_b_proj")

    def solve(self, layer: int, group: Sequence[tuple[Linear, Tensor]], statistics: Statistics) -> list[Solved]:
        for linear, _ in group:
            self.seen[linear.name] = statistics
        return [Solved((weight * 1.03).bfloat16(), {"weights": weight.numel()}) for _, weight in group]


def job_of(path: Path, out: Path, change: Any, **more: Any) -> Job:
    source = open_checkpoint(path)
    family = family_of(source.config)
    return Job(source, family, family.parse(source.config), change, out / ".dsc_blocks", **more)


def compress(path: Path, out: Path, change: Any, tokens: Tensor | None = TOKENS, **more: Any) -> list[dict[str, Any]]:
    job = job_of(path, out, change, **more)
    with CheckpointWriter(out, open_checkpoint(path), resume=True) as writer, open_pool(job) as pool:
        facts = run_blocks(job, writer, pool, tokens).blocks
        writer.finish({}, {}, [])
    clean(job)
    return facts


def gptq(path: Path, group_size: int = 32) -> LinearChange:
    config = open_checkpoint(path).config
    family = family_of(config)
    weights = WEIGHTS["gptq"].model_validate({"group_size": group_size, "mse": False})
    return LinearChange(family, select(family, family.parse(config), ROLES, weights), None, weights, min_tokens=64)


def contents(out: Path) -> dict[str, bytes]:
    files = [file for file in sorted(out.rglob("*")) if file.is_file() and ".dsc_blocks" not in file.parts]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


@pytest.mark.parametrize("scheme", [None, InputScheme(Dynamic())], ids=["plain", "rounded"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_statistics_are_those_of_the_finished_model(
    name: str, scheme: InputScheme | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """True-sequential: every Hessian is that of the inputs in the model that comes out."""
    change = _ByBlock()
    compress(request.getfixturevalue(name), tmp_path / "out", change, scheme=scheme)
    loaded = Model.load(tmp_path / "out")
    model = Model(loaded.family, loaded.cfg, loaded.weights, scheme)
    inputs: dict[str, list[Tensor]] = {}

    def watch(layer: int) -> None:
        def observe(linear: str, x: Tensor) -> None:
            inputs.setdefault(f"{layer}.{linear}", []).append(x.reshape(-1, x.shape[-1]))

        block = model.blocks[layer]
        if scheme is None:
            model.blocks[layer] = ObservingWeights(block, observe)
        else:
            block.inner = ObservingWeights(block.inner, observe)  # type: ignore[attr-defined]

    for layer in range(model.cfg.num_hidden_layers):
        watch(layer)
    model.forward(TOKENS)
    assert change.seen
    for key, statistics in change.seen.items():
        if statistics.tokens == 0:
            assert key not in inputs
            continue
        x = torch.cat(inputs[key])
        assert statistics.tokens == len(x)
        assert statistics.hessian is not None
        torch.testing.assert_close(
            statistics.hessian, x.T @ x, rtol=1e-3, atol=1e-3 * float(x.square().sum()) / x.shape[1]
        )
        torch.testing.assert_close(statistics.input_absmax, x.abs().amax(0), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(statistics.input_absmean, x.abs().mean(0), rtol=1e-3, atol=1e-4)


class _ByBlock(Recording):
    """Keys with the block's number: `wants` is called with it before `solve`."""

    def wants(self, layer: int, linear: Linear) -> bool:
        self.layer = layer
        return super().wants(layer, linear)

    def solve(self, layer: int, group: Sequence[tuple[Linear, Tensor]], statistics: Statistics) -> list[Solved]:
        for linear, _ in group:
            self.seen[f"{self.layer}.{linear.name}"] = statistics
        return [Solved((weight * 1.03).bfloat16(), {"weights": weight.numel()}) for _, weight in group]


def test_experts_that_few_tokens_reach(tiny_v3: Path, tmp_path: Path) -> None:
    few = TOKENS[:2, :20]
    change = Recording(min_tokens=12)
    facts = compress(tiny_v3, tmp_path / "out", change, tokens=few)
    table = facts[-1]["experts"]
    assert sum(table["tokens"]) == few.numel() * 2
    assert table["starved"] == [expert for expert, count in enumerate(table["tokens"]) if count < 12]
    assert 0 < len(table["starved"]) < 8
    for expert, count in enumerate(table["tokens"]):
        statistics = change.seen[f"mlp.experts.{expert}.up_proj"]
        assert statistics.tokens == count
        assert (statistics.hessian is None) == (count < 12)


def test_shared_inputs_are_solved_together(tiny_v3: Path, tmp_path: Path) -> None:
    change = Recording()
    compress(tiny_v3, tmp_path / "out", change)
    seen = change.seen
    assert seen["self_attn.q_a_proj"] is seen["self_attn.kv_a_proj_with_mqa"]
    assert seen["mlp.experts.5.gate_proj"] is seen["mlp.experts.5.up_proj"]
    assert seen["mlp.experts.5.gate_proj"] is not seen["mlp.experts.4.gate_proj"]


def test_without_calibration_no_block_runs(tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a block ran")

    monkeypatch.setattr("deepseek_compress.models.deepseek_v3.DeepseekV3.attention", never)
    config = open_checkpoint(tiny_v3).config
    family = family_of(config)
    weights = WEIGHTS["rtn"](group_size=32)
    chosen = select(family, family.parse(config), ROLES, weights)
    compress(tiny_v3, tmp_path / "out", LinearChange(family, chosen, None, weights, 64), tokens=None)
    done = open_checkpoint(tmp_path / "out")
    for layer in range(3):
        for linear in family.linears(family.parse(config), layer):
            name = f"model.layers.{layer}.{linear.name}.weight"
            expected = weights(open_checkpoint(tiny_v3).read(name), Statistics())
            found = done.read_quantized(name)
            assert found is not None
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scale, expected.scale)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", [0, 7, 44])
def test_resumed_equals_uninterrupted(tiny_v3: Path, tmp_path: Path, at: int) -> None:
    """Stopped at the `at`-th solve, also several times: the same bytes in the end."""
    compress(tiny_v3, tmp_path / "whole", gptq(tiny_v3), tokens=FEW)
    calls = 0

    class Stopping(LinearChange):
        def solve(self, layer: int, group: Sequence[tuple[Linear, Tensor]], statistics: Statistics) -> list[Solved]:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise Interrupted
            return super().solve(layer, group, statistics)

    base = gptq(tiny_v3)
    change = Stopping(base.family, base.selection, None, base.weights, base.min_tokens)
    out = tmp_path / "resumed"
    with pytest.raises(Interrupted):
        compress(tiny_v3, out, change, tokens=FEW)
    with pytest.raises(DscError):
        open_checkpoint(out)
    compress(tiny_v3, out, change, tokens=FEW)
    total = calls
    assert contents(out) == contents(tmp_path / "whole")
    groups = 45  # solves of an uninterrupted run: 4 + 2 in the dense block, 2 x (4 + 2 + 16) in the others
    assert total <= 2 * groups + 1
    if at == 44:
        assert total < groups + 30  # finished blocks are not solved again


class Counting:
    """Counts what this process's Python does in the package: calls and returns; at `last` it kills the process."""

    def __init__(self, last: int = -1) -> None:
        self.events, self.last = 0, last

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if frame.f_globals["__name__"].startswith("deepseek_compress"):
            self.events += 1
            if self.events == self.last:
                os.kill(os.getpid(), signal.SIGKILL)

    def compress(self, path: Path, out: Path, change: LinearChange) -> None:
        torch.set_num_threads(1)  # a forked process has none of its parent's threads
        sys.setprofile(self)
        try:
            compress(path, out, change, tokens=FEW)
        finally:
            sys.setprofile(None)


def test_killed_at_any_moment(tiny_v3: Path, tmp_path: Path) -> None:
    """SIGKILL three times in one run, at shares of all that a whole run does; then the same bytes."""
    out, change, whole = tmp_path / "killed", gptq(tiny_v3), Counting()
    with one_thread():
        whole.compress(tiny_v3, tmp_path / "whole", change)
    for share in (0.3, 0.4, 0.2):
        counting = Counting(int(share * whole.events))
        child = multiprocessing.get_context("fork").Process(target=counting.compress, args=(tiny_v3, out, change))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not (out / "config.json").exists()  # nothing that loads
    compress(tiny_v3, out, change, tokens=FEW)
    assert contents(out) == contents(tmp_path / "whole")


def test_resume_is_refused_for_something_else(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out" / ".dsc_blocks"
    claim(out, work, {"knobs": {"a": 1}, "model": "x"})
    claim(out, work, {"knobs": {"a": 1}, "model": "x"})
    with pytest.raises(DscError, match="other knobs, model"):
        claim(out, work, {"knobs": {"a": 2}, "model": "y"})


def test_one_thread_or_two_give_the_same_bytes(tiny_qwen2: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            compress(tiny_qwen2, tmp_path / str(count), gptq(tiny_qwen2))
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("held", [0, 1 << 20])
def test_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(spool_module, "HELD", held)
    rows = torch.randn(10, 3, 2, generator=torch.Generator().manual_seed(0))
    with Spool(tmp_path / "a.tmp", 10, (3, 2)) as spool:
        assert not spool.read(0, 10).any()
        spool.write(0, rows[:6])
        spool.write(6, rows[6:])
        assert torch.equal(spool.read(2, 5), rows[2:7])
        assert torch.equal(spool.gather([9, 0, 4]), rows[[9, 0, 4]])
        spool.add([1, 8], torch.ones(2, 3, 2))
        rows[[1, 8]] += 1
        spool.rename(tmp_path / "a.f32")
    with Spool(tmp_path / "a.f32", 10, (3, 2), existing=True) as spool:
        assert torch.equal(spool.read(0, 10), rows)
    with pytest.raises(DscError, match="expected"):
        Spool(tmp_path / "a.f32", 11, (3, 2), existing=True)


def test_in_memory_or_on_disk_the_same_bytes(tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress(tiny_v3, tmp_path / "held", gptq(tiny_v3), tokens=FEW)
    monkeypatch.setattr(spool_module, "HELD", 0)
    compress(tiny_v3, tmp_path / "disk", gptq(tiny_v3), tokens=FEW)
    assert contents(tmp_path / "held") == contents(tmp_path / "disk")


def test_facts_are_plain_json(tiny_qwen2: Path, tmp_path: Path) -> None:
    facts = compress(tiny_qwen2, tmp_path / "out", gptq(tiny_qwen2))
    assert json.loads(json.dumps(facts)) == facts
    first = facts[0]["linears"][0]
    assert first["name"] == "model.layers.0.self_attn.q_proj"
    assert first["role"] == str(Role.ATTENTION)
    assert 0 < first["output_error"] < first["weight_error"] < 0.1
