"""Layers and kernels of a TensorRT-RTX engine, read from the engine file: no driver, no GPU.

An engine holds its execution plan as text (`descriptors { tensor={... type=int4 ...} } main { function={...}
fully_connected={...} }`), once for the whole graph and once for the body of each product with something fused to it.
It names every kernel, the types it reads and writes, the ONNX nodes it came from and the memory it needs. The format
is not documented; it is that of TensorRT-RTX 1.7.1, and plans of other versions are not read. Which tactic a product
uses is chosen on the GPU and does not stand there.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from deepseek_compress.errors import DscError
from deepseek_compress.export import hazards

_LAUNCH = re.compile(
    r"^  (function|fully_connected|runtime_fusion|library_call)=\{ name=\"?([^\" ]+)\"?(.*?)\}\n", re.M | re.S
)
_TENSOR = re.compile(r"^  tensor=\{(.*?) name=\"([^\"]+)\"(.*?) type=(\w+) \}", re.M)
_VIEW = re.compile(r"^  sub_tensor=\{ base=\"([^\"]+)\".*? name=\"([^\"]+)\".*? type=(\w+) \}", re.M)
_REGION = re.compile(r"^  region = \{ name=(\S+) size=(\d+) .*?type=(\w+) place=(\w+)", re.M)
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_SHAPES = ("int64", "bool")
KNOWN = "1.7.1"


@dataclass(frozen=True)
class Kernel:
    """One launch."""

    kind: str  # function, fully_connected (a product), runtime_fusion (a product with something fused to it)
    name: str
    inputs: tuple[str, ...]  # types, without the shapes
    outputs: tuple[str, ...]
    layers: tuple[str, ...]  # names of the ONNX nodes
    alpha: float | None  # what a product is multiplied with

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices."""
        return self.kind == "fully_connected" or (self.kind == "runtime_fusion" and "Fc" in self.name)


@dataclass(frozen=True)
class Constant:
    """A tensor that the engine carries."""

    name: str
    type: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The plan of one engine."""

    accelerators: tuple[str, ...]  # sm89, ...
    kernels: tuple[Kernel, ...]
    bodies: tuple[Kernel, ...]  # the products inside the fusions
    constants: tuple[Constant, ...]
    scratch_bytes: int  # device memory for values, at the largest shapes of the profile

    def facts(self) -> dict[str, Any]:
        """For a report: kernel launches, products by type, fusions, constants in bytes by type, scratch bytes."""
        products = Counter(f"{' x '.join(k.inputs[:2])} -> {k.outputs[0]}" for k in self.kernels if k.is_product)
        stored: Counter[str] = Counter()
        for constant in self.constants:
            stored[constant.type] += constant.bytes
        return {
            "accelerators": list(self.accelerators),
            "launches": len(self.kernels),
            "products": dict(sorted(products.items())),
            "fusions": dict(sorted(Counter(k.name for k in self.kernels if k.kind == "runtime_fusion").items())),
            "constant_bytes": dict(sorted(stored.items())),
            "unpacking_kernels": sum(1 for k in self.kernels if k.kind == "function" and "int4" in k.inputs),
            "scratch_bytes": self.scratch_bytes,
        }


def read_plan(path: Path) -> Plan:
    """Read the plan of the engine at `path`. Raises `DscError` where there is none that is understood."""
    return parse_plan(path.read_bytes(), str(path))


def parse_plan(engine: bytes, where: str = "engine") -> Plan:
    """`read_plan` for bytes in memory."""
    text = engine.decode("latin1")
    sections = re.split(r"^  accelerators=\{ ?([^}]*?) ?\}", text, flags=re.M)
    if len(sections) < 3:
        raise DscError(f"{where}: no plan text that is understood", f"use tensorrt_rtx {KNOWN}, for which it is known")
    heads, names, parts = sections[0], sections[1::2], sections[2::2]
    main = [(n, p) for n, p in zip(names, parts, strict=True) if n != "*"]
    if len(main) != 1:
        raise DscError(f"{where}: {len(main)} plans in one engine", "build one engine for one group of capabilities")
    accelerators, body = main[0]
    regions = [(name, int(size), kind, place) for name, size, kind, place in _REGION.findall(heads)]
    scratch = sum(size for _, size, kind, place in regions if kind == "user" and place == "accelerator")
    return Plan(
        tuple(accelerators.split()),
        tuple(_kernels(body)),
        tuple(k for n, p in zip(names, parts, strict=True) if n == "*" for k in _kernels(p) if k.is_product),
        tuple(_constants(body)),
        scratch,
    )


def _constants(section: str) -> list[Constant]:
    found = []
    for before, name, after, kind in _TENSOR.findall(section):
        size = re.search(r"const_payload_size=(\d+)", before + after)
        if size:
            found.append(Constant(name, kind, int(size[1])))
    return found


def _kernels(section: str) -> list[Kernel]:
    types = {name: kind for _, name, _, kind in _TENSOR.findall(section)}
    types |= {name: kind for _, name, kind in _VIEW.findall(section)}
    main = re.search(r"^main \{(.*?)^\}", section, re.M | re.S)
    if main is None:
        return []
    kernels = []
    for kind, name, rest in _LAUNCH.findall(main[1]):
        alpha = re.search(r" alpha=([0-9A-F]{8}) ", rest)
        kernels.append(
            Kernel(
                kind,
                name,
                _types(rest, r"input(?:_args)?", types),
                _types(rest, r"output(?:_args)?", types),
                tuple(_LAYER.findall(rest)),
                struct.unpack(">f", bytes.fromhex(alpha[1]))[0] if alpha else None,
            )
        )
    return kernels


def _types(text: str, field: str, types: dict[str, str]) -> tuple[str, ...]:
    group = re.search(rf" {field}=\{{([^}}]*)\}}", text)
    names = re.findall(r'"([^"]+)"', group[1]) if group else []
    known = [types.get(name, "unknown") for name in names]
    return tuple(kind for kind in known if kind not in _SHAPES)


# ---- does the plan do what the graph says?


@dataclass(frozen=True)
class Expected:
    """Operations that the ONNX graph requires."""

    nibble_bytes: int  # 4-bit weights
    integer_products: tuple[str, ...]  # names of MatMul nodes whose two operands are 8-bit


def expected(model: onnx.ModelProto) -> Expected:
    """Read off a model what its engine's plan must show."""
    tensors = model.graph.initializer
    weights4 = [t for t in tensors if t.data_type in (TensorProto.INT4, TensorProto.UINT4)]
    nibble_bytes = 0
    for tensor in weights4:
        count = 1
        for size in tensor.dims:
            count *= size
        nibble_bytes += (count + 1) // 2
    products = hazards.integer_products(model)
    return Expected(nibble_bytes, tuple(products))


def check_plan(plan: Plan, want: Expected) -> list[DscError]:
    """Everything in which the plan falls short: 4-bit weights widened at build time, 8-bit products made in float,
    a scale inside an integer product (where it could belong to another group), a narrow accumulator."""
    problems: list[DscError] = []
    have = sum(c.bytes for c in plan.constants if c.type in ("int4", "uint4"))
    if have < want.nibble_bytes:
        problems.append(
            DscError(
                f"engine keeps {have} of {want.nibble_bytes} bytes of 4-bit weights", "the builder widened the rest"
            )
        )
    integer: set[str] = set()
    for kernel in (*plan.kernels, *plan.bodies):
        if not kernel.is_product:
            continue
        if "int4" in kernel.inputs and "int8" in kernel.inputs:
            problems.append(DscError(f"{kernel.name}: 4-bit blocks meet 8-bit activations in one product"))
        if kernel.inputs[:2] == ("int8", "int8"):
            integer.update(kernel.layers)
            problems += _judge_integer(kernel)
    missing = [name for name in want.integer_products if name not in integer]  # products of one input may be merged
    if missing:
        count = len(want.integer_products)
        problems.append(DscError(f"{len(missing)} of {count} 8-bit products are made in float, the first {missing[0]}"))
    return problems


def _judge_integer(kernel: Kernel) -> list[DscError]:
    problems = []
    if kernel.kind == "fully_connected" and kernel.outputs[0] != "float":
        problems.append(DscError(f"{kernel.name}: an 8-bit product accumulates to {kernel.outputs[0]}", "keep FP32"))
    if kernel.alpha not in (None, 1.0):
        problems.append(DscError(f"{kernel.name}: a scale of {kernel.alpha} inside an integer product"))
    return problems
