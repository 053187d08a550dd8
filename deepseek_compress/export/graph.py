"""A small ONNX graph builder: pure nodes are shared, large tensors go straight to the external data file.

`Graph` holds node and tensor descriptions only; the bytes of a weight are appended to `NAME.onnx.data` the moment they
are given and are not kept, so that the peak memory of an export is near the largest single tensor. A node with the same
operator, inputs and attributes as an earlier one is that earlier one (every operator used here is pure), which is what
shares the rotary table, the quantised activations and the group sums between the linears that read the same input.

Left out: shape inference, optimisation (the run-times do both) and control flow.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from deepseek_compress.checkpoint.files import remove
from deepseek_compress.errors import DscError, raise_problems
from deepseek_compress.export import hazards

Array = NDArray[Any]

OPSET = 21  # the first with 4-bit tensors and block-wise DequantizeLinear
IR_VERSION = 10
DOMAIN = "deepseek_compress"
CONTRIB = "com.microsoft"
INLINE_BYTES = 256  # smaller tensors stay in the .onnx file
PAGE = 4096  # tensors of 64 KiB and more start on a page so that run-times can map them; smaller ones on 64 bytes

FLOATS = {
    "float32": (TensorProto.FLOAT, np.dtype(np.float32)),
    "float16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bfloat16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}


def pack_nibbles(codes: Array) -> bytes:
    """4-bit values (any integer array, two's complement or unsigned) -> bytes, the even element in the low nibble."""
    flat = codes.reshape(-1).astype(np.uint8) & 0x0F
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] | (flat[1::2] << 4)).tobytes()


class Graph:
    """Collects one ONNX model. Use as a context manager; `save()` is the last call, leaving without it leaves nothing.

    `dtype` is the float type of activations: float32, float16 or bfloat16.
    """

    def __init__(self, path: Path, dtype: str = "float32") -> None:
        if dtype not in FLOATS:
            raise DscError(f"unknown float type {dtype!r}", f"use one of {', '.join(FLOATS)}")
        self.path = path
        self.dtype = dtype
        self.elem_type, self.numpy = FLOATS[dtype]
        self.data_path = path.with_name(path.name + ".data")
        self._partial = path.with_name(path.name + ".data.partial")
        self._data = self._partial.open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._functions: dict[str, onnx.FunctionProto] = {}
        self._domains = {"": OPSET}
        self._known: dict[Any, list[str]] = {}
        self._scope = ""
        self._names: dict[str, int] = {}
        self.bytes = 0  # of both files, once saved

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._data.close()
        remove(self._partial)

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Node names inside start with `name/`, which is a whole name: an inner scope replaces the outer one."""
        outer, self._scope = self._scope, f"{name}/"
        try:
            yield
        finally:
            self._scope = outer

    # ---- nodes

    def op(self, kind: str, *inputs: str, domain: str = "", named: str = "", **attributes: Any) -> str:
        """Add a node with one output and return the output's name, `named` where that is given."""
        return self.ops(kind, *inputs, count=1, domain=domain, named=(named,), **attributes)[0]

    def ops(
        self, kind: str, *inputs: str, count: int, domain: str = "", named: Sequence[str] = (), **attributes: Any
    ) -> list[str]:
        """Add a node with `count` outputs, or return the outputs of the equal node that is already there.

        `named`: names for the first outputs, empty for a name of the builder's choice.
        """
        key = (kind, domain, inputs, count, repr(sorted(attributes.items())))
        if any(named) or key not in self._known:
            name = self._unique(self._scope + kind)
            outputs = [name] if count == 1 else [f"{name}:{i}" for i in range(count)]
            outputs[: len(named)] = [given or own for given, own in zip(named, outputs, strict=False)]
            self._nodes.append(helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes))
            self._domains.setdefault(domain, 1)
            self._known[key] = outputs
        return self._known[key]

    def function(self, function: onnx.FunctionProto) -> None:
        """Register a model-local function; a second one of the same name must be the same."""
        known = self._functions.setdefault(function.name, function)
        if known.SerializeToString() != function.SerializeToString():
            raise ValueError(f"two different functions named {function.name}")
        self._domains.setdefault(function.domain, 1)

    def input(self, name: str, elem_type: int, shape: Sequence[int | str]) -> str:
        """Declare a graph input; strings in `shape` are dynamic dimensions."""
        self._inputs.append(helper.make_tensor_value_info(name, elem_type, shape))
        return name

    def output(self, name: str, elem_type: int, shape: Sequence[int | str], first: bool = False) -> str:
        """Declare the value `name` (its node was `named` so) a graph output; `first` puts it before the others."""
        info = helper.make_tensor_value_info(name, elem_type, shape)
        self._outputs.insert(0 if first else len(self._outputs), info)
        return name

    # ---- tensors

    def ints(self, *values: int) -> str:
        """Return an int64 vector."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float, dtype: Any = None) -> str:
        """Return a scalar in the graph's float type, or in `dtype`."""
        return self.constant(np.array(value, self.numpy if dtype is None else dtype))

    def constant(self, value: Array) -> str:
        """Return a small tensor without a name of its own; equal ones are shared."""
        digest = hashlib.blake2s(value.tobytes(), digest_size=6).hexdigest()
        name = f"constant/{value.dtype}{list(value.shape)}/{digest}".replace(" ", "")
        if name not in self._initializers:
            self.weight(name, value)
        return name

    def weight(self, name: str, value: Array) -> str:
        """Return a named tensor in the type of `value`."""
        elem_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        return self.stream(name, elem_type, value.shape, [np.ascontiguousarray(value).tobytes()])

    def weight4(self, name: str, codes: Array, signed: bool) -> str:
        """Return a named 4-bit tensor from one value a byte."""
        elem_type = TensorProto.INT4 if signed else TensorProto.UINT4
        return self.stream(name, elem_type, codes.shape, [pack_nibbles(codes)])

    def stream(self, name: str, elem_type: int, shape: Sequence[int], parts: Iterable[bytes]) -> str:
        """Return a named tensor whose bytes come in parts, written as they come. A name is written once."""
        if name in self._initializers:
            raise ValueError(f"initializer {name} written twice")
        tensor = TensorProto(name=name, data_type=elem_type, dims=list(shape))
        head = b"".join(parts) if np.prod(shape) <= INLINE_BYTES else None
        if head is not None and len(head) <= INLINE_BYTES:
            tensor.raw_data = head
        else:
            self._append(tensor, parts if head is None else [head])
        self._initializers[name] = tensor
        return name

    def type_of(self, name: str) -> int:
        """Element type of a written tensor."""
        return int(self._initializers[name].data_type)

    def _append(self, tensor: onnx.TensorProto, parts: Iterable[bytes]) -> None:
        at = self._data.tell()
        align = PAGE if np.prod(tensor.dims) >= 1 << 16 else 64
        start = -(-at // align) * align
        self._data.write(b"\0" * (start - at))
        for part in parts:
            self._data.write(part)
        tensor.data_location = TensorProto.EXTERNAL
        fields: Mapping[str, Any] = {
            "location": self.data_path.name,
            "offset": start,
            "length": self._data.tell() - start,
        }
        for key, value in fields.items():
            tensor.external_data.add(key=key, value=str(value))

    def has(self, name: str) -> bool:
        """Whether the named tensor is written."""
        return name in self._initializers

    @property
    def count(self) -> int:
        """Nodes so far."""
        return len(self._nodes)

    @property
    def tensors(self) -> int:
        """Initializers so far."""
        return len(self._initializers)

    def _unique(self, stem: str) -> str:
        count = self._names.get(stem, 0)
        self._names[stem] = count + 1
        return f"{stem}_{count}" if count else stem

    # ---- the file

    def save(self, metadata: Mapping[str, str]) -> Path:
        """Write the model: data first, then `path`, each by rename. Returns `path`.

        Raises `Problems` for a product that TensorRT would compile wrongly (see `hazards`).
        """
        raise_problems(hazards.find(self._nodes, self._initializers.values()))
        graph = helper.make_graph(
            self._nodes, "deepseek_compress", self._inputs, self._outputs, list(self._initializers.values())
        )
        model = helper.make_model(
            graph,
            functions=list(self._functions.values()),
            opset_imports=[helper.make_opsetid(d, v) for d, v in self._domains.items()],
            ir_version=IR_VERSION,
            producer_name="deepseek_compress",
        )
        helper.set_model_props(model, dict(metadata))
        size = self._data.tell()
        self._data.close()
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_bytes(model.SerializeToString(deterministic=True))
        if size:
            self._partial.replace(self.data_path)
        partial.replace(self.path)
        self.bytes = size + self.path.stat().st_size
        return self.path
