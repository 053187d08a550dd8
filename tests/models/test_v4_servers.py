"""What we write of a DeepSeek-V4 against the lists of vLLM's and SGLang's loaders: each stored tensor by name and type.

The lists were read in vLLM 0.33.0 (models/deepseek_v4, compressed_tensors) and SGLang 0.5.23 (models/deepseek_v4.py).
Neither server runs here. Both map DeepSeek's names to modules; a name that no rule takes, or a form that the module was
not built for, is an error at load, or garbage. MTP blocks are left to draft classes and not judged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.checkpoint.header import module_of, read_shard_header
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress

Types = dict[str, torch.dtype]  # of the parts of a module, by what follows its name
PLAIN = {torch.bfloat16, torch.float16, torch.float32}
INT4 = {"weight_packed": {torch.int32}, "weight_scale": PLAIN, "weight_shape": {torch.int64}}
ASYMMETRIC = INT4 | {"weight_zero_point": {torch.int32}}
MXFP4 = {"weight_packed": {torch.uint8}, "weight_scale": {torch.uint8}}
WEIGHT = {"weight": PLAIN}
FP8 = {"weight": {torch.float8_e4m3fn}, "scale": {torch.float8_e8m0fnu}}  # SGLang asks for this name of the scale
BARE = {"": {torch.float32}}

PACKED = {"weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64}

LINEAR = (WEIGHT, INT4, ASYMMETRIC)
EXPERT = (*LINEAR, MXFP4)
# (module, by its name in the checkpoint; what it may be stored as)
LAYER = r"layers\.\d+\."
MODULES = (
    (r"(embed|head|norm)", (WEIGHT,)),
    (r"hc_head_(fn|base|scale)", (BARE,)),
    (LAYER + r"hc_(attn|ffn)_(fn|base|scale)", (BARE,)),
    (LAYER + r"(attn_norm|ffn_norm|attn\.q_norm|attn\.kv_norm)", (WEIGHT,)),
    (LAYER + r"attn\.attn_sink", (BARE,)),
    (LAYER + r"attn\.(wq_a|wkv|wq_b|wo_b|indexer\.wq_b)", LINEAR),
    (LAYER + r"attn\.wo_a", (WEIGHT, FP8)),  # read by an einsum of its own: never packed
    (LAYER + r"attn\.(indexer\.)?compressor\.(wkv|wgate|norm)", (WEIGHT,)),  # built without quantisation
    (LAYER + r"attn\.indexer\.weights_proj", (WEIGHT,)),
    (LAYER + r"attn\.(indexer\.)?compressor\.ape", (BARE,)),
    (LAYER + r"ffn\.gate", (WEIGHT | {"bias": {torch.float32}}, WEIGHT | {"tid2eid": {torch.int32, torch.int64}})),
    (LAYER + r"ffn\.shared_experts\.w[123]", LINEAR),
    (LAYER + r"ffn\.experts\.\d+\.w[123]", EXPERT),
)  # fmt: skip
FUSED = (  # one parameter each, so one form
    r"(.*attn\.)(wq_a|wkv)",
    r"(.*compressor\.)(wkv|wgate)",
    r"(.*ffn\.shared_experts\.)(w1|w3)",
    r"(.*ffn\.experts\.)\d+\.w[123]",
)
UNQUANTISED = r".*(compressor\.(wkv|wgate)|weights_proj|ffn\.gate|^head|^embed|attn\.wo_a)$"
BARE_NAMES = re.compile(r"(hc_\w+_(fn|base|scale)|\.attn_sink|\.ape)$")


def stored(out: Path) -> dict[str, Types]:
    """Modules of the files in `out` with the types of their parts, as a loader meets them."""
    found: dict[str, Types] = {}
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for file in sorted(set(weight_map.values())):
        tensors, problems = read_shard_header(out / file)
        assert not problems
        for name, place in tensors.items():
            assert weight_map.pop(name) == file
            module, suffix = (name, "") if BARE_NAMES.search(name) else module_of(name)
            found.setdefault(module, {})[suffix] = place.dtype
    assert not weight_map
    return {module: parts for module, parts in found.items() if not module.startswith("mtp.")}


def refused(modules: dict[str, Types], quantization: dict[str, Any]) -> Iterator[str]:
    """Why a loader would refuse them: one line each."""
    forms: dict[str, set[str]] = {}
    for module, parts in modules.items():
        rules = [allowed for pattern, allowed in MODULES if re.fullmatch(pattern, module)]
        if len(rules) != 1:
            yield f"{module}: taken by {len(rules)} rules"
        elif not any(parts.keys() == form.keys() and all(parts[k] in form[k] for k in form) for form in rules[0]):
            yield f"{module}: stored as {parts}"
        for pattern in FUSED:
            if match := re.fullmatch(pattern, module):
                forms.setdefault(pattern + match[1], set()).add(str(sorted(parts.items(), key=str)))
        yield from _schemes(module, parts, quantization)
    yield from (f"{key}: {len(each)} forms in one parameter" for key, each in forms.items() if len(each) > 1)


def _schemes(module: str, parts: Types, quantization: dict[str, Any]) -> Iterator[str]:
    """vLLM renames modules, and the plain names of the configuration with them, but no expressions."""
    name = _of_vllm(module)
    ignored = any(_matches(name, rule) for rule in quantization["ignore"])
    groups = [
        group
        for group in quantization["config_groups"].values()
        if not ignored and any(_matches(name, rule) for rule in group["targets"])
    ]
    packed = "weight_packed" in parts
    matrix = re.search(r"(wq|wkv|wo|w[123]|wgate|weights_proj|gate|head|embed)(_[ab])?$", module) and "weight" in parts
    if packed and [group["format"] for group in groups] != [_format(parts)]:
        yield f"{module}: packed, and served as {[group['format'] for group in groups]}"
    if matrix and not ignored:
        yield f"{module}: plain, and not in ignore"
    if re.match(UNQUANTISED, module) and packed:
        yield f"{module}: built without quantisation"


def _format(parts: Types) -> str:
    return "mxfp4-pack-quantized" if parts["weight_packed"] == torch.uint8 else "pack-quantized"


def _of_vllm(name: str) -> str:
    return {"head": "lm_head", "embed": "model.embed_tokens"}.get(name, name if name == "lm_head" else f"model.{name}")


def _matches(name: str, rule: str) -> bool:
    return bool(re.match(rule[3:], name)) if rule.startswith("re:") else _of_vllm(rule) == name


RECIPES: dict[str, dict[str, Any]] = {
    "experts kept": {"weights": {"rtn": {"group_size": 32}}},
    "experts and indexer too": {"weights": {"rtn": {"group_size": 32}}, "requantize": True, "keep": ["router", "norm"]},
    "symmetric": {"weights": {"rtn": {"group_size": 32, "symmetric": True}}},
}


@pytest.fixture(scope="module", params=RECIPES)
def written(request: pytest.FixtureRequest, tiny_v4_published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "out"
    context = Context("compress", out, "", 0, tell=lambda line: None)
    build(Compress, RECIPES[request.param], "compress").run(open_checkpoint(tiny_v4_published), context)
    return out


def quantization_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return found


def test_every_stored_tensor_is_taken(written: Path) -> None:
    modules = stored(written)
    assert len(modules) > 180
    assert list(refused(modules, quantization_of(written))) == []


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        ("layers.1.attn.wo_a", PACKED),
        ("layers.1.attn.compressor.wgate", {"weight": torch.float8_e4m3fn, "scale": torch.float8_e8m0fnu}),
        ("layers.1.attn.wkv", {"weight": torch.bfloat16}),
        ("layers.1.attn.wo_c", {"weight": torch.bfloat16}),
        ("layers.2.ffn.experts.3.w2", {"weight": torch.int8, "scale": torch.float8_e8m0fnu}),
    ],
)  # fmt: skip
def test_what_no_server_reads_is_found(written: Path, module: str, parts: Types) -> None:
    changed = {**stored(written), module: parts}
    assert any(line.startswith((module, *FUSED)) for line in refused(changed, quantization_of(written)))
