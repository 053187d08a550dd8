"""Static activations from recipe to what others read: grids by brute force, resumed and fused alike, transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.models.families.table import family_of
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.weights import HookedWeights
from deepseek_compress.numerics.activations import InputGrid
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress

W8 = {"rtn": {"num_bits": 8, "symmetric": True}}
TOKENS = torch.randint(2, 512, (2, 24), generator=torch.Generator().manual_seed(5))


def stage(static: dict[str, Any] | None = None, **parts: Any) -> Compress:
    return Compress.model_validate({"activations": {"static": static or {}}, **parts})


def context(out: Path, text: Path, told: list[str] | None = None, **changes: Any) -> Context:
    calibration = {"sources": [str(text)], "samples": 8, "length": 64}
    told = [] if told is None else told
    base = Context(out.name, out, "", 0, calibration, tell=told.append, workers=1)
    return dataclasses.replace(base, **changes)


def compressed(source: Path, out: Path, text: Path, *, static: dict[str, Any] | None = None, **parts: Any) -> Path:
    return stage(static, **parts).run(open_checkpoint(source), context(out, text)).path


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model.forward(TOKENS)


def their_logits(path: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_are_the_ranges_of_the_original(symmetric: bool, tiny_v3_bf16: Path, text: Path, tmp_path: Path) -> None:
    """Every input of the whole model held at once, instead of observers and spools."""
    from deepseek_compress.stages.text import calibration_text

    out = compressed(tiny_v3_bf16, tmp_path / "out", text, static={"symmetric": symmetric}, weights=W8)
    source, model = open_checkpoint(tiny_v3_bf16), Model.load(tiny_v3_bf16)
    seen: dict[str, list[Tensor]] = {}
    for layer, weights in enumerate(model.blocks):

        def look(name: str, x: Tensor, layer: int = layer) -> None:
            seen.setdefault(f"model.layers.{layer}.{name}", []).append(x.flatten(0, -2))

        model.blocks[layer] = HookedWeights(weights, look)
    tokens = calibration_text(source, context(tmp_path / "text", text), tmp_path / "text").tokens
    with torch.no_grad():
        for sample in tokens:
            model.forward(sample[None])
    inputs = open_checkpoint(out).activations["inputs"]  # type: ignore[index]
    checked = 0
    for name, (scale, zero) in inputs.items():
        x = torch.cat(seen[name])
        if len(x) >= 64:
            want = InputGrid.over(float(x.min()), float(x.max()), 8, symmetric)
            assert scale == pytest.approx(want.scale, rel=1e-2)  # products of other shapes, then a rounding to BF16
            assert abs(zero - want.zero_point) <= 1
            checked += 1
    assert checked >= len(inputs) / 2


def test_starved_experts_take_the_range_of_their_layer(tiny_v3_bf16: Path, text: Path, tmp_path: Path) -> None:
    told: list[str] = []
    knobs = stage(weights=W8, min_tokens=100)
    output = knobs.run(open_checkpoint(tiny_v3_bf16), context(tmp_path / "out", text, told))
    starved = next(line for line in told if "too few tokens" in line)
    assert starved in output.facts["decisions"]
    inputs = open_checkpoint(output.path).activations["inputs"]  # type: ignore[index]
    family, cfg = Model.load(tiny_v3_bf16).family, Model.load(tiny_v3_bf16).cfg
    names = {f"{family.prefix(n)}.{x.name}" for n in range(cfg.num_hidden_layers) for x in family.linears(cfg, n)}
    assert set(inputs) == names, "every linear has a grid"
    widest = {}
    for name, (scale, _) in inputs.items():
        if ".experts." in name:
            layer, part = name.split(".experts.")[0], name.rpartition(".")[2]
            widest.setdefault((layer, part), []).append(scale)
    shared = sum(scales.count(max(scales)) > 1 for scales in widest.values())
    assert shared, "some experts share the widest grid"
    assert torch.isfinite(logits(Model.load(output.path))).all()


@pytest.mark.parametrize(("estimator", "symmetric"), [("minmax", True), ("mse", False)])
def test_transformers_computes_the_same(
    estimator: str, symmetric: bool, tiny_qwen2: Path, text: Path, tmp_path: Path
) -> None:
    static = {"estimator": estimator, "symmetric": symmetric}
    out = compressed(tiny_qwen2, tmp_path / "out", text, static=static, weights=W8)
    (group,) = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    kind = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "tensor", "dynamic": False}
    assert group["input_activations"] == kind
    stored = open_checkpoint(out).read_raw("model.layers.0.mlp.gate_proj.weight")
    assert stored["input_scale"].shape == (1,)
    assert ("input_zero_point" in stored) is not symmetric
    theirs, ours = their_logits(out), logits(Model.load(out))
    plain = logits(Model.load(tiny_qwen2))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-3 * float(theirs.abs().max()))
    assert (ours - theirs).square().mean() < 1e-4 * (plain - theirs).square().mean(), "far closer than unrounded inputs"


def test_servers_are_told_only_where_they_can(tiny_qwen2: Path, tiny_v2: Path, text: Path, tmp_path: Path) -> None:
    """4-bit weights, zero points of weights and experts: the grids stand in the manifest alone."""
    cases = [
        (tiny_qwen2, {"weights": {"gptq": {"group_size": 32}}}),
        (tiny_qwen2, {"weights": {"rtn": {"num_bits": 4, "group_size": 32, "symmetric": True}}}),
        (tiny_v2, {"weights": W8}),
    ]
    for number, (model, parts) in enumerate(cases):
        out = compressed(model, tmp_path / str(number), text, **parts)
        done = open_checkpoint(out)
        groups = done.config["quantization_config"]["config_groups"].values()
        assert all(group["input_activations"] is None for group in groups)
        assert not any("input_scale" in info.parts for info in done.header.tensors.values())
        assert "16-bit activations" in (out / "README.md").read_text()
        model_with, family = Model.load(out), family_of(done.config)
        grids = done.activations["inputs"]  # type: ignore[index]
        plain = Model(family, model_with.cfg, model_with.weights)
        assert len(grids) > 10
        assert float((logits(model_with) - logits(plain)).abs().max()) > 0


def test_the_same_bytes_for_any_workers_and_after_a_stop(tiny_v3: Path, text: Path, tmp_path: Path) -> None:
    parts = {"weights": {"gptq": {"group_size": 32}}, "migration": "smoothquant"}
    static = {"estimator": {"percentile": {"percentile": 99.9}}}
    source = open_checkpoint(tiny_v3)
    one = stage(static, **parts).run(source, context(tmp_path / "one" / "out", text)).path

    def stops(done: int, total: int, note: str) -> None:
        if note == "block 2":
            raise KeyboardInterrupt

    late = tmp_path / "late" / "out"
    with pytest.raises(KeyboardInterrupt):
        stage(static, **parts).run(source, context(late, text, progress=stops))
    stage(static, **parts).run(source, context(late, text, workers=2))
    for file in sorted(one.glob("*")):
        if file.name != "dsc_run.json":
            assert file.read_bytes() == (late / file.name).read_bytes(), file.name


def test_a_copy_keeps_its_grids(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    from deepseek_compress.export.target import Job
    from deepseek_compress.export.targets.checkpoints import CompressedTensors

    out = compressed(tiny_llama, tmp_path / "out", text, static={"symmetric": False}, weights=W8)
    CompressedTensors().write(open_checkpoint(out), tmp_path / "copy", Job({}))
    before, after = open_checkpoint(out), open_checkpoint(tmp_path / "copy")
    assert before.activations == after.activations
    assert before.config["quantization_config"] == after.config["quantization_config"]
    for name in before.header.tensors:
        theirs = after.read_raw(name)
        assert all(torch.equal(part, theirs[suffix]) for suffix, part in before.read_raw(name).items())


def test_saved_statistics_do_not_serve(tiny_qwen2: Path, text: Path, tmp_path: Path) -> None:
    from deepseek_compress.stages.calibrate import Calibrate

    source = open_checkpoint(tiny_qwen2)
    saved = Calibrate().run(source, context(tmp_path / "statistics", text)).path
    with pytest.raises(DscError, match="static activations need text"):
        stage(weights="gptq").run(source, context(tmp_path / "out", text, calibration={"statistics": str(saved)}))


def test_nan_over_the_text_is_told(tiny_qwen2: Path, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from deepseek_compress.numerics import ranges

    monkeypatch.setattr(ranges.torch, "aminmax", lambda x: (x.min(), torch.tensor(float("nan"))))
    with pytest.raises(DscError, match=r"model\.layers\.0\..*NaN or infinite"):
        compressed(tiny_qwen2, tmp_path / "out", text, weights=W8)
