"""DeepSeek's tensors in GGUF: latent attention split, experts stacked, types of what keeps and what loses its codes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.export.gguf import export_gguf
from deepseek_compress.export.gguf_blocks import bound, encode, kind_of
from deepseek_compress.export.gguf_metadata import check_model
from deepseek_compress.export.gguf_tensors import Part, parts_of, pieces
from deepseek_compress.models import Architecture
from deepseek_compress.models.config import ModelConfig
from deepseek_compress.numerics import WEIGHTS
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.export import Export

from .conftest import Quantise, write_quantised

HEADS, NOPE, VALUE, RANK = 4, 32, 32, 64  # of the tiny models


def values(path: Path) -> dict[str, tuple[str, Tensor]]:
    """name -> type and values, in our order of dimensions."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        found[tensor.name] = (tensor.tensor_type.name, torch.from_numpy(data))
    return found


def config_of(path: Path) -> ModelConfig:
    return Architecture.of(open_checkpoint(path)).cfg


@pytest.mark.parametrize("scheme", ["w4a16", None])
@pytest.mark.parametrize("family", ["tiny_v2", "tiny_v3"])
def test_latents_are_split_and_experts_stacked(
    tmp_path: Path, request: pytest.FixtureRequest, quantised: Quantise, family: str, scheme: str | None
) -> None:
    folder = request.getfixturevalue(family)
    source = open_checkpoint(quantised(folder, scheme) if scheme else folder)
    facts = export_gguf(source, tmp_path / "model.gguf")
    found, code = values(tmp_path / "model.gguf"), "Q4_1" if scheme else "BF16"
    heads = source.read("model.layers.1.self_attn.kv_b_proj.weight").view(HEADS, NOPE + VALUE, RANK)
    kind, k_b = found["blk.1.attn_k_b.weight"]
    assert (kind, k_b.shape) == ("Q8_0" if scheme else "BF16", (HEADS, RANK, NOPE))
    assert float((k_b - heads[:, :NOPE].mT).abs().max()) <= float(heads.abs().max()) / (100 if scheme else 250)
    kind, v_b = found["blk.1.attn_v_b.weight"]
    assert kind == code
    torch.testing.assert_close(v_b, heads[:, NOPE:], atol=2e-3, rtol=2**-8)
    for projection in ("gate", "up", "down"):
        kind, stack = found[f"blk.2.ffn_{projection}_exps.weight"]
        assert (kind, len(stack)) == (code, 8)
        for expert in range(8):
            name = f"model.layers.2.mlp.experts.{expert}.{projection}_proj.weight"
            packed = source.read_quantized(name)
            limit = bound(packed) * (1 + 1e-5) if packed else source.read(name).abs() * 2**-8
            assert ((stack[expert] - source.read(name)).abs() <= limit).all(), name
    assert found["blk.2.ffn_gate_inp.weight"][0] == "F32"
    if family == "tiny_v3":
        kind, bias = found["blk.2.exp_probs_b.bias"]
        assert kind == "F32" and torch.equal(
            bias, source.read("model.layers.2.mlp.gate.e_score_correction_bias").float()
        )
    assert not [name for name in found if "kv_b" in name]
    assert facts["recoded"] == (3 if scheme else 0)  # k_b of each block


def test_mixed_experts_share_a_type_and_odd_codes_become_q8_0(
    tmp_path: Path, tiny_v2: Path, quantised: Quantise
) -> None:
    source = open_checkpoint(quantised(tiny_v2, "w4a16"))
    cfg = Architecture.of(source).cfg
    plain = open_checkpoint(tiny_v2).header.tensors
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    mixed = dataclasses.replace(source.header, tensors={**source.header.tensors, name: plain[name]})
    (stack,) = (part for part in parts_of(mixed, cfg) if part.name == "blk.1.ffn_up_exps.weight")
    assert (stack.kind, stack.recoded, stack.shape) == ("Q8_0", True, (8, 64, 128))
    assert "BF16" in {part.kind for part in parts_of(open_checkpoint(tiny_v2).header, cfg)}
    info = source.header.tensors["model.layers.0.self_attn.o_proj.weight"]
    assert kind_of(info) == "Q4_1"


def test_groups_without_a_type_keep_their_values(
    tmp_path: Path, tiny_v2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = WEIGHTS["rtn"](num_bits=4, group_size=16)
    monkeypatch.setattr("tests.export.conftest.WEIGHTS", {"rtn": lambda **_: narrow})
    source = open_checkpoint(write_quantised(tiny_v2, tmp_path / "g16", "w4a16"))
    told: list[str] = []
    context = Context(name="export", out=tmp_path / "out", recipe_text="", seed=0, tell=told.append)
    facts = Export.model_validate({"target": "gguf"}).run(source, context).facts
    assert set(facts["types"]) == {"Q8_0", "BF16", "F32"}
    assert f"{facts['recoded']} packed tensors have no GGUF type" in told[0]
    kind, found = values(tmp_path / "out" / "model.gguf")["blk.0.attn_output.weight"]
    want = source.read("model.layers.0.self_attn.o_proj.weight")
    assert kind == "Q8_0"
    torch.testing.assert_close(found, want, atol=float(want.abs().max()) / 200, rtol=0)


def test_vectors_change_places_by_element(tiny_qwen2: Path) -> None:
    """A bias of 4 bytes an element moves as its matrix does."""
    source = open_checkpoint(tiny_qwen2)
    info = source.header.tensors["model.layers.0.self_attn.k_proj.bias"]
    rows = np.arange(info.shape[0])[::-1]
    (data,) = pieces(source, Part("x", (info,), info.shape, "F32", rows))
    assert torch.equal(
        torch.from_numpy(data.reshape(-1).view(np.float32).copy()), source.read(info.name).float().flip(0)
    )
    assert encode(torch.ones(3, 33), "BF16").shape == (3, 66)


def test_what_llama_cpp_must_know_of_latents_and_experts(tmp_path: Path, tiny_v3: Path, tiny_v2: Path) -> None:
    """yarn's log multiplier is stored as a tenth; a model without query latents says rank 0."""
    export_gguf(open_checkpoint(tiny_v3), tmp_path / "3.gguf")
    export_gguf(open_checkpoint(tiny_v2), tmp_path / "2.gguf")
    v3, v2 = (gguf.GGUFReader(tmp_path / name).fields for name in ("3.gguf", "2.gguf"))
    wanted = {
        "attention.head_count_kv": 1, "attention.key_length": 96, "attention.value_length": 64,
        "attention.key_length_mla": 64, "attention.value_length_mla": 32, "attention.kv_lora_rank": 64,
        "attention.q_lora_rank": 96, "leading_dense_block_count": 1, "expert_feed_forward_length": 64,
        "expert_count": 8, "expert_used_count": 2, "expert_shared_count": 1, "expert_weights_scale": 2.5,
        "expert_weights_norm": True, "expert_gating_func": 2, "expert_group_count": 4, "expert_group_used_count": 2,
        "rope.dimension_count": 32, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }  # fmt: skip
    assert v3["general.architecture"].contents() == "deepseek2"
    assert {key: v3[f"deepseek2.{key}"].contents() for key in wanted} == wanted
    assert v3["deepseek2.rope.scaling.yarn_log_multiplier"].contents() == pytest.approx(0.1)
    lite = {"attention.q_lora_rank": 0, "expert_gating_func": 1, "expert_weights_norm": False, "expert_used_count": 3}
    assert {key: v2[f"deepseek2.{key}"].contents() for key in lite} == lite
    assert v2["deepseek2.rope.scaling.yarn_log_multiplier"].contents() == pytest.approx(0.0707)
    assert "deepseek2.expert_group_count" not in v2
    assert v2["tokenizer.ggml.model"].contents() == "t5"  # whole words as a unigram model
    assert v2["tokenizer.ggml.tokens"].contents()[:5] == ["<pad>", "<bos>", "<eos>", "<unk>", "▁<think>"]
    assert v2["tokenizer.ggml.token_type"].contents()[:5] == [3, 3, 3, 2, 1]


def test_what_llama_cpp_computes_otherwise_is_refused(tiny_v2: Path, tiny_v3: Path) -> None:
    cfg = config_of(tiny_v3)
    assert cfg.moe is not None and not check_model(cfg) and not check_model(config_of(tiny_v2))
    rope, moe = cfg.rope, cfg.moe
    changes = {
        "yarn with its own": {"rope": dataclasses.replace(rope, mscale=0.7)},
        "linear rotary": {"rope": dataclasses.replace(rope, kind="linear")},
        "rope_interleave": {"rope": dataclasses.replace(rope, interleaved=False)},
        "rms_norm_eps 1e-05": {"rms_norm_eps": 1e-5},
        "a bias": {"o_bias": True},
        "27 blocks": {"num_hidden_layers": 27},
        "moe_layer_freq 2": {"moe": dataclasses.replace(moe, layer_freq=2)},
        "group_limited_greedy": {"moe": dataclasses.replace(moe, method="group_limited_greedy")},
        "without shared": {"moe": dataclasses.replace(moe, shared=0)},
    }
    for words, change in changes.items():
        (problem,) = check_model(dataclasses.replace(cfg, **change))  # type: ignore[arg-type]
        assert isinstance(problem, DscError) and words in problem.what, words
