"""An ONNX file cut where its blocks begin: each part runs with its own weights alone in memory.

`hidden_name(0)` to `hidden_name(blocks)` are values that every part but one reads and every part but one gives. A part
holds the nodes that lead from what it reads to what it gives; what blocks share (mask, rotary table) stands in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from deepseek_compress.export.graph import FLOATS
from deepseek_compress.generation.backends.graph import Ints
from deepseek_compress.generation.backends.onnx import TYPES, open_session

Floats = NDArray[np.float32]
Pieces = Sequence[slice]  # of the columns of a text: the calls it is given in
LOGITS = "logits"
AT_ONCE = 1 << 25  # numbers of a table whose codes are made at a time
FOLDED = 48  # bytes that each takes meanwhile, as measured
WORDS = ("input_ids", "attention_mask", "position_ids")


class Parts:
    """A graph of float type `dtype` whose data lies in `folder`."""

    def __init__(self, model: onnx.ModelProto, folder: Path, dtype: str) -> None:
        self.model, self.folder = model, folder
        self.dtype, self.numpy = FLOATS[dtype]
        self._nodes = model.graph.node
        self._maker = {name: place for place, node in enumerate(self._nodes) for name in node.output if name}
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._inputs = {value.name: value for value in model.graph.input}
        self._outputs = [value.name for value in model.graph.output]

    def cut(self, gives: str, reads: str | None) -> onnx.ModelProto:
        """Return what leads from `reads` (tokens, hidden) to `gives`, and to the caches on the way."""
        nodes, names = self._closure([gives], reads)
        caches = [name.replace("past.", "present.") for name in sorted(names) if name.startswith("past.")]
        nodes, names = self._closure([gives, *caches], reads)
        inputs = [self._inputs[name] for name in sorted(names) if name in self._inputs]
        if reads is not None:
            inputs.append(helper.make_tensor_value_info(reads, self.dtype, ["tokens", "hidden"]))
        graph = helper.make_graph(
            [self._nodes[place] for place in sorted(nodes)], "part", inputs,
            [onnx.ValueInfoProto(name=name) for name in (gives, *caches)],
            [self._tensors[name] for name in sorted(names) if name in self._tensors],
        )  # fmt: skip
        return helper.make_model(
            graph, functions=list(self.model.functions), opset_imports=list(self.model.opset_import),
            ir_version=self.model.ir_version,
        )  # fmt: skip

    def open_head(self, reads: str) -> Iterator[Part]:
        """Yield the part that gives logits, or several that give them for some tokens of the vocabulary each, in order.

        Where codes are made of a 16-bit table at load, onnxruntime holds every step of that for all of the table.
        """
        whole, table = self.cut(LOGITS, reads), self._rounded_table(reads)
        if table is None:
            yield Part(whole, self.folder, reads, self.numpy, True)
            return
        count, width = table.dims
        step = max(1, AT_ONCE // width)
        for start in range(0, count, step):
            some = _rows(whole, table.name, start, min(step, count - start))
            yield Part(some, self.folder, reads, self.numpy, True)

    def head_memory(self, reads: str) -> int:
        """Bytes that the largest of these takes."""
        table = self._rounded_table(reads)
        return self.memory(LOGITS, reads) if table is None else FOLDED * min(AT_ONCE, int(np.prod(table.dims)))

    def _rounded_table(self, reads: str) -> onnx.TensorProto | None:
        """Return the table whose codes the head makes at load; None where it makes none."""
        nodes, names = self._closure([LOGITS], reads)
        tensors = (self._tensors[name] for name in names if name in self._tensors)
        tables = [tensor for tensor in tensors if len(tensor.dims) == 2 and tensor.external_data]
        if len(tables) != 1 or tables[0].dims[0] == tables[0].dims[1]:  # the number of tokens is known by its value
            return None
        return tables[0] if self._folded(nodes, {tables[0].name}, reads) > 1 else None

    def memory(self, gives: str, reads: str | None) -> int:
        """Bytes a session of that part takes: its data twice, as products pack it, and its largest tensor in FP32."""
        _, names = self._closure([gives], reads)
        tensors = [self._tensors[name] for name in names if name in self._tensors]
        largest = max((int(np.prod(tensor.dims)) for tensor in tensors), default=0)
        return 2 * sum(_bytes(tensor) for tensor in tensors) + 8 * largest

    def open(self, gives: str, reads: str | None, fold: bool = False) -> Part:
        """Return a session of that part. Without `fold`, what depends on no input is computed in each call, not
        kept."""
        return Part(self.cut(gives, reads), self.folder, reads, self.numpy, fold)

    def _folded(self, nodes: set[int], large: set[str], reads: str | None) -> int:
        """Count the `nodes` whose result comes from the tensors `large` alone and is as large."""
        moving, count = {*self._inputs, reads}, 0
        for place in sorted(nodes):
            node = self._nodes[place]
            if not moving.isdisjoint(node.input):
                moving.update(node.output)
            elif not large.isdisjoint(node.input) and not node.op_type.startswith("Reduce"):
                large.update(node.output)
                count += 1
        return count

    def _closure(self, ends: Iterable[str], stop: str | None) -> tuple[set[int], set[str]]:
        """Places of the nodes that `ends` follow from, and the names of all that these read."""
        nodes: set[int] = set()
        names: set[str] = set()
        left = list(ends)
        while left:
            place = self._maker.get(left.pop())
            if place is None or place in nodes:
                continue
            nodes.add(place)
            fresh = {name for name in self._nodes[place].input if name and name != stop} - names
            names |= fresh
            left += fresh
        return nodes, names


class Part:
    """One part in onnxruntime."""

    def __init__(self, model: onnx.ModelProto, folder: Path, reads: str | None, dtype: Any, fold: bool) -> None:
        off = () if fold else ("ConstantFolding",)
        self.session = open_session(model.SerializeToString(), 0, folder, off)
        self.reads, self.numpy = reads, dtype
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.inputs = {value.name: value for value in self.session.get_inputs()}

    def __call__(self, tokens: Ints, mask: Ints, hidden: Floats | None, pieces: Pieces) -> Floats:
        """tokens, mask (B, S), hidden (B, S, channels) of what it reads -> the same of what it gives, in FP32.

        The columns are given in `pieces`, each behind the cache of those before it.
        """
        past = {
            name: np.zeros(
                [size if isinstance(size, int) else 0 for size in (len(tokens), *i.shape[1:])], TYPES[i.type]
            )
            for name, i in self.inputs.items()
            if name.startswith("past.")
        }
        positions, found = np.maximum(mask.cumsum(1) - 1, 0), []
        for piece in pieces:
            values = (tokens[:, piece], mask[:, : piece.stop], positions[:, piece])
            feed: dict[str, Any] = dict(zip(WORDS, values, strict=True)) | past
            if self.reads is not None and hidden is not None:
                feed[self.reads] = hidden[:, piece].reshape(-1, hidden.shape[-1]).astype(self.numpy)
            feed = {name: value for name, value in feed.items() if name in self.inputs}
            given, *caches = self.session.run(self.outputs, feed)
            found.append(np.asarray(given, np.float32).reshape(*values[0].shape, -1))
            past = {
                name.replace("present", "past"): value for name, value in zip(self.outputs[1:], caches, strict=True)
            }
        joined: Floats = np.concatenate(found, axis=1)
        return joined


def _rows(part: onnx.ModelProto, table: str, start: int, count: int) -> onnx.ModelProto:
    """Return the head for `count` tokens from `start` on: those rows of its table, and their number where it stood."""
    copy = onnx.ModelProto()
    copy.CopyFrom(part)
    tensors = {tensor.name: tensor for tensor in copy.graph.initializer}
    every = tensors[table].dims[0]
    row = _bytes(tensors[table]) // every
    places = {entry.key: entry for entry in tensors[table].external_data}
    places["offset"].value = str(int(places["offset"].value) + start * row)
    places["length"].value = str(count * row)
    tensors[table].dims[0] = count
    for tensor in tensors.values():
        if tensor.data_type == TensorProto.INT64 and not tensor.external_data:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.where(values == every, count, values), tensor.name))
    for node in copy.graph.node:
        for attribute in node.attribute:
            if attribute.name == "N" and attribute.i == every:
                attribute.i = count
    return copy


def _bytes(tensor: TensorProto) -> int:
    """Of a tensor's data, in the file or in an external one."""
    external = {entry.key: entry.value for entry in tensor.external_data}
    return int(external["length"]) if "length" in external else tensor.ByteSize()
