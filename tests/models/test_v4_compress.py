"""Compressing DeepSeek-V4: attention and shared experts change, routed experts keep their MXFP4 bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
from deepseek_compress.compress.convert import convert
from deepseek_compress.compress.job import Job
from deepseek_compress.models import Architecture, Role
from deepseek_compress.models.runtime import Model
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.tasks import mixture
from deepseek_compress.workers import open_pool

TOKENS = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_experts_keep_their_bytes(method: str, tiny_v4: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{p.prompt} {p.solution}" for p in mixture(seed=4, count=30, split="calibration")))
    calibration = {"sources": [str(text)], "samples": 8, "length": 64}
    told: list[str] = []
    context = Context("out", tmp_path / "out", "", 0, calibration=calibration, tell=told.append)
    stage = build(Compress, {"weights": {method: {"group_size": 32}}}, "compress")
    source = open_checkpoint(tiny_v4)
    assert stage.problems(source.header) == []
    done = open_checkpoint(stage.run(source, context).path)
    assert "routed experts keep their MXFP4 values (requantize: true changes them)" in told
    assert done.config["quantization_config"]["format"] == "mixed-precision"
    family = Architecture.of(done).family
    for name, info in done.header.tensors.items():
        if family.role(name) is Role.EXPERT:
            assert info.encoding == "mxfp4"
            assert torch.equal(done.read(name), source.read(name))
        elif name.endswith(("wq_a.weight", "wo_b.weight", "shared_experts.w1.weight")):
            assert info.encoding == "packed"
    with torch.no_grad():
        ours, theirs = Model.load(done).forward(TOKENS), Model.load(source).forward(TOKENS)
    assert 0 < float((ours - theirs).square().mean() / theirs.var()) < 0.5


def test_static_activations_have_a_grid_for_each_input_that_is_seen(tiny_v4: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{p.prompt} {p.solution}" for p in mixture(seed=4, count=30, split="calibration")))
    calibration = {"sources": [str(text)], "samples": 4, "length": 64}
    context = Context("out", tmp_path / "out", "", 0, calibration=calibration, tell=lambda line: None)
    knobs = {"weights": {"rtn": {"group_size": 32}}, "activations": "static"}
    done = open_checkpoint(build(Compress, knobs, "compress").run(open_checkpoint(tiny_v4), context).path)
    assert done.activations is not None
    parts = {name.rpartition(".")[2] for name in done.activations["inputs"]}
    assert {"wq_a", "wq_b", "wkv", "wo_b", "w1", "w2", "w3"} <= parts
    model = Model.load(done)
    with torch.no_grad():
        ours, plain = model.forward(TOKENS), Model(model.family, model.cfg, model.weights).forward(TOKENS)
    assert 0 < float((ours - plain).square().mean() / plain.var()) < 0.1


def test_what_its_streams_do_not_allow_is_one_line_each(tiny_v4: Path) -> None:
    parts = {"rotation": "hadamard", "kv_cache": {"num_bits": 8}}
    found = build(Compress, parts, "compress").problems(open_checkpoint(tiny_v4).header)
    assert [str(problem) for problem in found] == [
        "rotation: deepseek_v4 mixes its streams before each norm; set rotation: null",
        "kv_cache: deepseek_v4 keeps entries of many tokens, not rounded here; set kv_cache: null",
    ]


def test_the_loop_advances_the_streams(tiny_v4: Path, tmp_path: Path) -> None:
    """The hidden state that the last block is calibrated with is that of the finished model."""
    stage = build(Compress, {"weights": {"gptq": {"group_size": 32, "mse": False}}, "requantize": True}, "compress")
    source = open_checkpoint(tiny_v4)
    architecture = Architecture.of(source)
    kept: list[torch.Tensor] = []

    with CheckpointWriter(tmp_path / "out", source) as writer:
        solver = stage._solver(architecture)
        work = tmp_path / "out" / ".dsc_blocks"

        def look(done: int, total: int, note: str) -> None:
            if done == total - 1:
                shape = architecture.row_shape
                with HiddenStore(work / f"hidden-{done:05d}.f32", TOKENS.numel(), shape, existing=True) as store:
                    kept.append(store.read(0, TOKENS.numel()).clone())

        job = Job(architecture, solver, work)
        with open_pool(job) as pool:
            convert(job, writer, pool, TOKENS, look)
        writer.finish({}, {}, [])
    with torch.no_grad():
        states = Model.load(tmp_path / "out").hidden_states(TOKENS)
    torch.testing.assert_close(kept[0].view_as(states[-2]), states[-2], rtol=1e-3, atol=1e-3)
