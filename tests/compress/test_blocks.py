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

from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
from deepseek_compress.compress.convert import clean, convert
from deepseek_compress.compress.job import Job, Solved
from deepseek_compress.compress.selection import CHANGEABLE, select
from deepseek_compress.compress.solver import LinearSolver
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture, Block, Linear, Role
from deepseek_compress.models.activations import InputScheme
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.weights import HookedWeights
from deepseek_compress.numerics import WEIGHTS, Statistics
from deepseek_compress.numerics.activations import Dynamic
from deepseek_compress.streaming import hidden_store
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

    def wants(self, block: Block, linear: Linear) -> bool:
        return linear.role in ROLES and not linear.name.endswith("kv_b_proj")

    def solve(self, block: Block, group: Sequence[tuple[Linear, Tensor]], statistics: Statistics) -> list[Solved]:
        for linear, _ in group:
            self.seen[linear.name] = statistics
        return [Solved((weight * 1.03).bfloat16(), {"weights": weight.numel()}) for _, weight in group]


def job_of(path: Path, out: Path, change: Any, **more: Any) -> Job:
    return Job(Architecture.of(open_checkpoint(path)), change, out / ".dsc_blocks", **more)


def compress(path: Path, out: Path, change: Any, tokens: Tensor | None = TOKENS, **more: Any) -> list[dict[str, Any]]:
    job = job_of(path, out, change, **more)
    with CheckpointWriter(out, open_checkpoint(path), resume=True) as writer, open_pool(job) as pool:
        facts = convert(job, writer, pool, tokens).blocks
        writer.finish({}, {}, [])
    clean(job)
    return facts


def gptq(path: Path, group_size: int = 32) -> LinearSolver:
    weights = WEIGHTS["gptq"].model_validate({"group_size": group_size, "mse": False})
    chosen = select(Architecture.of(open_checkpoint(path)), ROLES, weights)
    return LinearSolver(chosen, None, weights, min_tokens=64)


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
        def hook(linear: str, x: Tensor) -> None:
            inputs.setdefault(f"{layer}.{linear}", []).append(x.reshape(-1, x.shape[-1]))

        block = model.blocks[layer]
        if scheme is None:
            model.blocks[layer] = HookedWeights(block, hook)
        else:
            block.inner = HookedWeights(block.inner, hook)  # type: ignore[attr-defined]

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
    """Keys with the block's number."""

    def solve(self, block: Block, group: Sequence[tuple[Linear, Tensor]], statistics: Statistics) -> list[Solved]:
        for linear, _ in group:
            self.seen[f"{block.layer}.{linear.name}"] = statistics
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

    monkeypatch.setattr("deepseek_compress.models.families.deepseek_v3.DeepseekV3.attention", never)
    architecture = Architecture.of(open_checkpoint(tiny_v3))
    weights = WEIGHTS["rtn"](group_size=32)
    chosen = select(architecture, ROLES, weights)
    compress(tiny_v3, tmp_path / "out", LinearSolver(chosen, None, weights, 64), tokens=None)
    done = open_checkpoint(tmp_path / "out")
    for name, _ in architecture.linears(ROLES):
        expected = weights(architecture.source.read(name + ".weight"), Statistics())
        found = done.read_quantized(name + ".weight")
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

    class Stopping(LinearSolver):
        def solve(self, block: Block, group: Sequence[tuple[Linear, Tensor]], statistics: Statistics) -> list[Solved]:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise Interrupted
            return super().solve(block, group, statistics)

    base = gptq(tiny_v3)
    change = Stopping(base.selection, None, base.weights, base.min_tokens)
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

    def compress(self, path: Path, out: Path, change: LinearSolver) -> None:
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


def test_one_thread_or_two_give_the_same_bytes(tiny_qwen2: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            compress(tiny_qwen2, tmp_path / str(count), gptq(tiny_qwen2))
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_in_memory_or_on_disk_the_same_bytes(tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress(tiny_v3, tmp_path / "held", gptq(tiny_v3), tokens=FEW)
    monkeypatch.setattr(hidden_store, "RESIDENT", 0)
    compress(tiny_v3, tmp_path / "disk", gptq(tiny_v3), tokens=FEW)
    assert contents(tmp_path / "held") == contents(tmp_path / "disk")


def test_facts_are_plain_json(tiny_qwen2: Path, tmp_path: Path) -> None:
    facts = compress(tiny_qwen2, tmp_path / "out", gptq(tiny_qwen2))
    assert json.loads(json.dumps(facts)) == facts
    first = facts[0]["linears"][0]
    assert first["name"] == "model.layers.0.self_attn.q_proj"
    assert first["role"] == str(Role.ATTENTION)
    assert 0 < first["output_error"] < first["weight_error"] < 0.1
