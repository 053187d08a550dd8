"""A TensorRT-RTX or TensorRT engine on an NVIDIA GPU, under the loop of `graph`.

Caches stay on the GPU: what a call gives as present.* is bound as the next call's past.*. Where an engine has no room
or was built for another GPU, that is reported before it is loaded. Not measured: no machine with a GPU ran it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepseek_compress.checkpoint.verified import MANIFEST
from deepseek_compress.errors import DscError
from deepseek_compress.generation.backends import Floats

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}


def unusable(folder: Path, capability: tuple[int, int] | None = None) -> DscError | None:
    """Why the engine in `folder` cannot run here; None where it can. `capability`: of the GPU, else looked up."""
    knobs = manifest_knobs(folder)
    target = knobs.get("target", "tensorrt-rtx")
    if target not in MODULES:
        return DscError(f"{folder}: written for target {target}, which has no engine", "export with tensorrt-rtx")
    if capability is None and not torch.cuda.is_available():
        return DscError(f"{folder / 'model.engine'} needs an NVIDIA GPU", f"give {folder / 'model.onnx'} instead")
    here = "sm{}{}".format(*(capability or torch.cuda.get_device_capability()))
    built = [str(name) for name in knobs.get("compute_capabilities") or [here]]
    if here not in built:
        fix = f"dsc export MODEL -o OUT --target {target} --set compute_capabilities=[{here}]"
        return DscError(f"{folder / 'model.engine'} is built for {', '.join(built)}, this GPU is {here}", fix)
    try:
        importlib.import_module(MODULES[target])
    except ImportError:
        fix = f"pip install 'deepseek-compress[{target}]'"
        return DscError(f"{folder / 'model.engine'} needs the package {MODULES[target]}", fix)
    return None


def manifest_knobs(folder: Path) -> Mapping[str, Any]:
    """Knobs of the stage that wrote a directory; empty where there is no manifest."""
    try:
        knobs = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("knobs") or {}
    except (OSError, ValueError, AttributeError):
        return {}
    return knobs if isinstance(knobs, dict) else {}


class EngineRunner:
    """One engine, its context and its stream. `most` tokens fit into the cache, `chunk` into a call."""

    name = "TensorRT engine"

    def __init__(self, file: Path) -> None:
        knobs = manifest_knobs(file.parent)
        self._trt: Any = importlib.import_module(MODULES[knobs.get("target", "tensorrt-rtx")])
        runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._engine = runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            fix = "build it again with the TensorRT version that is installed here"
            raise DscError(f"{file}: does not load in {self._trt.__name__} {self._trt.__version__}", fix)
        self._context = self._engine.create_execution_context()
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._nothing = torch.empty(1, device="cuda")  # an empty cache still needs an address
        past = next(name for name in self._names if name.startswith("past."))
        self.chunk = int(self._engine.get_tensor_profile_shape("input_ids", 0)[2][1])
        self.most = int(self._engine.get_tensor_profile_shape(past, 0)[2][-2])

    def empty(self, batch: int) -> dict[str, Any]:
        """Tensors on the GPU, (batch, ..., 0, channels)."""
        names = [name for name in self._names if name.startswith("past.")]
        return {name: torch.empty(self._shape(name, batch), dtype=self._dtype(name), device="cuda") for name in names}

    def run(self, feed: Mapping[str, Any]) -> tuple[Floats, dict[str, Any]]:
        """Logits on the CPU, caches on the GPU."""
        moved = {
            n: v if isinstance(v, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(v)) for n, v in feed.items()
        }
        inputs = {name: value.to("cuda", self._dtype(name)).contiguous() for name, value in moved.items()}
        for name, value in inputs.items():
            if not self._context.set_input_shape(name, tuple(value.shape)):
                raise DscError(
                    f"{name} of shape {tuple(value.shape)} is outside the engine's profile", "export with a larger past"
                )
            self._context.set_tensor_address(name, (value if value.numel() else self._nothing).data_ptr())
        outputs = {
            name: torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=self._dtype(name), device="cuda")
            for name in self._names
            if name not in inputs
        }
        for name, value in outputs.items():
            self._context.set_tensor_address(name, value.data_ptr())
        torch.cuda.current_stream().synchronize()
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise DscError("the engine refused a call", "see TensorRT's messages above")
        self._stream.synchronize()
        logits: Floats = outputs.pop("logits").float().cpu().numpy()
        return logits, {name.replace("present", "past"): value for name, value in outputs.items()}

    def _shape(self, name: str, batch: int) -> list[int]:
        batch_free, *rest = self._engine.get_tensor_shape(name)
        return [batch if batch_free < 0 else batch_free, *(max(0, size) for size in rest)]

    def _dtype(self, name: str) -> torch.dtype:
        kinds = self._trt.DataType
        table = {kinds.FLOAT: torch.float32, kinds.HALF: torch.float16, kinds.BF16: torch.bfloat16,
                 kinds.INT64: torch.int64, kinds.INT32: torch.int32}  # fmt: skip
        return table[self._engine.get_tensor_dtype(name)]
