"""The multi-token prediction block of V3: whole or not at all, kept in 16 bits or dropped, and said so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.checkpoint.formats.fp8 import encode_fp8_block
from deepseek_compress.models.families.table import family_of
from deepseek_compress.models.runtime import Model
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress

TOKENS = torch.randint(2, 512, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def with_mtp(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_v3` with the block after the last one that predicts a second token, FP8 as published."""
    out = tmp_path_factory.mktemp("mtp") / "model"
    shutil.copytree(tiny_v3, out)
    config = json.loads((out / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (out / "config.json").write_text(json.dumps(config))
    family, generator = family_of(config), torch.Generator().manual_seed(3)
    state: dict[str, Tensor] = {}
    for name, shape in family.mtp_tensors(family.parse(config)).items():
        weight = 0.1 * torch.randn(shape, generator=generator)
        if re.search(r"(self_attn|mlp)\..*_(proj|proj_with_mqa)\.weight$", name):
            state[name], state[name + "_scale_inv"] = encode_fp8_block(weight)
        else:
            state[name] = weight if name.endswith("bias") else weight.bfloat16()
    save_file(state, out / "model-mtp.safetensors")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(state, "model-mtp.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def compress(model: Path, out: Path, told: list[str], **knobs: object) -> Path:
    stage = Compress.model_validate({"weights": {"rtn": {"group_size": 32}}, **knobs})
    source = open_checkpoint(model)
    assert stage.problems(source.header) == []
    stage.run(source, Context("compress", out, "", 0, tell=told.append))
    return out


def test_kept_it_has_16_bits_and_is_ignored_by_servers(with_mtp: Path, tmp_path: Path) -> None:
    told: list[str] = []
    before, after = open_checkpoint(with_mtp), open_checkpoint(compress(with_mtp, tmp_path / "kept", told))
    assert "MTP block kept in 16 bits" in told
    assert after.config["num_nextn_predict_layers"] == 1
    names = [name for name in before.header.tensors if name.startswith("model.layers.3.")]
    assert len(names) > 40
    ignored = after.config["quantization_config"]["ignore"]
    for name in names:
        info = after.header.tensors[name]
        assert info.encoding == "plain"
        assert torch.equal(after.read(name, torch.bfloat16), before.read(name, torch.bfloat16))
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            assert any(module == rule or re.match(rule.removeprefix("re:"), module) for rule in ignored), module


def test_dropped_nothing_of_it_is_left(with_mtp: Path, tmp_path: Path) -> None:
    told: list[str] = []
    after = open_checkpoint(compress(with_mtp, tmp_path / "dropped", told, mtp="drop"))
    assert "MTP block left out" in told
    assert after.config["num_nextn_predict_layers"] == 0
    assert not [name for name in after.header.tensors if name.startswith("model.layers.3.")]


def test_it_changes_no_logits(with_mtp: Path, tiny_v3: Path) -> None:
    assert torch.equal(Model.load(with_mtp).forward(TOKENS), Model.load(tiny_v3).forward(TOKENS))


def test_half_of_it_is_an_error_that_names_what_is_missing(with_mtp: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(with_mtp, broken)
    state = load_file(broken / "model-mtp.safetensors")
    del state["model.layers.3.eh_proj.weight"]
    save_file(state, broken / "model-mtp.safetensors")
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.3.eh_proj.weight"]
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    header = open_checkpoint(broken).header
    problems = family_of(header.config).problems(header)
    assert [problem.what for problem in problems] == ["model.layers.3.eh_proj.weight: missing from the checkpoint"]
