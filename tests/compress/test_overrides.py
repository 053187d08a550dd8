"""Overrides: which modules they mean, what they refuse, and the checkpoint that comes out."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.checkpoint.header import stored_name
from deepseek_compress.checkpoint.quantization_config import matches
from deepseek_compress.compress.fused_groups import fused_groups
from deepseek_compress.compress.overrides import Override, Scheme, assigned
from deepseek_compress.compress.selection import CHANGEABLE, select
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture, Role
from deepseek_compress.numerics import WEIGHTS, Statistics
from deepseek_compress.pipeline import Options, plan, run
from deepseek_compress.recipe import parse_recipe
from tests.conftest import QWEN2_CONFIG, V2_CONFIG, V3_CONFIG, shape_of

ROLES = frozenset(CHANGEABLE) - {Role.INDEXER}
OVERRIDES = """
        - {modules: "model.layers.*.self_attn.*", num_bits: 8}
        - {modules: ["model.layers.1.mlp.experts.*", "model.layers.1.mlp.shared_experts.down_proj"], num_bits: 3}
        - {modules: "re:model.*2.mlp.(shared_)?experts", num_bits: 2, group_size: 16}
        - {modules: "*.o_proj", keep: true}
        - {modules: "model.layers.0.self_attn.o_proj", num_bits: 6, symmetric: true}
"""
RECIPE = """
calibration: {{sources: [builtin], samples: 8, length: 64}}
stages:
  - compress:
      weights: {{{method}: {{num_bits: 4, group_size: 32}}}}
      overrides:{overrides}
"""


def expected(name: str) -> tuple[int, int, bool] | None:
    """(bits, group size, symmetric) of a module of tiny_v3 under OVERRIDES; None: kept. Written out by hand."""
    if name.endswith("o_proj"):
        return (6, 32, True) if ".0." in name else None
    if "self_attn" in name:
        return 8, 32, False
    if ".1.mlp.experts." in name or name.endswith("1.mlp.shared_experts.down_proj"):
        return 3, 32, False
    return (2, 16, False) if ".2.mlp." in name else (4, 32, False)


def recipe(model: Path, method: str, overrides: str = OVERRIDES) -> Any:
    return parse_recipe(f"model: {model}\n" + RECIPE.format(method=method, overrides=overrides), "mixed.yaml")


def refused(model: Path, overrides: str, method: str = "rtn") -> str:
    return "\n".join(map(str, plan(recipe(model, method, overrides)).problems))


def stored_parts(checkpoint: Any, name: str) -> dict[str, torch.Tensor]:
    found = {}
    for suffix, place in checkpoint.header.tensors[name].parts.items():
        with safe_open(place.file, "pt") as file:
            found[suffix] = file.get_tensor(stored_name(name, suffix))
    return found


@pytest.fixture(scope="module", params=["rtn", "gptq"])
def mixed(request: pytest.FixtureRequest, tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("mixed") / request.param
    run(recipe(tiny_v3, request.param), out, Options(workers=1), flat=True)
    return request.param, out


def test_each_weight_is_stored_as_the_last_match_says(mixed: tuple[str, Path], tiny_v3: Path) -> None:
    method, out = mixed
    done, source = open_checkpoint(out), open_checkpoint(tiny_v3)
    for name, _ in Architecture.of(done).linears(ROLES):
        found, wanted = done.read_quantized(name + ".weight"), expected(name)
        if wanted is None:
            assert torch.equal(done.read(name + ".weight", None), source.read(name + ".weight", torch.bfloat16))
            continue
        assert found is not None
        assert (found.num_bits, found.group_size, found.symmetric) == wanted, name
        if method == "rtn":  # the kernel's four bits and the others are those of the method alone
            rounding = WEIGHTS["rtn"](num_bits=wanted[0], group_size=wanted[1], symmetric=wanted[2])
            alone = rounding(source.read(name + ".weight"), Statistics())
            assert torch.equal(found.codes, alone.codes), name
            assert torch.equal(found.scale, alone.scale)
            assert torch.equal(found.zero_point, alone.zero_point)
    facts = json.loads((out / "dsc_manifest.json").read_text())["facts"]
    assert facts["bits_per_weight"] == pytest.approx(_bits(Architecture.of(done)), rel=1e-12)
    assert "8 bits, group_size 32, asymmetric: 12 linears, by overrides" in facts["decisions"]


def _bits(architecture: Architecture) -> float:
    """The mean over the linears that change, from their definitions."""
    total = cost = 0.0
    for name, linear in architecture.linears(ROLES):
        wanted = expected(name)
        if wanted is not None:
            size = linear.rows * linear.columns
            total += size
            cost += size * (wanted[0] + (16 + (0 if wanted[2] else wanted[0])) / wanted[1])
    return cost / total


def test_compressed_tensors_decodes_each_group_as_we_do(mixed: tuple[str, Path]) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    done = open_checkpoint(mixed[1])
    config = QuantizationConfig.model_validate(done.config["quantization_config"])
    assert len(config.config_groups) == 5
    packed = [name for name, info in done.header.tensors.items() if info.encoding == "packed"]
    for name in packed:
        module = name.removesuffix(".weight")
        groups = [g for g in config.config_groups.values() if any(matches(module, target) for target in g.targets)]
        assert len(groups) == 1, f"{module} is in {len(groups)} groups"
        assert not any(matches(module, pattern) for pattern in config.ignore)
        theirs = PackedQuantizationCompressor.decompress(stored_parts(done, name), groups[0])["weight"]
        assert torch.equal(theirs, done.read(name, torch.bfloat16)), name
    assert all(any(matches(f"model.layers.{n}.self_attn.o_proj", p) for p in config.ignore) for n in (1, 2))


def test_what_engines_fuse_is_in_one_group(mixed: tuple[str, Path]) -> None:
    done = open_checkpoint(mixed[1])
    groups = done.config["quantization_config"]["config_groups"].items()
    for group in fused_groups(Architecture.of(done), ROLES):
        found = {tuple(k for k, g in groups if any(matches(name, t) for t in g["targets"])) for name in group.names}
        assert len(found) == 1, group.label


def test_two_workers_write_the_same_bytes_and_the_plan_their_number(
    mixed: tuple[str, Path], tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, alone = mixed
    wanted = recipe(tiny_v3, method)
    run(wanted, tmp_path / "two", Options(workers=2), flat=True)
    files = [file.name for file in sorted(alone.iterdir()) if file.is_file() and file.name != "dsc_run.json"]
    assert len(files) > 8
    for name in files:
        assert (alone / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    tensors = sum(info.bytes for info in open_checkpoint(alone).header.tensors.values())
    assert plan(wanted).bytes == tensors


def test_options_still_change_what_overrides_leave_open(tiny_v3: Path) -> None:
    from deepseek_compress.recipe import Changes

    text = f"model: {tiny_v3}\n" + RECIPE.format(method="rtn", overrides=OVERRIDES)
    changes = Changes(["compress.overrides.1.num_bits=5", "weights.rtn.symmetric=true"], group_size=64)
    stage = parse_recipe(text, "mixed.yaml", changes).steps[0].stage
    chosen = select(shape_of(V3_CONFIG), stage.roles, stage.weights, stage.overrides)  # type: ignore[attr-defined]
    found = {n: chosen.own[f"model.layers.{n}"] for n in ("1.mlp.experts.3.up_proj", "2.mlp.experts.0.up_proj")}
    assert [(q.num_bits, q.group_size, q.symmetric) for q in found.values() if q] == [(5, 64, True), (2, 16, True)]


def test_every_mistake_is_told_with_what_to_do(tiny_v3: Path) -> None:
    assert "did you mean model.layers.0.self_attn" in refused(
        tiny_v3, '\n        - {modules: "*.0.self_atn.*", keep: true}'
    )
    told = refused(tiny_v3, '\n        - {modules: ["*.q_a_proj", "*.layers.1.mlp.experts.3.*"], num_bits: 8}')
    assert "model.layers.0.self_attn.q_a_proj (8 bits, group_size 32, asymmetric) and model.layers.0.self_attn." in told
    assert "in 3 more places" in told  # the other two blocks, and the experts of one
    fits = refused(tiny_v3, '\n        - {modules: "*.mlp.down_proj", group_size: 96}')
    assert "320 columns do not divide into groups of 96; set group_size: 64" in fits
    assert "matches no weight that changes" in refused(tiny_v3, '\n        - {modules: "lm_head", num_bits: 8}')
    for line, what in (
        ("{modules: a, numbits: 3}", "mixed.yaml:8: overrides.0: unknown knob 'numbits'; did you mean 'num_bits'?"),
        ("{modules: a, num_bits: 9}", "mixed.yaml:8: overrides.0.num_bits"),
        ("{modules: a, num_bits: 3, keep: true}", "keep: true with num_bits"),
        ("{modules: a}", "changes nothing"),
        ('{modules: "re:(", num_bits: 3}', "overrides.0: '(': missing )"),
        ("{num_bits: 3}", "overrides.0.modules: missing"),
    ):
        with pytest.raises(DscError, match=re.escape(what)):
            recipe(tiny_v3, "rtn", "\n        - " + line)
    alone = parse_recipe(
        f"model: {tiny_v3}\nstages:\n  - compress: {{sparsity: magnitude, overrides: [{{modules: a, keep: true}}]}}",
        "r",
    )
    assert "overrides without weights" in str(plan(alone).problems[0])


@given(
    st.lists(
        st.tuples(st.sampled_from(["*.q_proj", "a.*.mlp.*", "a.1.q_proj", "re:a.1", "*[01].v?"]), st.integers(2, 8))
    )
)
def test_the_last_match_decides(entries: list[tuple[str, int]]) -> None:
    """Against one pattern at a time, by the library's own function."""
    names = ["a.0.q_proj", "a.1.q_proj", "a.10.q_proj", "a.0.mlp.up", "a.1.vx", "b.1.mlp"]
    weights = WEIGHTS["rtn"](num_bits=4, group_size=32)
    found = assigned([Override(modules=(p,), num_bits=bits) for p, bits in entries], names, weights)
    for name in names:
        hits = [b for p, b in entries if (re.match(p[3:], name) if p.startswith("re:") else fnmatchcase(name, p))]
        mine = found.get(name)
        assert (None if mine is None else mine.num_bits) == (hits[-1] if hits else None)


@pytest.mark.parametrize("config", [V3_CONFIG, V2_CONFIG, QWEN2_CONFIG], ids=["v3", "v2", "qwen2"])
def test_units_cover_each_linear_once_and_their_patterns_mean_them(config: dict[str, Any]) -> None:
    architecture = shape_of(config)
    names = [name for name, _ in architecture.linears(ROLES)]
    found = fused_groups(architecture, ROLES)
    assert sorted(name for group in found for name in group.names) == sorted(names)
    for group in found:
        meant = assigned([Override(modules=tuple(group.patterns), num_bits=3)], names, WEIGHTS["rtn"]())
        assert list(meant) == [name for name in names if name in set(group.names)]
    assert len({group.label for group in found}) == len(found)
    if config is QWEN2_CONFIG:
        assert found[0].label == "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    if config is V3_CONFIG:
        labels = [group.label for group in found if group.block.layer == 1]
        assert "model.layers.1.self_attn.q_a_proj+kv_a_proj_with_mqa" in labels
        assert "model.layers.1.mlp.experts" in labels


def test_the_open_group_size_is_chosen_over_what_is_left_open() -> None:
    """V2's dense down_proj (352 columns) lets 32 through only; with a size of its own, the others get 64."""
    weights = WEIGHTS["rtn"]()
    assert select(shape_of(V2_CONFIG), ROLES, weights).group_size == 32
    own = Override(modules=("model.layers.0.mlp.down_proj",), group_size=32)
    assert select(shape_of(V2_CONFIG), ROLES, weights, [own]).group_size == 64
    assert str(Scheme(num_bits=3, group_size=32)) == "3 bits, group_size 32"
