"""Writing a checkpoint in a form that others run. Here: the table of targets, without importing anything heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from deepseek_compress.registry import Entry

if TYPE_CHECKING:
    from deepseek_compress.export.target import Target


class Range(NamedTuple):
    """Smallest, most usual and largest value of a dynamic dimension."""

    least: int
    usual: int
    most: int


BATCH = Range(1, 1, 8)
NEW = Range(1, 1, 512)  # tokens of a call
PAST = Range(0, 128, 1024)  # tokens in the cache
COMPUTE_CAPABILITIES = ("sm89", "sm120")


TARGETS: dict[str, Entry] = {
    "onnx": Entry("onnx", "Onnx", "model.onnx, standard operators only, for any run-time that knows opset 21"),
    "onnxruntime": Entry("onnxruntime", "OnnxRuntime", "model.onnx with MatMulNBits, for onnxruntime"),
    "genai": Entry("genai", "Genai", "a folder that onnxruntime-genai opens: graph, genai_config.json, tokenizer"),
    "tensorrt-rtx": Entry("tensorrt", "TensorRtRtx", "model.engine of TensorRT-RTX, built without a GPU"),
    "tensorrt": Entry("tensorrt", "TensorRt", "model.engine of TensorRT, for the GPU that builds it"),
    "compressed-tensors": Entry("checkpoints", "CompressedTensors", "the packed checkpoint, for vLLM and transformers"),
    "bf16": Entry("checkpoints", "Bf16", "the checkpoint as plain BF16, for all that load safetensors"),
    "edge-llm": Entry("edge_llm", "EdgeLlm", "the checkpoint that the exporter of TensorRT-Edge-LLM takes"),
    "gguf": Entry("gguf", "Gguf", "model.gguf, for llama.cpp and what is built on it"),
}


def load(name: str) -> type[Target]:
    """Return the class of a target; `name` is a key of `TARGETS`."""
    found: type[Target] = TARGETS[name].load(f"{__name__}.targets")
    return found
