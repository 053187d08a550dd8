"""Writing a checkpoint in a form that others run. Here: the defaults, without importing anything heavy."""

from __future__ import annotations

from typing import NamedTuple


class Range(NamedTuple):
    """Smallest, most usual and largest value of a dynamic dimension."""

    least: int
    usual: int
    most: int


BATCH = Range(1, 1, 8)
NEW = Range(1, 1, 512)  # tokens of a call
PAST = Range(0, 128, 1024)  # tokens in the cache
COMPUTE_CAPABILITIES = ("sm89", "sm120")
NAMES = ("onnx", "onnxruntime", "tensorrt", "tensorrt-rtx", "compressed-tensors", "bf16", "triton", "gguf")
GRAPHS = ("onnx", "onnxruntime", "tensorrt", "tensorrt-rtx", "triton")  # targets that write an ONNX file
