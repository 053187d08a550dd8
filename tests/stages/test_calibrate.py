"""Statistics that are saved and taken up again: what they hold, what a run with them gives, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek_compress import pipeline
from deepseek_compress.calibration.settings import Calibration
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.checkpoint.statistics import StatisticsWriter, open_statistics, pack_triangle, unpack_triangle
from deepseek_compress.compress import collection, convert, moved_scales
from deepseek_compress.compress.accumulate import Accumulator
from deepseek_compress.compress.job import by_input
from deepseek_compress.errors import DscError, Problems
from deepseek_compress.models import Architecture, Block
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.weights import HookedWeights
from deepseek_compress.numerics import WEIGHTS
from deepseek_compress.numerics.migration import SmoothQuant
from deepseek_compress.recipe import Changes, parse_recipe
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.calibrate import Calibrate
from deepseek_compress.stages.compress import Compress
from deepseek_compress.stages.text import calibration_text
from deepseek_compress.streaming import loop
from deepseek_compress.streaming.collect import Collector, Look, collect_inputs
from tests.compress.test_blocks import contents
from tests.compress.test_moved_scales import job_of, silent
from tests.models.reference import relative

GPTQ = Compress(weights=WEIGHTS["gptq"].model_validate({"group_size": 32}))


def context(out: Path, calibration: dict[str, Any], **more: Any) -> Context:
    return Context("out", out, "", 0, calibration, tell=lambda line: None, **more)


def settings(text: Path) -> dict[str, Any]:
    return {"sources": [str(text)], "samples": 12, "length": 64}


def collect(model: Path, text: Path, out: Path, kind: str = "hessian", **more: Any) -> Path:
    return Calibrate(statistics=kind).run(open_checkpoint(model), context(out, settings(text), **more)).path


@pytest.fixture(scope="module")
def saved(tiny_v3: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collect(tiny_v3, text, tmp_path_factory.mktemp("saved") / "out")


@given(st.integers(1, 40), st.integers(0, 99))
def test_half_of_a_symmetric_matrix_is_all_of_it(n: int, seed: int) -> None:
    x = torch.randn(n + 1, n, generator=torch.Generator().manual_seed(seed))
    matrix = x.T @ x
    matrix = torch.triu(matrix) + torch.triu(matrix, 1).T
    assert len(pack_triangle(matrix)) == n * (n + 1) // 2
    assert torch.equal(unpack_triangle(pack_triangle(matrix)), matrix)


def test_they_are_what_the_model_in_memory_sees(saved: Path, tiny_v3: Path, text: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_v3)
    tokens = calibration_text(source, context(tmp_path, settings(text)), tmp_path).tokens
    whole, found = Model.load(source), open_statistics(saved)
    seen: dict[str, list[Tensor]] = {}
    for layer, weights in enumerate(whole.blocks):

        def look(name: str, x: Tensor, layer: int = layer) -> None:
            seen.setdefault(f"{layer}.{name}", []).append(x.flatten(0, -2))

        whole.blocks[layer] = HookedWeights(weights, look)
    with torch.no_grad():
        whole.hidden_states(tokens)
    told = json.loads((saved / "calibration.json").read_text())["blocks"]
    for layer in range(whole.cfg.num_hidden_layers):
        rows = {row["name"]: row for row in told[layer]["linears"]}
        for group in by_input(whole.family.linears(whole.cfg, layer)):
            statistics = found.read(f"{whole.family.prefix(layer)}.{group[0].input}")
            x = torch.cat(seen.get(f"{layer}.{group[0].name}", [torch.zeros(0, group[0].columns)]))
            assert statistics.tokens == len(x) == rows[group[0].name]["tokens"]
            if len(x):
                assert statistics.hessian is not None and statistics.input_absmax is not None
                torch.testing.assert_close(statistics.hessian, x.T @ x, rtol=1e-3, atol=2e-2)
                torch.testing.assert_close(statistics.input_absmax, x.abs().amax(0), rtol=1e-3, atol=1e-3)
                assert rows[group[0].name]["absmax"] == pytest.approx(float(x.abs().max()), rel=1e-3)


def test_a_run_with_them_solves_each_linear_from_them(saved: Path, tiny_v3: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_v3)
    out = GPTQ.run(source, context(tmp_path / "out", {"statistics": str(saved)})).path
    made, found = open_checkpoint(out), open_statistics(saved)
    for name, key in (("1.self_attn.q_a_proj", "1.self_attn.in"), ("2.mlp.experts.3.down_proj",) * 2):
        weight = source.read(f"model.layers.{name}.weight")
        statistics = found.read(f"model.layers.{key}")
        assert statistics.tokens >= 64
        assert GPTQ.weights is not None
        expected = GPTQ.weights(weight, GPTQ.weights.prepare(statistics))
        got = made.read_quantized(f"model.layers.{name}.weight")
        assert got is not None and torch.equal(got.codes, expected.codes) and torch.equal(got.scale, expected.scale)
    manifest = json.loads((out / "dsc_manifest.json").read_text())
    assert manifest["calibration"]["sources"][0]["tokens"] == 12 * 64
    assert len(manifest["calibration"]["statistics"]) == 64


def test_the_first_linears_are_those_of_a_run_with_text(saved: Path, tiny_v3: Path, text: Path, tmp_path: Path) -> None:
    """Nothing has changed before them; from there on a run with text sees what the changed linears give."""
    source = open_checkpoint(tiny_v3)
    ours = open_checkpoint(GPTQ.run(source, context(tmp_path / "a", {"statistics": str(saved)})).path)
    theirs = open_checkpoint(GPTQ.run(source, context(tmp_path / "b", settings(text))).path)
    first = "model.layers.0.self_attn.q_a_proj.weight"
    assert torch.equal(ours.read(first), theirs.read(first))
    last = "model.layers.2.mlp.shared_experts.down_proj.weight"
    assert not torch.equal(ours.read(last), theirs.read(last))


def test_scales_move_by_them_as_by_the_text(saved: Path, tiny_v3: Path, text: Path, tmp_path: Path) -> None:
    """And what the moved model sees is what the statistics then say."""
    tokens = calibration_text(open_checkpoint(tiny_v3), context(tmp_path, settings(text)), tmp_path).tokens
    job = job_of(tiny_v3, tmp_path / "text", WEIGHTS["gptq"].model_validate({"group_size": 32}))
    by_text = moved_scales.find(job, tokens, SmoothQuant(), silent)
    job = replace(job, work=tmp_path / "saved", statistics=open_statistics(saved))
    moved = moved_scales.migrate(job, None, SmoothQuant(), silent)
    by_saved = moved_scales.find(job, None, SmoothQuant(), silent)
    assert by_text.keys() == by_saved.keys()
    for place, scales in by_text.items():
        torch.testing.assert_close(by_saved[place], scales, rtol=1e-3, atol=1e-6)
    seen: dict[tuple[int, str], Accumulator] = {}

    class Watching(Collector):
        def begin(self, block: Block) -> Look:
            return lambda name, x: seen.setdefault((block.layer, name), Accumulator(("hessian",))).add(x)

        def end(self, block: Block) -> dict[str, Any]:
            return {}

    collect_inputs(moved.architecture, tokens, tmp_path / "walk", "walk", Watching(), silent)
    for block in job.architecture.blocks:
        for linear in block.linears:
            if (block.layer, linear.name) in seen:
                expected, found = seen[block.layer, linear.name].statistics(linear.name), moved.saved(block, linear)
                assert expected.hessian is not None and found.hessian is not None
                assert relative(found.hessian, expected.hessian) < 1e-4


def test_the_default_recipe_takes_them(saved: Path, tiny_v3: Path, text: Path, tmp_path: Path) -> None:
    source, parts = open_checkpoint(tiny_v3), {"weights": GPTQ.weights, "migration": SmoothQuant(samples=4)}
    settled = {"statistics": str(saved)}
    assert Compress(**parts).statistics_problems(source, Calibration.model_validate(settled)) == []
    out = Compress(**parts).run(source, context(tmp_path / "out", settled)).path
    plain = GPTQ.run(source, context(tmp_path / "plain", settled)).path
    name = "model.layers.0.self_attn.q_a_proj.weight"
    assert not torch.equal(open_checkpoint(out).read(name), open_checkpoint(plain).read(name))


def test_workers_and_interruptions_change_no_byte(
    saved: Path, tiny_v3: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert contents(collect(tiny_v3, text, tmp_path / "two", workers=2)) == contents(saved)
    real, blocks_done = StatisticsWriter.flush, []

    def flush(self: StatisticsWriter) -> None:
        if blocks_done:
            raise KeyboardInterrupt
        blocks_done.append(1)
        real(self)

    monkeypatch.setattr(StatisticsWriter, "flush", flush)
    with pytest.raises(KeyboardInterrupt):
        collect(tiny_v3, text, tmp_path / "cut")
    monkeypatch.undo()
    with pytest.raises(DscError, match="no statistics in it"):
        open_statistics(tmp_path / "cut")
    run: list[int] = []
    running = convert.run_block
    monkeypatch.setattr(
        convert, "run_block", lambda job, layer, *rest: (run.append(layer), running(job, layer, *rest))[1]
    )
    assert contents(collect(tiny_v3, text, tmp_path / "cut")) == contents(saved)
    assert run == [1, 2]
    one = GPTQ.run(open_checkpoint(tiny_v3), context(tmp_path / "q1", {"statistics": str(saved)}))
    two = GPTQ.run(open_checkpoint(tiny_v3), context(tmp_path / "q2", {"statistics": str(saved)}, workers=2))
    assert contents(one.path) == contents(two.path)


def test_killed_between_the_statistics_of_a_block_and_its_output(
    saved: Path, tiny_v3: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block is run again for what enters the next; its file is there already, and stays the only one."""

    class Killed(BaseException):
        pass

    def killed(path: Path, facts: Any) -> None:
        raise Killed

    monkeypatch.setattr(loop, "write_sealed", killed)
    with pytest.raises(Killed):
        collect(tiny_v3, text, tmp_path / "cut")
    monkeypatch.undo()
    assert [file.name for file in (tmp_path / "cut" / ".dsc_partial").glob("*.json")] == ["statistics-00000.json"]
    assert contents(collect(tiny_v3, text, tmp_path / "cut")) == contents(saved)


def test_experts_without_tokens_are_solved_without_statistics(tiny_v3: Path, text: Path, tmp_path: Path) -> None:
    few = {**settings(text), "samples": 1, "length": 4}
    found = Calibrate().run(open_checkpoint(tiny_v3), context(tmp_path / "st", few))
    told = json.loads((found.path / "calibration.json").read_text())["blocks"][1]
    assert told["experts"]["unreached"] == told["experts"]["tokens"].count(0) > 0
    facts = GPTQ.run(open_checkpoint(tiny_v3), context(tmp_path / "out", {"statistics": str(found.path)})).facts
    assert any(".experts." in name for name in facts["fallback"])


def test_plan_knows_their_size(tiny_v3: Path, saved: Path, text: Path, tmp_path: Path) -> None:
    header = open_checkpoint(tiny_v3).header
    written = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    planned = Calibrate().forecast(header, 12, 64).bytes
    assert planned is not None and 0.9 * written < planned <= written
    ranges = collect(tiny_v3, text, tmp_path / "ranges", "ranges")
    assert open_statistics(ranges).fields == {"input_absmax", "input_absmean"}
    assert open_statistics(ranges).read("model.layers.0.mlp.in").hessian is None
    assert sum(file.stat().st_size for file in ranges.glob("*.safetensors")) < written / 4


def test_a_full_v3_block_is_foreseen(tiny_v3: Path) -> None:
    header = open_checkpoint(tiny_v3).header
    full = {"hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_hidden_layers": 4}
    config = {**header.config, **full, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4}
    whole, dense = (
        collection.expected(Architecture.of(replace(header, config=its)), ("hessian",), 64, 512)
        for its in (config, {**config, "num_hidden_layers": 3})
    )
    experts = 256 * (7168**2 + 2048**2) * 4 / 2
    assert whole[0] - dense[0] == pytest.approx(experts, rel=0.02)
    assert whole[1].task < 3e9  # never together


def refused(model: Path, out: Path, calibration: dict[str, Any], stage: Compress = GPTQ) -> list[str]:
    with pytest.raises(DscError) as caught:
        stage.run(open_checkpoint(model), context(out, calibration))
    assert not out.exists() or not any(out.iterdir())
    error = caught.value
    return [str(problem) for problem in (error.problems if isinstance(error, Problems) else [error])]


def test_what_differs_is_told(saved: Path, tiny_v3: Path, tiny_v3_bf16: Path, text: Path, tmp_path: Path) -> None:
    found = {"statistics": str(saved)}
    assert "statistics of another model" in refused(tiny_v3_bf16, tmp_path / "a", found)[0]
    other = tmp_path / "text.jsonl"
    other.write_text(text.read_text().replace("1", "2"))
    told = refused(tiny_v3, tmp_path / "b", {**found, "sources": [str(other)], "samples": 13, "length": 64})
    assert len(told) == 2
    assert "made with samples 12, now 13; leave samples out" in told[0]
    assert "made with sources text.jsonl (" in told[1]
    gptaq = Compress(weights=WEIGHTS["gptaq"].model_validate({"group_size": 32, "strength": 0.5}))
    assert "compares the changed model with the original" in refused(tiny_v3, tmp_path / "c", found, gptaq)[0]
    held = Compress(weights=WEIGHTS["gptaq"].model_validate({"group_size": 32}))  # corrects nothing then
    plain = Compress(weights=WEIGHTS["gptq"].model_validate({"group_size": 32}))
    made = [
        one.run(open_checkpoint(tiny_v3), context(tmp_path / name, found)).path
        for name, one in (("held", held), ("plain", plain))
    ]
    left, right = (open_checkpoint(path) for path in made)
    assert all(torch.equal(left.read(name), right.read(name)) for name in left.header.tensors)
    moved = tmp_path / "model"
    shutil.copytree(tiny_v3, moved)
    (moved / "tokenizer.json").write_text((moved / "tokenizer.json").read_text() + "\n")
    assert "another tokenizer.json" in refused(moved, tmp_path / "d", found)[0]
    same = {**found, **settings(text)}
    GPTQ.run(open_checkpoint(tiny_v3), context(tmp_path / "same", same))


def test_what_is_no_statistics_is_refused(saved: Path, tiny_v3: Path, text: Path, tmp_path: Path) -> None:
    assert "no statistics in it" in refused(tiny_v3, tmp_path / "a", {"statistics": str(tmp_path / "none")})[0]
    ranges = collect(tiny_v3, text, tmp_path / "ranges", "ranges")
    (lacking,) = refused(tiny_v3, tmp_path / "b", {"statistics": str(ranges)})
    assert "holds input_absmax, input_absmean, not hessian" in lacking
    shutil.copytree(saved, tmp_path / "cut")
    shard = tmp_path / "cut" / "statistics-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "statistics-00001" in refused(tiny_v3, tmp_path / "c", {"statistics": str(tmp_path / "cut")})[0]
    with pytest.raises(DscError, match="names saved statistics alone"):
        Calibrate().run(open_checkpoint(tiny_v3), context(tmp_path / "d", {"statistics": str(saved)}))


def test_a_plan_refuses_them_too(saved: Path, tiny_v3: Path, tiny_v3_bf16: Path) -> None:
    recipe = "stages:\n  - compress: {weights: {gptq: {group_size: 32}}}\n"

    def plan(model: Path) -> pipeline.Plan:
        values = {"model": str(model), "calibration": {"statistics": str(saved)}}
        return pipeline.plan(parse_recipe(recipe, "r.yaml", Changes(values=values)))

    assert plan(tiny_v3).problems == []
    assert plan(tiny_v3).forecasts["compress"].memory is not None
    (problem,) = plan(tiny_v3_bf16).problems
    assert "another model" in problem.what
