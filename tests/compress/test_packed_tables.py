"""Embedding and head on few bits: solved, stored once where they are tied, and read by whoever reads the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.compress import tables
from deepseek_compress.compress.ends import Ends
from deepseek_compress.compress.job import Job
from deepseek_compress.compress.selection import Selection
from deepseek_compress.compress.solver import LinearSolver
from deepseek_compress.errors import DscError
from deepseek_compress.evaluation import divergence, streamed
from deepseek_compress.evaluation.streamed import Subject
from deepseek_compress.export import load
from deepseek_compress.export.target import Job as ExportJob
from deepseek_compress.models import Architecture
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.types import Quantized, Statistics
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.streaming.loop import Stream

BOTH = {"embedding": {"num_bits": 8}, "head": {"num_bits": 8}}
GPTQ = {"weights": {"gptq": {"group_size": 32}}}
TOKENS = torch.randint(2, 512, (3, 40), generator=torch.Generator().manual_seed(5))


def compressed(source: Path, text: Path, out: Path, told: list[str] | None = None, **knobs: Any) -> Path:
    calibration = {"sources": [str(text)], "samples": 12, "length": 64}
    lines = [] if told is None else told
    at = Context(name="out", out=out, recipe_text="stages: []\n", seed=0, calibration=calibration, tell=lines.append)
    build(Compress, knobs, "compress").run(open_checkpoint(source), at)
    return out


def quantized(path: Path, name: str) -> Quantized:
    found = open_checkpoint(path).read_quantized(name)
    assert found is not None, f"{name} is not packed"
    return found


def config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())["quantization_config"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def llama(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights by GPTQ, embedding and head in 8 bits."""
    return compressed(tiny_llama, text, tmp_path_factory.mktemp("tables") / "llama", **GPTQ, **BOTH)


def test_the_head_is_solved_from_what_the_final_norm_gives(llama: Path, tiny_llama: Path, text: Path) -> None:
    """The brute force: the same tokens through the model that came out, all in memory."""
    from deepseek_compress.calibration.tokens import calibration_tokens
    from deepseek_compress.models.tokenizer import load_tokenizer

    model = Model.load(llama)
    tokens = calibration_tokens([text], load_tokenizer(tiny_llama), 12, 64)
    with torch.no_grad():
        x = model.family.final_hidden(model.cfg, model.top, model.hidden_states(tokens)[-1]).flatten(0, 1)
    weight = open_checkpoint(tiny_llama).read("lm_head.weight")
    mine = quantized(llama, "lm_head.weight")
    expected = Gptq(num_bits=8, group_size=mine.group_size, symmetric=True)(weight, Statistics(len(x), x.T @ x))
    assert (mine.num_bits, mine.symmetric, mine.group_size) == (8, True, 128)
    assert float((mine.codes == expected.codes).float().mean()) > 0.995  # sums in another order
    nearest = tables.Head().rounding(128)(weight, Statistics())
    lost = [float((x @ (weight - found.dequantize()).T).square().sum()) for found in (mine, nearest)]
    assert lost[0] < 0.9 * lost[1]


def test_an_embedding_is_rounded_to_nearest_and_the_loop_embeds_with_it(
    tiny_llama: Path, tmp_path: Path, llama: Path
) -> None:
    table = open_checkpoint(tiny_llama).read("model.embed_tokens.weight")
    stored = quantized(llama, "model.embed_tokens.weight")
    steps = stored.scale.repeat_interleave(stored.group_size, 1)
    assert bool(((stored.dequantize() - table).abs() <= 0.5 * steps * 1.0001).all())
    architecture = Architecture.of(open_checkpoint(tiny_llama))
    changed = tables.changed(architecture, tables.Embedding(num_bits=4), None)
    weights = build(Gptq, {"group_size": 32}, "weights")
    for paired in (False, True):
        needs = weights if not paired else _paired(weights)
        solver = LinearSolver(Selection(frozenset(), 32), None, needs, 0)
        job = Job(architecture, solver, tmp_path, tables=changed)
        tokens = TOKENS.repeat_interleave(2, dim=0) if paired else TOKENS
        kept: dict[str, Any] = {}
        ends = Ends(job, tokens, lambda name, parts, kept=kept: kept.update({name: parts}))
        begin = ends.before()
        assert begin is not None
        with HiddenStore(None, tokens.numel(), (128,)) as store:
            begin(Stream(architecture), store)
            rows = store.read(0, tokens.numel()).view(*tokens.shape, -1)
        rounded = tables.round_rows(table, changed["model.embed_tokens.weight"]).dequantize()
        assert torch.equal(rows[0], rounded[tokens[0]])
        assert torch.equal(rows[1], (table if paired else rounded)[tokens[1]])
        assert list(kept) == ["model.embed_tokens.weight"]


def _paired(weights: Gptq) -> Gptq:
    from deepseek_compress.numerics.gptaq import Gptaq

    return Gptaq.model_validate(weights.model_dump())


def test_a_corrected_head_makes_up_for_what_the_blocks_lost(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    weights = {"weights": {"gptaq": {"group_size": 32, "strength": 1.0, "num_bits": 3}}}
    found = [compressed(tiny_llama, text, tmp_path / str(n), **weights, **kw) for n, kw in enumerate(({}, BOTH))]
    reference, tokens = Model.load(tiny_llama), _tokens(tiny_llama, text)
    with torch.no_grad():
        lost = [float((Model.load(path).forward(tokens) - reference.forward(tokens)).square().mean()) for path in found]
    assert lost[1] < 0.9 * lost[0]


def _tokens(model: Path, text: Path) -> Tensor:
    from deepseek_compress.calibration.tokens import calibration_tokens
    from deepseek_compress.models.tokenizer import load_tokenizer

    return calibration_tokens([text], load_tokenizer(model), 12, 64)


def test_a_tied_table_is_stored_once(tiny_qwen2: Path, text: Path, tmp_path: Path) -> None:
    told: list[str] = []
    out = compressed(tiny_qwen2, text, tmp_path / "out", told, **GPTQ, **BOTH)
    header = open_checkpoint(out).header
    assert "lm_head.weight" not in header.tensors
    assert header.tensors["model.embed_tokens.weight"].encoding == "packed"
    assert any("one table" in line for line in told)
    model = Model.load(out)
    assert torch.equal(model.head, quantized(out, "model.embed_tokens.weight").dequantize())
    alone = compressed(tiny_qwen2, text, tmp_path / "head", told, **GPTQ, head={"num_bits": 8})
    assert open_checkpoint(alone).header.tensors["model.embed_tokens.weight"].encoding == "plain"
    assert any("stays 16-bit" in line for line in told)


def test_without_text_tables_are_rounded_and_weights_may_be_left_alone(
    tiny_llama: Path, text: Path, tmp_path: Path, llama: Path
) -> None:
    out = compressed(tiny_llama, text, tmp_path / "out", embedding={"num_bits": 8}, head={"num_bits": 8})
    same = quantized(llama, "model.embed_tokens.weight"), quantized(out, "model.embed_tokens.weight")
    assert torch.equal(same[0].codes, same[1].codes)
    head = open_checkpoint(tiny_llama).read("lm_head.weight")
    nearest = tables.Head().rounding(128)(head, Statistics())
    assert torch.equal(quantized(out, "lm_head.weight").codes, nearest.codes)
    found = [group["targets"] for group in config(out)["config_groups"].values()]
    assert sorted(name for names in found for name in names) == ["lm_head", "model.embed_tokens"]
    facts = json.loads((out / "dsc_manifest.json").read_text())["facts"]["tables"]
    assert [fact["method"] for fact in facts] == ["rtn", "rtn"]
    assert [fact["bits"] for fact in facts] == [8.125, 8.125]


def test_a_group_of_its_own_without_rounded_inputs(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    out = compressed(
        tiny_llama, text, tmp_path / "out", weights={"rtn": {"num_bits": 8, "symmetric": True}},
        activations={"dynamic": {"num_bits": 8, "granularity": "token"}}, **BOTH,
    )  # fmt: skip
    groups = config(out)["config_groups"].values()
    mine = [group for group in groups if "lm_head" in group["targets"]]
    assert [group["input_activations"] for group in mine] == [None]
    assert mine[0]["format"] == "pack-quantized"
    others = [group for group in groups if "lm_head" not in group["targets"]]
    assert all(group["input_activations"]["dynamic"] for group in others)
    assert "lm_head" not in config(out)["ignore"]
    assert "lm_head" in config(compressed(tiny_llama, text, tmp_path / "plain", **GPTQ))["ignore"]


def test_an_interrupted_run_ends_with_the_same_bytes(
    tiny_llama: Path, text: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(ends: Ends, loop: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Ends, "after", stop)
        with pytest.raises(KeyboardInterrupt):
            compressed(tiny_llama, text, out, **GPTQ, **BOTH)
    compressed(tiny_llama, text, out, **GPTQ, **BOTH)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(quantized(out, name).codes, quantized(llama, name).codes), name
    facts = [json.loads((path / "dsc_manifest.json").read_text())["facts"] for path in (out, llama)]
    assert facts[0] == facts[1]


def test_the_forecast_is_the_output(tiny_llama: Path, llama: Path) -> None:
    header = open_checkpoint(tiny_llama).header
    foreseen = build(Compress, {**GPTQ, **BOTH}, "compress").forecast(header, 12, 64).header
    assert foreseen is not None
    assert foreseen.bytes == open_checkpoint(llama).header.bytes


def test_streamed_evaluation_reads_what_the_runtime_reads(llama: Path, tiny_llama: Path, tmp_path: Path) -> None:
    samples = [divergence.Sample(row.tolist(), 1) for row in TOKENS]
    _, found = divergence.record(Model.load(llama), samples, tmp_path)
    subjects, work = {"llama": Subject(open_checkpoint(llama))}, tmp_path / "work"
    ours = streamed.measure(subjects, samples, work, streamed.NO_LIMITS, lambda done, total, note: None)["llama"]
    torch.testing.assert_close(torch.tensor(ours.nll), torch.tensor(found.nll), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_is_refused_before_anything_is_computed(llama: Path, tiny_llama: Path) -> None:
    def problems(path: Path, **knobs: Any) -> list[DscError]:
        return build(Compress, knobs, "compress").problems(open_checkpoint(path).header)

    assert "128 columns do not divide into groups of 96" in problems(tiny_llama, embedding={"group_size": 96})[0].what
    assert "packed already" in problems(llama, head={"num_bits": 8})[0].what
    assert problems(tiny_llama, **GPTQ, **BOTH) == []
    with pytest.raises(DscError, match="num_bits"):
        build(Compress, {"head": {"num_bits": 4}}, "compress")


def test_targets_pass_tables_through_or_refuse_them(llama: Path, tmp_path: Path) -> None:
    source = open_checkpoint(llama)
    wrong = load("edge-llm")().problems(source.header)
    assert sum("packed; TensorRT-Edge-LLM takes 16 bits" in error.what for error in wrong) == 2
    job = ExportJob({"stage": "export"}, lambda line: None)
    for name in ("onnx", "onnxruntime"):
        target = load(name)(**({"accuracy_level": 0, "embedding_bits": 8} if name == "onnxruntime" else {}))
        assert target.problems(source.header) == []
        facts = target.write(source, tmp_path / name, job).facts
        assert facts["verification"]["holds"], name
    copied = load("compressed-tensors")().write(source, tmp_path / "copy", job).path
    assert torch.equal(quantized(copied, "lm_head.weight").codes, quantized(llama, "lm_head.weight").codes)
    assert config(copied)["config_groups"] == config(llama)["config_groups"]
    plain = load("bf16")().write(source, tmp_path / "bf16", job).path
    assert open_checkpoint(plain).header.tensors["lm_head.weight"].encoding == "plain"


def test_gguf_keeps_the_codes(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from deepseek_compress.export.gguf_tensors import parts_of

    out = compressed(tiny_llama, text, tmp_path / "out", weights={"rtn": {"group_size": 32}}, **BOTH)
    architecture = Architecture.of(open_checkpoint(out))
    kinds = {part.name: part.kind for part in parts_of(architecture.header, architecture.cfg)}
    assert (kinds["token_embd.weight"], kinds["output.weight"]) == ("Q8_0", "Q8_0")


def test_transformers_reads_a_head_beside_symmetric_weights(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    import transformers

    weights = {"rtn": {"group_size": 32, "symmetric": True}}
    out = compressed(tiny_llama, text, tmp_path / "out", weights=weights, head={"num_bits": 8})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        expected, found = theirs(TOKENS).logits, Model.load(out).forward(TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


def test_compressed_tensors_unpacks_both(llama: Path) -> None:
    """transformers 5.23 loads no packed embedding: it initialises a weight that is not there."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    given = QuantizationConfig.model_validate(config(llama))
    (scheme,) = [group for group in given.config_groups.values() if "lm_head" in group.targets]
    checkpoint = open_checkpoint(llama)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        theirs = PackedQuantizationCompressor.decompress(checkpoint.read_raw(name), scheme)["weight"]
        assert torch.equal(theirs, checkpoint.read(name, torch.bfloat16)), name
