"""An ONNX file in onnxruntime on the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_compress import machine
from deepseek_compress.errors import DscError
from deepseek_compress.generation.backends import Floats

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRunner:
    """A session and what its cache inputs look like."""

    name = "onnxruntime"

    def __init__(self, file: Path | bytes, threads: int = 0, folder: Path | None = None) -> None:
        self.session = open_session(file, threads, folder)
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.caches = {i.name: i for i in self.session.get_inputs() if i.name.startswith("past.")}
        unknown = {i.type for i in self.caches.values()} - set(TYPES)
        if unknown:
            raise DscError(f"caches of type {', '.join(unknown)} cannot be kept here", "export with float32 or float16")

    def empty(self, batch: int) -> dict[str, Any]:
        """Arrays (batch, ..., 0, channels)."""
        return {
            name: np.zeros([size if isinstance(size, int) else 0 for size in (batch, *i.shape[1:])], TYPES[i.type])
            for name, i in self.caches.items()
        }

    def run(self, feed: Mapping[str, Any]) -> tuple[Floats, dict[str, Any]]:
        """Logits, and present.* under the names of the next call's past.*."""
        values = dict(zip(self.outputs, self.session.run(self.outputs, feed), strict=True))
        logits: Floats = values.pop("logits")
        return logits, {name.replace("present", "past"): value for name, value in values.items()}


def open_session(file: Path | bytes, threads: int = 0, folder: Path | None = None, without: Sequence[str] = ()) -> Any:
    """Return an onnxruntime session on the CPU that computes what the graph says; `folder`: where data of bytes lies.

    `without`: names of its optimisations to leave out.

    Its optimiser would replace DequantizeLinear + MatMul by 8-bit activations of its own; here it may not.
    """
    try:
        import onnxruntime
    except ImportError:
        raise DscError("onnxruntime is not installed", "pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not machine.exact_integer_products():
        # onnxruntime's u8 x s8 products saturate at 16 bits there; its other mode (x64quantprecision) breaks weights in
        # blocks (1.31). So Q and DQ are computed as they stand.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS") or machine.cores())
    options.log_severity_level = 3
    model = file if isinstance(file, bytes) else str(file)
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=[*without]
    )
