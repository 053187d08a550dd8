"""DeepSeek-V4 and V4.1 checkpoints that are not whole or not what they say: one clear line each, from headers alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import v41_layout
from benchmarks.v41_layout import Stored
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture
from tests import v41
from tests.models.conftest import V4_CONFIG

Config, Tensors = dict[str, Any], dict[str, Stored]
Change = Callable[[Config, Tensors], None]
BYTES, POWERS, FP8 = torch.int8, torch.float8_e8m0fnu, torch.float8_e4m3fn


def text(**values: Any) -> Change:
    """Set keys of `text_config`."""
    return lambda config, tensors: config["text_config"].update(values)


def top(**values: Any) -> Change:
    """Set keys of config.json; None removes one."""

    def change(config: Config, tensors: Tensors) -> None:
        for key, value in values.items():
            config[key] = value
            if value is None:
                del config[key]

    return change


def put(name: str, dtype: torch.dtype, *shape: int) -> Change:
    """Store something else under a name."""
    return lambda config, tensors: tensors.update({name: (dtype, shape)})


def drop(*names: str) -> Change:
    """Leave tensors out."""
    return lambda config, tensors: [tensors.pop(name) for name in names] and None


def both(*changes: Change) -> Change:
    def change(config: Config, tensors: Tensors) -> None:
        for one in changes:
            one(config, tensors)

    return change


W1, TABLE = "layers.2.ffn.experts.1.w1", "layers.0.engram.embed"
V41: dict[str, tuple[Change, str]] = {
    "blocks of 128 in the config": (
        lambda config, tensors: config["quantization_config"].update(weight_block_size=[128, 128]),
        "config.json: weight_block_size is 128 x 128, but the scales of",
    ),
    "no quantization_config": (
        top(quantization_config=None),
        "config.json: no quantization_config.weight_block_size, so 128 x 128 is meant, but the scales of",
    ),
    "a block size that is none": (
        lambda config, tensors: config["quantization_config"].update(weight_block_size=[32]),
        "weight_block_size [32] is not two sizes",
    ),
    "a scale in blocks of 128": (
        put("layers.3.attn.wq_a.scale", POWERS, 1, 2),
        "layers.3.attn.wq_a.weight: scale is torch.float8_e8m0fnu [1, 2], not [2, 8]",
    ),
    "the scale of another layer": (
        put("layers.4.attn.wo_b.scale", POWERS, 2, 8),
        "layers.4.attn.wo_b.weight: scale is torch.float8_e8m0fnu [2, 8], not [8, 4]",
    ),
    "no scale": (drop("layers.4.attn.wo_b.scale"), "layers.4.attn.wo_b.weight: torch.float8_e4m3fn with no"),
    "a scale alone": (drop("layers.4.attn.wo_b.weight"), "layers.4.attn.wo_b.scale: a part without its weight"),
    "no Engram table": (drop(TABLE + ".weight", TABLE + ".scale"), f"{TABLE}.weight: missing from the checkpoint"),
    "an Engram table without scales": (drop(TABLE + ".scale"), f"{TABLE}.weight: torch.float8_e4m3fn with no"),
    "Engram scales of square blocks": (put(TABLE + ".scale", POWERS, 21, 1), f"{TABLE}.weight: scale is"),
    "an Engram table cut short": (
        both(put(TABLE + ".weight", FP8, 600, 32), put(TABLE + ".scale", POWERS, 600, 1)),
        f"{TABLE}.weight: shape (600, 32), config.json asks for (660, 32)",
    ),
    "FP4 cut short": (put(W1 + ".weight", BYTES, 128, 64), f"{W1}.weight: scale is torch.float8_e8m0fnu [128, 8]"),
    "FP4 cut short with its scales": (
        both(put(W1 + ".weight", BYTES, 128, 64), put(W1 + ".scale", POWERS, 128, 4)),
        f"{W1}.weight: shape (128, 128), config.json asks for (128, 256)",
    ),
    "FP4 with a scale for 16": (put(W1 + ".scale", POWERS, 128, 16), f"{W1}.weight: scale is"),
    "FP4 with float scales": (put(W1 + ".scale", torch.float32, 128, 8), f"{W1}.weight: shape (128, 128), config.json"),
    "no text_config": (top(text_config=None), "config.json: text_config is missing"),
    "text_config is a list": (top(text_config=[1]), "config.json: text_config is '[1]'"),
    "an unknown tensor": (put("layers.3.attn.rotary", torch.float32, 4), "layers.3.attn.rotary: not a tensor of"),
    "V4's head of the streams": (put("hc_head_fn", torch.float32, 4, 1024), "hc_head_fn: not a tensor of this model"),
    "a gate where entries are of one token": (
        put("layers.3.attn.compressor.wgate.weight", torch.bfloat16, 64, 256),
        "layers.3.attn.compressor.wgate.weight: not a tensor of this model",
    ),
    "sources out of range": (text(kv_source_layer_ids=[1, 6]), "config.json: kv_source_layer_ids [1, 6]; its numbers"),
    "sources out of order": (text(index_source_layer_ids=[3, 1, 5]), "config.json: index_source_layer_ids [3, 1, 5]"),
    "a source that is a word": (text(kv_source_layer_ids=["1"]), "config.json: kv_source_layer_ids is"),
    "a source without entries": (text(kv_source_layer_ids=[0, 1, 3]), "blocks [0] are sources with compress_ratios 0"),
    "nobody chose": (text(index_source_layer_ids=[3, 5]), "blocks [1, 2] read entries of which nobody chose"),
    "a candidate source that does not choose": (
        text(candidate_source_layer_id=4),
        "config.json: candidate_source_layer_id 4",
    ),
    "fewer candidates than are chosen": (
        text(candidate_topk_blocks=1),
        "config.json: candidate_topk_blocks 1 of 4 hold fewer than index_topk 8",
    ),
    "ratios of V4": (text(compress_ratios=[0, 4, 4, 128, 128, 128]), "config.json: compress_ratios has [4, 128]"),
    "ratios of other blocks": (text(compress_ratios=[0, 2, 2]), "config.json: compress_ratios [0, 2, 2] for 6 blocks"),
    "Engram of a block that is not there": (text(engram_layer_ids=[0, 9]), "config.json: engram_layer_ids [0, 9]"),
    "Engram rows that no hash reaches": (
        text(engram_num_embeddings=[660, 865]),
        "config.json: engram_num_embeddings of block 1 is 865, its hashes reach 864",
    ),
    "Engram rows of one block": (text(engram_num_embeddings=[660]), "config.json: engram_num_embeddings [660] for"),
    "primes that take forever": (text(engram_vocab_size=1 << 47), "config.json: engram_vocab_size is"),
    "heads that do not divide": (text(o_groups=3), "config.json: 4 heads in o_groups 3"),
    "blocks routed by token id": (text(num_hash_layers=3), "config.json: num_hash_layers"),
    "drafts of unknown inputs": (
        text(num_nextn_predict_layers=1, dspark_target_layer_ids=None),
        "config.json: dspark_target_layer_ids is 'None'",
    ),
    "a part of the drafts": (drop("mtp.0.main_norm.weight"), "mtp.0.main_norm.weight: missing from the checkpoint"),
    "a part of the images": (drop("aligner.w2.bias"), "aligner.w2.bias: missing from the checkpoint"),
    "no bias of the router": (drop("layers.5.ffn.gate.bias"), "layers.5.ffn.gate.bias: missing from the checkpoint"),
    "another family": (top(model_type="deepseek_v42"), "config.json: model_type 'deepseek_v42' is not supported"),
}  # fmt: skip
V4: dict[str, tuple[Change, str]] = {
    "FP4 cut short": (put("layers.2.ffn.experts.1.w1.weight", BYTES, 64, 32), "experts.1.w1.weight: scale is"),
    "no table of token ids": (drop("layers.0.ffn.gate.tid2eid"), "layers.0.ffn.gate.tid2eid: missing from"),
    "no positions of a compressor": (drop("layers.1.attn.compressor.ape"), "layers.1.attn.compressor.ape: missing"),
    "V4.1's second bias": (put("layers.1.ffn.gate.bias_vl", torch.float32, 8), "gate.bias_vl: not a tensor"),
    "the scale of another layer": (put("layers.1.attn.wq_b.scale", POWERS, 4, 1), "attn.wq_b.weight: scale is"),
    "kinds of attention that nobody knows": (top(layer_types=["full_attention"] * 5), "unknown kinds: full_attention"),
}  # fmt: skip


def problems(out: Path, config: Config, tensors: Tensors) -> list[str]:
    """What a command says at its door."""
    v41_layout.write_header(out / "model.safetensors", tensors)
    (out / "config.json").write_text(json.dumps(config))
    try:
        return [str(problem) for problem in Architecture.of(open_checkpoint(out)).problems()]
    except DscError as error:
        return [str(problem) for problem in getattr(error, "problems", [error])]


@pytest.fixture(scope="module")
def tiny() -> tuple[Config, Tensors]:
    config = v41.config(drafts=True, vision=True)
    return config, v41_layout.stored(config)


@pytest.fixture(scope="module")
def tiny_four() -> tuple[Config, Tensors]:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    config = {**V4_CONFIG, "quantization_config": fp8}
    return config, v41_layout.stored(config)


def test_whole_ones_have_no_problems(
    tiny: tuple[Config, Tensors], tiny_four: tuple[Config, Tensors], tmp_path: Path
) -> None:
    for number, (config, tensors) in enumerate((tiny, tiny_four)):
        (tmp_path / str(number)).mkdir()
        assert problems(tmp_path / str(number), config, tensors) == []


@pytest.mark.parametrize("name", V41)
def test_one_clear_line_of_v41(name: str, tiny: tuple[Config, Tensors], tmp_path: Path) -> None:
    check(*V41[name], *tiny, tmp_path)


@pytest.mark.parametrize("name", V4)
def test_one_clear_line_of_v4(name: str, tiny_four: tuple[Config, Tensors], tmp_path: Path) -> None:
    check(*V4[name], *tiny_four, tmp_path)


def check(change: Change, expected: str, config: Config, tensors: Tensors, out: Path) -> None:
    config, tensors = copy.deepcopy(config), dict(tensors)
    change(config, tensors)
    found = problems(out, config, tensors)
    assert len(found) == 1, found
    line = found[0]
    assert expected in line
    assert "\n" not in line and len(line) < 300
    assert "; " in line  # and what to do


def test_a_power_that_is_no_number_is_found_where_its_row_is_read(tmp_path: Path) -> None:
    config = v41.config()
    state = v41.published(config)
    scale = state["layers.1.engram.embed.scale"].view(torch.uint8)
    scale[7] = 255
    source = open_checkpoint(v41.written(tmp_path, config, state))
    name = "layers.1.engram.embed.weight"
    assert source.read_rows(name, torch.tensor([6, 8])).shape == (2, 32)
    with pytest.raises(DscError, match=r"engram\.embed\.weight: 1 of 2 scales are NaN"):
        source.read_rows(name, torch.tensor([6, 7]))
    with pytest.raises(DscError, match="row 864 of 864"):
        source.read_rows(name, torch.tensor([864]))
