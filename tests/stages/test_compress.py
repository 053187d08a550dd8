"""The compress stage: what it writes for each combination of its parts, and what it refuses from shapes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_compress.calibration.tokens import calibration_tokens
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.checkpoint.formats.packed import unpack_weight
from deepseek_compress.compress import loss as loss_of_text
from deepseek_compress.compress.overrides import build_all
from deepseek_compress.compress.selection import select
from deepseek_compress.errors import DscError, Problems
from deepseek_compress.evaluation.divergence import Sample, measure, record
from deepseek_compress.models import Architecture
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.numerics import SPARSITY, WEIGHTS, pattern
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress
from deepseek_compress.tasks import mixture
from tests.conftest import LLAMA_CONFIG, V2_CONFIG, shape_of

TOKENS = torch.randint(2, 512, (2, 60), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text in the words of the tiny models."""
    file = tmp_path_factory.mktemp("text") / "calibration.jsonl"
    problems = mixture(seed=3, count=60, split="calibration")
    file.write_text("".join(json.dumps({"text": f"{p.prompt} {p.solution}"}) + "\n" for p in problems))
    return file


def stage(**knobs: Any) -> Compress:
    return build(Compress, knobs, "compress")


def context(out: Path, text: Path, told: list[str] | None = None) -> Context:
    calibration = {"sources": [str(text)], "samples": 12, "length": 64}
    lines = [] if told is None else told
    return Context(
        name=out.name, out=out, recipe_text="stages: []\n", seed=0, calibration=calibration, tell=lines.append
    )


def loss(path: Path, reference: Path) -> float:
    """Mean squared difference of logits, relative to their variance."""
    with torch.no_grad():
        ours, theirs = Model.load(path).forward(TOKENS), Model.load(reference).forward(TOKENS)
    return float((ours - theirs).square().mean() / theirs.var())


@pytest.mark.parametrize("name", ["tiny_v3", "tiny_v2", "tiny_qwen2", "tiny_llama"])
def test_four_bits(name: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    source = open_checkpoint(path)
    knobs = stage(weights={"gptq": {"group_size": 32, "mse": False}})
    assert knobs.problems(source.header) == []
    output = knobs.run(source, context(tmp_path / "out", text))
    done = open_checkpoint(output.path)
    architecture = Architecture.of(done)
    assert architecture.problems() == []
    changed = {f"{block.prefix}{linear.name}.weight" for block in architecture.blocks for linear in block.linears}
    assert {name for name, info in done.header.tensors.items() if info.encoding == "packed"} == changed
    assert done.config["quantization_config"]["format"] == "pack-quantized"
    assert {key: value for key, value in done.config.items() if key != "quantization_config"} == {
        key: value for key, value in source.config.items() if key != "quantization_config"
    }
    for other in set(source.header.tensors) - changed:
        assert torch.equal(done.read(other), source.read(other))
    assert loss(output.path, path) < 0.3  # random weights, and tokens that change experts
    assert output.facts["linears"] == len(changed)
    assert 4.5 < output.facts["bits_per_weight"] < 4.7
    assert not (output.path / ".dsc_blocks").exists()


def test_gptq_beats_rounding(tiny_qwen2: Path, text: Path, tmp_path: Path) -> None:
    """Output errors as the facts state them: the solver's reason to be."""
    errors = {}
    for method in ("rtn", "gptq"):
        # sparsity asks for the Hessian in both, so that both measure the error of the output
        knobs = stage(weights={method: {"group_size": 32}}, sparsity="sparsegpt")
        output = knobs.run(open_checkpoint(tiny_qwen2), context(tmp_path / method, text))
        errors[method] = [block["output_error"] for block in output.facts["blocks"]]
    assert all(ours < theirs for ours, theirs in zip(errors["gptq"], errors["rtn"], strict=True))


@pytest.mark.parametrize("method", SPARSITY)
def test_sparsity_alone_is_a_plain_checkpoint_with_zeros(
    method: str, tiny_v3: Path, text: Path, tmp_path: Path
) -> None:
    output = stage(sparsity={method: {}}).run(open_checkpoint(tiny_v3), context(tmp_path / "out", text))
    done = open_checkpoint(output.path)
    assert "quantization_config" not in done.config
    assert {info.encoding for info in done.header.tensors.values()} == {"plain"}
    for name in done.header.tensors:
        if "_proj" in name:
            assert pattern.holds(done.read(name))
            assert done.header.tensors[name].dtype == torch.bfloat16
    assert output.facts["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert output.facts["bits_per_weight"] == 16


@pytest.mark.parametrize(("method", "turned"), [("sparsegpt", False), ("reconstruct", False), ("sparsegpt", True)])
def test_what_zeros_cost_is_measured_and_told(
    method: str, turned: bool, tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of the block loop are those of an evaluation of what was written."""
    told: list[str] = []
    monkeypatch.setattr(loss_of_text, "JUDGED", 3 * 64)
    monkeypatch.setattr(loss_of_text, "WARN_KL", 1e-9)
    knobs = stage(sparsity=method, **({"rotation": "hadamard"} if turned else {}))
    output = knobs.run(open_checkpoint(tiny_llama), context(tmp_path / "out", text, told))
    tokens = calibration_tokens([text], load_tokenizer(tiny_llama), 12, 64)[:3].tolist()
    samples = [Sample(window, 1) for window in tokens]
    (tmp_path / "trace").mkdir()
    trace, before = record(Model.load(tiny_llama), samples, tmp_path / "trace")
    after = measure(Model.load(output.path), samples, trace)
    found = output.facts["loss"]
    assert found["tokens"] == 3 * 63
    assert found["before"] == pytest.approx(before.perplexity, rel=1e-3)
    assert found["after"] == pytest.approx(after.perplexity, rel=0.01)  # a turned model is stored in 16 bits
    assert found["kl"] == pytest.approx(after.kl_divergence, rel=0.02, abs=1e-4)
    assert found["kl"] > 1e-3
    (line,) = (line for line in told if line.startswith("on 189 tokens"))
    assert f"KL {found['kl']:.4f}" in line
    assert any(line.startswith("warning: KL") for line in told)
    card = (output.path / "README.md").read_text()
    assert f"| 189 | {found['kl']:.4f} | {found['before']:.2f} | {found['after']:.2f} |" in card
    assert "far from the original" in card


def test_zeros_without_text_are_told_as_not_measured(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    told: list[str] = []
    output = stage(sparsity="magnitude").run(open_checkpoint(tiny_llama), context(tmp_path / "out", text, told))
    assert "loss" not in output.facts
    assert any("not measured: dsc evaluate" in line for line in told)


def test_sparse_and_quantised_keeps_the_zeros(tiny_v3: Path, text: Path, tmp_path: Path) -> None:
    knobs = stage(sparsity="sparsegpt", weights={"gptq": {"group_size": 32, "mse": False}}, activations="dynamic")
    output = knobs.run(open_checkpoint(tiny_v3), context(tmp_path / "out", text))
    done = open_checkpoint(output.path)
    for name, info in done.header.tensors.items():
        if info.encoding == "packed":
            assert pattern.holds(unpack_weight(name, done.read_raw(name)).dequantize())
    assert done.activations is not None
    assert done.activations["num_bits"] == 8
    assert "attention" in done.activations["roles"]
    assert type(Model.load(output.path).blocks[0]).__name__ == "QuantizedInputs"


def test_activations_alone_change_no_weight(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    output = stage(activations={"dynamic": {"num_bits": 8}}).run(
        open_checkpoint(tiny_llama), context(tmp_path / "out", text)
    )
    done, source = open_checkpoint(output.path), open_checkpoint(tiny_llama)
    assert all(torch.equal(done.read(name), source.read(name)) for name in source.header.tensors)
    assert 0 < loss(output.path, tiny_llama) < 0.01


def test_a_cache_of_few_bits_stands_in_the_manifest_and_runs(tiny_v3_bf16: Path, text: Path, tmp_path: Path) -> None:
    told: list[str] = []
    output = stage(kv_cache={"num_bits": 4}).run(open_checkpoint(tiny_v3_bf16), context(tmp_path / "out", text, told))
    assert told == [
        "KV cache of 4 bits: 159 bytes a token, 576 in 16 bits; it stands in the manifest and is evaluated; serving "
        "engines ignore it, set theirs at launch (see README.md of the output)"
    ]
    done, source = open_checkpoint(output.path), open_checkpoint(tiny_v3_bf16)
    assert all(torch.equal(done.read(name), source.read(name)) for name in source.header.tensors)
    assert done.kv_cache == {"num_bits": 4, "group_size": None, "delta": False}
    assert "int4_per_token_head" in (output.path / "README.md").read_text()
    assert 0 < loss(output.path, tiny_v3_bf16) < 0.1
    packed = stage(weights="rtn").run(done, context(tmp_path / "packed", text))
    assert open_checkpoint(packed.path).kv_cache == done.kv_cache, "other stages keep it"
    (problem,) = stage(kv_cache={"group_size": 24}).problems(source.header)[:1]
    assert "latents of 64 channels do not divide into groups of 24; set group_size: 32" in str(problem)


@pytest.mark.parametrize(("name", "served"), [("tiny_qwen2", True), ("tiny_v2", False)])
def test_zero_points_of_inputs_are_told_where_servers_take_them(
    name: str, served: bool, text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    knobs = stage(weights={"rtn": {"num_bits": 8, "symmetric": True}}, activations={"dynamic": {"symmetric": False}})
    lines: list[str] = []
    output = knobs.run(open_checkpoint(request.getfixturevalue(name)), context(tmp_path / "out", text, lines))
    where = "config.json, as compressed-tensors and vLLM read them" if served else "the manifest, for evaluation"
    assert any(line.startswith(f"8-bit activations stand in {where}") for line in lines)
    (group,) = open_checkpoint(output.path).config["quantization_config"]["config_groups"].values()
    told = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
    assert group["input_activations"] == (told if served else None)


@pytest.mark.parametrize("method", WEIGHTS)
def test_every_method_with_its_defaults(method: str, tiny_qwen2: Path, text: Path, tmp_path: Path) -> None:
    knobs = stage(weights=method)
    source = open_checkpoint(tiny_qwen2)
    assert knobs.problems(source.header) == []
    told: list[str] = []
    output = knobs.run(source, context(tmp_path / "out", text, told))
    assert told[0] == "group_size 128 (chosen: the largest that fits)"
    assert loss(output.path, tiny_qwen2) < 0.2


def test_the_group_size_is_chosen_from_the_shapes(tiny_v3: Path, tmp_path: Path, text: Path) -> None:
    """q_lora 96 asks for 32. In DeepSeek-V2-Lite 128 fits all but one matrix, in SmolLM2 64 fits all."""
    told: list[str] = []
    stage(weights="rtn").run(open_checkpoint(tiny_v3), context(tmp_path / "out", text, told))
    assert told == ["group_size 32 (chosen: the largest that fits)"]
    lite = {**V2_CONFIG, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408}
    lite |= {"num_hidden_layers": 27, "num_attention_heads": 16, "n_routed_experts": 64, "kv_lora_rank": 512}
    lite |= {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    assert chosen(lite) == (128, {"model.layers.0.mlp.down_proj"})
    smol = {**LLAMA_CONFIG, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    assert chosen({**smol, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}) == (64, set())


def chosen(config: dict[str, Any]) -> tuple[int | None, set[str]]:
    selection = select(shape_of(config), Compress().roles, WEIGHTS["rtn"]())
    return selection.group_size, set(selection.left)


def test_eight_bits_one_scale_a_row(tiny_llama: Path, tmp_path: Path, text: Path) -> None:
    knobs = stage(weights={"rtn": {"num_bits": 8, "symmetric": True}}, activations="dynamic")
    output = knobs.run(open_checkpoint(tiny_llama), context(tmp_path / "out", text))
    config = open_checkpoint(output.path).config["quantization_config"]
    assert config["format"] == "int-quantized"
    assert loss(output.path, tiny_llama) < 0.01


def test_problems_from_shapes_alone(tiny_v3: Path, tiny_qwen2: Path, tmp_path: Path, text: Path) -> None:
    header = open_checkpoint(tiny_v3).header
    (first, *rest) = stage(weights={"rtn": {"group_size": 128}}).problems(header)
    assert "columns do not divide into groups of 128" in str(first)
    assert "model.layers.0" in str(first)
    assert first.fix == "set group_size: 32"
    assert len({str(problem) for problem in [first, *rest]}) == 1 + len(rest)
    assert "nothing to do" in str(stage().problems(header)[0])
    with pytest.raises(DscError, match="unknown weights 'gptx'"):
        stage(weights="gptx")
    with pytest.raises(Problems, match="unknown knob 'group'"):
        stage(weights={"rtn": {"group": 32}})
    output = stage(weights={"rtn": {"group_size": 32}}).run(
        open_checkpoint(tiny_qwen2), context(tmp_path / "out", text)
    )
    again = stage(weights="rtn").problems(open_checkpoint(output.path).header)
    assert "packed already" in str(again[0])


def test_forecast_is_what_happens(tiny_v3: Path, tmp_path: Path, text: Path) -> None:
    source = open_checkpoint(tiny_v3)
    knobs = stage(weights={"rtn": {"group_size": 32}})
    forecast = knobs.forecast(source.header, 64, 512)
    done = open_checkpoint(knobs.run(source, context(tmp_path / "out", text)).path)
    assert forecast.bytes == done.header.bytes
    assert forecast.header.tensors.keys() == done.header.tensors.keys()
    for name, info in done.header.tensors.items():
        assert forecast.header.tensors[name].shape == info.shape
        assert forecast.header.tensors[name].encoding == info.encoding
    assert forecast.tensors == sum(info.encoding == "packed" for info in done.header.tensors.values())


def test_only_as_much_text_is_used_as_is_enough(tiny_llama: Path, tiny_v3: Path, tmp_path: Path, text: Path) -> None:
    weights = {"gptaq": {"group_size": 32, "enough": 96}}
    some = stage(weights=weights).run(open_checkpoint(tiny_llama), context(tmp_path / "some", text))
    lines = some.facts["decisions"]
    assert any(line.startswith("2 of 12 samples used") for line in lines)
    assert any("linears corrected towards the original's outputs" in line for line in lines)
    layers = json.loads((some.path / "dsc_layers.json").read_text())["blocks"]
    assert {linear["tokens"] for block in layers for linear in block["linears"]} == {2 * 64}
    assert all(0 <= linear["strength"] <= 1 for block in layers for linear in block["linears"])
    # two of eight experts get a token: four times the text
    spread = stage(weights=weights).run(open_checkpoint(tiny_v3), context(tmp_path / "spread", text))
    assert any(line.startswith("6 of 12 samples used") for line in spread.facts["decisions"])


def test_whole_roles_may_have_other_bits(tiny_v3: Path, tiny_llama: Path, tmp_path: Path) -> None:
    keep = tuple(build_all([{"modules": "*.0.self_attn.o_proj", "keep": True}]))
    every = stage(weights={"rtn": {"group_size": 32}}, every_token_bits=8).model_copy(update={"overrides": keep})
    attention = every.model_copy(update={"every_token_bits": None, "attention_bits": 8})
    cases = (
        (every, tiny_v3, {"self_attn": 8, ".experts.": 5, "": 8}),
        (every, tiny_llama, {"": 5}),
        (attention, tiny_v3, {"self_attn": 8, "": 5}),
        (attention, tiny_llama, {"self_attn": 8, "": 5}),
    )
    for number, (knobs, source, expected) in enumerate(cases):
        done = knobs.run(open_checkpoint(source), Context("out", tmp_path / f"{number}", "stages: []\n", 0, {}))
        out, schemes = done.path, set(expected.values())
        assert any("transformers 5.23 does not" in line for line in done.facts["decisions"]) == (len(schemes) > 1)
        layers = json.loads((out / "dsc_layers.json").read_text())["blocks"]
        bits = {linear["name"]: round(linear["bits"]) for block in layers for linear in block["linears"]}
        assert "model.layers.0.self_attn.o_proj" not in bits, "an override of the recipe has the last word"
        for name, found in bits.items():
            assert found == next(value for part, value in expected.items() if part in name), name
        assert Architecture.of(open_checkpoint(out)).problems() == []


def test_a_model_that_is_too_large_is_not_corrected(tiny_llama: Path, tmp_path: Path, text: Path) -> None:
    source = open_checkpoint(tiny_llama)
    knobs = stage(weights={"gptaq": {"group_size": 32, "largest": 1000, "enough": 96, "damping": 0.02}})
    plain = stage(weights={"gptq": {"group_size": 32, "damping": 0.02}})
    made = [one.run(source, context(tmp_path / name, text)) for name, one in (("gptaq", knobs), ("gptq", plain))]
    assert any(line.startswith("gptq: no correction of more than 1000") for line in made[0].facts["decisions"])
    left, right = (open_checkpoint(output.path) for output in made)
    assert all(torch.equal(left.read(name), right.read(name)) for name in left.header.tensors)
    assert knobs.forecast(source.header, 12, 64).memory == plain.forecast(source.header, 12, 64).memory


def test_too_little_text_is_one_line(tiny_v3: Path, tmp_path: Path, text: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("anna has 2 3 apples .")
    with pytest.raises(DscError, match="tokens of calibration text"):
        stage(weights={"gptq": {"group_size": 32}}).run(open_checkpoint(tiny_v3), context(tmp_path / "out", short))
    assert not (tmp_path / "out" / "config.json").exists()
