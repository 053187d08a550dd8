"""Real engines, built without a GPU, and their plans. One engine a lowering here; all families under `make verify`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.export import plan
from deepseek_compress.export.onnx import export_onnx
from deepseek_compress.export.tensorrt import Range, build_engine

from .conftest import Quantise

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

SMALL: dict[str, Any] = {"batch": Range(1, 2, 2), "new": Range(1, 1, 16), "past": Range(0, 8, 32)}
INTEGER = "int8 x int8 -> float"


class Built(NamedTuple):
    facts: dict[str, Any]
    plan: plan.Plan
    want: plan.Expected

    @property
    def problems(self) -> list[DscError]:
        return plan.check_plan(self.plan, self.want)


def build(source: Path, out: Path, lowering: str = "tensorrt", **knobs: Any) -> Built:
    export_onnx(open_checkpoint(source), out / "model.onnx", lowering, dtype="float16")
    facts = build_engine(out / "model.onnx", out / "model.engine", **{**SMALL, **knobs})
    model = onnx.load(str(out / "model.onnx"), load_external_data=False)
    return Built(facts, plan.read_plan(out / "model.engine"), plan.expected(model))


@pytest.fixture(scope="module")
def engine(tiny_qwen2: Path, quantised: Quantise, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    made: dict[str, Built] = {}

    def get(scheme: str) -> Built:
        if scheme not in made:
            source = tiny_qwen2 if scheme == "f16" else quantised(tiny_qwen2, scheme)
            made[scheme] = build(source, tmp_path_factory.mktemp(scheme))
        return made[scheme]

    return get


def test_float16(engine: Callable[[str], Built]) -> None:
    built = engine("f16")
    facts = built.plan.facts()
    assert built.facts["status"] == "built, not run"
    assert built.facts["bytes"] > facts["constant_bytes"]["half"]
    assert facts["accelerators"] == ["sm89", "sm120"]
    assert set(facts["products"]) == {"half x half -> half"}
    assert facts["scratch_bytes"] > 0
    assert not built.problems
    # our softmax is one kernel a block, with the mask in it
    softmax = [k.name for k in built.plan.kernels if "ExpSumMaxDiv" in k.name or "SubExp" in k.name]
    assert len(softmax) == 2


def test_weights_stay_4_bit_and_are_unpacked_inside_the_product(engine: Callable[[str], Built]) -> None:
    built = engine("w4a16")
    facts = built.plan.facts()
    assert built.want.nibble_bytes == facts["constant_bytes"]["int4"] > 0
    fused = [k for k in built.plan.kernels if k.is_product and "int4" in k.inputs]
    assert len(fused) == 8  # q, k, v are one product, gate and up another: 4 a block
    assert facts["unpacking_kernels"] == 0
    assert not built.problems


def test_4_bit_weights_and_8_bit_activations_meet_in_integers(engine: Callable[[str], Built]) -> None:
    built = engine("w4a8")
    facts = built.plan.facts()
    assert facts["products"][INTEGER] == facts["unpacking_kernels"] == 8
    assert built.want.nibble_bytes == facts["constant_bytes"]["int4"]
    assert len(built.want.integer_products) == 14
    assert all(k.alpha == 1.0 for k in built.plan.kernels if k.inputs[:2] == ("int8", "int8"))
    assert not built.problems


def test_the_products_of_attention_are_integers_around_a_softmax_that_is_not(engine: Callable[[str], Built]) -> None:
    built = engine("w4a8-attention")
    facts = built.plan.facts()
    assert facts["products"][INTEGER] == 8 + 2 * 2  # scores and values of each block
    assert not built.problems


def test_8_bit_weights_and_activations(engine: Callable[[str], Built]) -> None:
    built = engine("w8a8")
    facts = built.plan.facts()
    assert facts["products"][INTEGER] == 8
    assert facts["constant_bytes"]["int8"] == 2 * engine("w4a8").want.nibble_bytes  # the same weights, a byte each
    assert not built.problems


def test_a_plan_that_falls_short_is_told(engine: Callable[[str], Built]) -> None:
    built = engine("w4a8")
    widened = tuple(c if c.type != "int4" else dataclasses.replace(c, type="int8") for c in built.plan.constants)
    (problem,) = plan.check_plan(dataclasses.replace(built.plan, constants=widened), built.want)
    assert "4-bit weights" in problem.what

    def spoiled(**changes: Any) -> list[DscError]:
        first = next(i for i, k in enumerate(built.plan.kernels) if k.inputs[:2] == ("int8", "int8"))
        kernels = list(built.plan.kernels)
        kernels[first] = dataclasses.replace(kernels[first], **changes)
        return plan.check_plan(dataclasses.replace(built.plan, kernels=tuple(kernels)), built.want)

    assert "made in float" in spoiled(inputs=("half", "half"))[0].what
    assert "accumulates to half" in spoiled(outputs=("half",))[0].what
    assert "scale of 0.5" in spoiled(alpha=0.5)[0].what
    assert "4-bit blocks" in spoiled(inputs=("int8", "int4"))[0].what


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"compute_capabilities": ("sm75",)}, "sm75"),
        ({"compute_capabilities": ("sm_999", "sm89")}, "sm999"),
        ({"compute_capabilities": ()}, "no compute capability"),
        ({"target": "tensorrt-magic"}, "unknown builder"),
        ({"past": Range(4, 2, 8)}, "range of past"),
        ({"new": Range(0, 1, 8)}, "range of new"),
    ],
)
def test_what_cannot_be_built_is_said_first(tmp_path: Path, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(DscError, match=message):
        build_engine(tmp_path / "none.onnx", tmp_path / "model.engine", **{**SMALL, **knobs})


def test_a_missing_builder_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DscError, match=r"deepseek-compress\[tensorrt\]"):
        build_engine(tmp_path / "none.onnx", tmp_path / "model.engine", target="tensorrt", **SMALL)


def test_an_operator_that_tensorrt_lacks_is_named(tmp_path: Path, tiny_v2: Path) -> None:
    with pytest.raises(DscError, match="NonZero"):
        build(tiny_v2, tmp_path, lowering="matmulnbits")
    assert not (tmp_path / "model.engine").exists()


def test_a_file_without_a_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.engine").write_bytes(b"\0" * 4096)
    with pytest.raises(DscError, match="no plan"):
        plan.read_plan(tmp_path / "x.engine")


@pytest.mark.verify
@pytest.mark.parametrize("scheme", ["f16", "w4a16", "w4a8", "w4a8-attention", "w8a8"])
@pytest.mark.parametrize("family", ["tiny_v3", "tiny_v2", "tiny_llama"])
def test_every_family_and_lowering(
    tmp_path: Path, request: pytest.FixtureRequest, quantised: Quantise, family: str, scheme: str
) -> None:
    plain: Path = request.getfixturevalue(family)
    built = build(plain if scheme == "f16" else quantised(plain, scheme), tmp_path)
    assert not built.problems
    facts = built.plan.facts()
    assert facts["accelerators"] == ["sm89", "sm120"]
    assert facts["constant_bytes"].get("int4", 0) == built.want.nibble_bytes
